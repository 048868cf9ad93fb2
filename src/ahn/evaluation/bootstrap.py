"""How far a number would move with other items of the same kind: percentile bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ahn.evaluation.errors import EvaluationError


def interval(
    values: ArrayLike,
    statistic: Callable[[NDArray[Any]], float],
    draws: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """The interval in which a statistic lies when the items are drawn again, with replacement.

    Whole rows are drawn, so what several arms made of an item stays together, and their difference keeps its pairs.

    Args:
        values: One row for every item, `[items]` or `[items, columns]`.
        statistic: The number of interest, from rows like those of `values`; a draw for which it is not finite (a gap of
            0 in a denominator, for example) is left out.
        draws: How often to draw as many items as there are.
        seed: Of the draws.
        level: Share of the draws that the interval holds, from 0 to 1.

    Returns:
        Lower and upper end, in the statistic's unit; both NaN for fewer than two items, which tell nothing.

    Raises:
        EvaluationError: Draws or level are out of range.

    Source: B. Efron, Bootstrap Methods: Another Look at the Jackknife, Ann. Statist. 7 (1979).
    """
    if draws < 1 or not 0 < level < 1:
        raise EvaluationError(f"draws must be at least 1 and level between 0 and 1, not {draws} and {level}")
    rows = np.asarray(values)
    if len(rows) < 2:
        return math.nan, math.nan
    generator = np.random.default_rng(seed)
    drawn = np.empty(draws)
    with np.errstate(divide="ignore", invalid="ignore"):
        for number in range(draws):
            drawn[number] = statistic(rows[generator.integers(0, len(rows), len(rows))])
    drawn = drawn[np.isfinite(drawn)]
    if not drawn.size:
        return math.nan, math.nan
    low, high = np.quantile(drawn, ((1 - level) / 2, (1 + level) / 2))
    return float(low), float(high)
