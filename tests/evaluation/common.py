"""A table of hand-computed scores, and how a row of it is read."""

from __future__ import annotations

from typing import Any

import pytest

from ahn.evaluation.metrics import METRICS

# Prediction, answers, score; between answers and score the keywords, where a metric looks at them.
Row = tuple[Any, ...]


def rows(table: list[Row]) -> list[Any]:
    """The rows of a table as parameters, each under a name that shows what it holds."""
    return [pytest.param(row, id=" | ".join(repr(each) for each in row[:-1])[:80]) for row in table]


def score(metric: str, row: Row) -> float:
    """What the metric says of a row."""
    return METRICS[metric].score(*row[:-1])


def by_hand(row: Row) -> Any:
    """What it should say. The package rouge adds 1e-8 in a denominator."""
    return pytest.approx(row[-1], abs=1e-7)
