"""Scores of the arms side by side: of every set, with intervals over its records, and averages over sets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ahn.evaluation.benchmarks.schema import Scoring
from ahn.evaluation.bootstrap import interval
from ahn.evaluation.predictions import from_record
from ahn.evaluation.set_scores import SetScore, averages, score_predictions

BASELINE = "window"
"""The arm that the others are compared with."""

Results = dict[str, Any]


def summarise(records: Sequence[dict[str, Any]], arms: Sequence[str], scoring: Scoring) -> Results:
    """What the arms scored and what it cost.

    Args:
        records: As `BenchmarkRunner.run` gives them.
        arms: Names of the arms.
        scoring: Whose rules.

    Returns:
        `sets`, `averages` and `arms`, ready for JSON. Scores are 0 to 100, as the benchmarks give them, with the ends
        of 95 % intervals over records; a difference to the baseline is over the same records.

    Raises:
        EvaluationError: A package that scores them is missing.
    """
    by_arm = {arm: [record for record in records if record["arm"] == arm] for arm in arms}
    scores = {arm: score_predictions(map(from_record, by_arm[arm]), scoring) for arm in arms}
    means = {arm: averages(scores[arm]) for arm in arms}
    return {
        "scoring": scoring,
        "sets": [_set(dict(zip(arms, alike))) for alike in zip(*scores.values())],
        "averages": [
            {**alike[0].facts, "scores": {arm: mean.score for arm, mean in zip(arms, alike)}}
            for alike in zip(*means.values())
        ],
        "arms": {
            arm: {
                "tokens": sum(record["tokens"] for record in by_arm[arm]),
                "seconds": sum(record["seconds"] for record in by_arm[arm]),
                "cache_bytes": max(record["cache_bytes"] for record in by_arm[arm]),
            }
            for arm in arms
        },
    }


def _set(scores: dict[str, SetScore]) -> dict[str, Any]:
    first = next(iter(scores.values()))
    items = {arm: np.array([score for _, score in each.items]) for arm, each in scores.items()}
    base = items.get(BASELINE)
    return {
        **first.facts,
        "of": first.target.task.items,
        "scores": {arm: {"score": each.score, "interval": _interval(items[arm])} for arm, each in scores.items()},
        "differences": {
            arm: {"score": 100 * float(np.mean(items[arm] - base)), "interval": _interval(items[arm] - base)}
            for arm in scores
            if base is not None and arm != BASELINE
        },
    }


def _interval(values: np.ndarray[Any, Any]) -> list[float]:
    return list(interval(100 * values, lambda rows: float(rows.mean())))
