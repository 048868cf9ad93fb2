"""Nats per token of the gold answers by arm and by where the evidence is, with intervals over meetings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ahn.evaluation.bootstrap import interval
from ahn.evaluation.qmsum.run import GROUPS, Record

BASELINE = "window"
"""The arm that the others are compared with."""

Results = dict[str, Any]
_Rows = np.ndarray[Any, Any]


def results(records: Sequence[Record], arms: Sequence[str]) -> Results:
    """What the arms knew of the meetings.

    Args:
        records: As `ahn.evaluation.qmsum.run.measure` gives them.
        arms: Names of the arms.

    Returns:
        `groups` by name, with "all" first, and `arms` by name; ready for JSON. Of each group: `queries`, `meetings`,
        `tokens` of gold answers; by arm `nats` per token, the `difference` to the baseline, each with the ends of its
        95 % interval over meetings, and `rouge_l`, 0 to 100, where answers were written.
    """
    of = {arm: [record for record in records if record["arm"] == arm] for arm in arms}
    groups: dict[str, tuple[str, ...]] = {"all": tuple(GROUPS), **{group: (group,) for group in GROUPS}}
    return {
        "groups": {name: _group(of, arms, wanted) for name, wanted in groups.items()},
        "arms": {
            arm: {
                "tokens": sum(record["tokens"] for record in mine),
                "seconds": sum(record["seconds"] for record in mine),
                "cache_bytes": max(record["cache_bytes"] for record in mine),
            }
            for arm, mine in of.items()
        },
    }


def _group(of: dict[str, list[Record]], arms: Sequence[str], wanted: Sequence[str]) -> dict[str, Any]:
    answers = {
        arm: [[each for each in record["answers"] if each["group"] in wanted] for record in mine]
        for arm, mine in of.items()
    }
    answers = {arm: [each for each in meetings if each] for arm, meetings in answers.items()}
    first = answers[arms[0]]
    # One row for every meeting: tokens, then the sum of every arm's nats.
    tokens = np.array([sum(each["tokens"] for each in meeting) for meeting in first], dtype=float)
    nats = {arm: np.array([sum(each["nll"] for each in meeting) for meeting in answers[arm]]) for arm in arms}
    base = nats.get(BASELINE)
    found: dict[str, Any] = {
        "queries": sum(len(meeting) for meeting in first),
        "meetings": len(first),
        "tokens": int(tokens.sum()),
        "nats": {arm: _rate(tokens, nats[arm]) for arm in arms},
        "difference": {arm: _rate(tokens, nats[arm] - base) for arm in arms if base is not None and arm != BASELINE},
    }
    if any("rouge_l" in each for meeting in first for each in meeting):
        found["rouge_l"] = {arm: _rouge(answers[arm]) for arm in arms}
    return found


def _rate(tokens: _Rows, nats: _Rows) -> dict[str, Any]:
    """Nats per token, with its interval."""
    if not tokens.size:
        return {"value": None, "interval": [None, None]}
    rows = np.stack((tokens, nats), axis=1)
    return {"value": _ratio(rows), "interval": list(interval(rows, _ratio))}


def _rouge(meetings: Sequence[Sequence[Record]]) -> dict[str, Any]:
    """The mean over questions, 0 to 100, with its interval."""
    rows = np.array([[len(meeting), 100 * sum(each["rouge_l"] for each in meeting)] for meeting in meetings])
    return {"value": _ratio(rows), "interval": list(interval(rows, _ratio))}


def _ratio(rows: _Rows) -> float:
    return float(rows[:, 1].sum() / rows[:, 0].sum())
