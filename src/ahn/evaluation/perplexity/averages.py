"""From the records of single documents and arms to what is reported of all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ahn.evaluation.bootstrap import interval
from ahn.evaluation.perplexity.cache_sizes import CacheSizes
from ahn.evaluation.perplexity.documents import TokenDocument
from ahn.evaluation.perplexity.ngrams import GROUPS
from ahn.evaluation.perplexity.reading import PerplexityPlan, key
from ahn.generation import full_cache_bytes

SPANS = ("beyond", "after")
"""Tokens beyond sinks and window that all arms have read, and those after, which `full` has not."""

Records = Mapping[str, Mapping[str, Any]]
"""The records of `measure` by `key`."""


def average(
    model: nn.Module,
    documents: Sequence[TokenDocument],
    plan: PerplexityPlan,
    records: Records,
    seed: int,
    sizes: CacheSizes | None = None,
    equal_windows: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """What is reported.

    Args:
        model: The model that read, for what full attention would hold.
        documents: What was read.
        plan: How it was read.
        records: Of all documents and arms.
        seed: Of the bootstrap.
        sizes: What counts the bytes of caches; not counted if left out.
        equal_windows: Arms with a larger window, by the names of the arms that take as many bytes.

    Returns:
        Plain values: `documents`, `arms`, `groups` by span, `positions` (mean score in each bin), `points` (bytes
        held, of the longest document) and `equal_bytes`. Scores are means over tokens in nats; what does not exist is
        NaN.
    """
    longest = max(documents, key=lambda each: len(each.ids))
    points = {arm: records[key(longest, arm)]["points"] for arm in plan.arms}
    marks = max((each["tokens"] for each in points.values()), key=lambda tokens: tokens[-1])
    return {
        "documents": [_document(each, plan, records) for each in documents],
        "arms": {
            arm: {
                **_arm(arm, documents, plan, records, seed),
                **({} if sizes is None else {"counted_bytes": sizes.bytes_of(arm)}),
            }
            for arm in plan.arms
        },
        "equal_bytes": {
            arm: {"arm": other, **difference(other, arm, documents, records, seed)}
            for arm, other in equal_windows.items()
        },
        "groups": {span: _groups(span, documents, plan, records) for span in SPANS},
        "positions": {
            "bin_tokens": plan.bin_tokens,
            "nll": {arm: _curve([records[key(each, arm)]["bins"] for each in documents]) for arm in plan.arms},
        },
        "points": {
            "document": longest.name,
            "arms": points,
            "full_cache": {"tokens": marks, "bytes": [full_cache_bytes(model, tokens) for tokens in marks]},
        },
    }


def difference(
    arm: str, better: str, documents: Sequence[TokenDocument], records: Records, seed: int
) -> dict[str, float]:
    """How much better one arm scores than another.

    Args:
        arm: Name of the other.
        better: Name of the one.
        documents: What both have read.
        records: Of all documents and arms.
        seed: Of the bootstrap.

    Returns:
        Nats per token that it has less, `nats_better`, with the ends of the 95 % interval over documents.
    """
    sums = {
        name: np.array([records[key(each, name)]["spans"]["beyond"] for each in documents]) for name in (arm, better)
    }
    rows = np.stack((sums[arm][:, 0] - sums[better][:, 0], sums[arm][:, 1]), axis=1)
    low, high = interval(rows, _ratio, seed=seed)
    return {"nats_better": _ratio(rows), "low": low, "high": high}


def _ratio(rows: NDArray[np.float64]) -> float:
    total, number = rows.sum(0)
    return float(total / number)


def _document(document: TokenDocument, plan: PerplexityPlan, records: Records) -> dict[str, Any]:
    spans = {arm: records[key(document, arm)]["spans"] for arm in plan.arms}
    return {
        "name": document.name,
        "tokens": len(document.ids),
        "nll": {span: {arm: _mean(spans[arm][span]) for arm in plan.arms} for span in SPANS},
    }


def _arm(
    arm: str, documents: Sequence[TokenDocument], plan: PerplexityPlan, records: Records, seed: int
) -> dict[str, Any]:
    """The row of an arm in the table."""
    mine = [records[key(each, arm)] for each in documents]
    sums = {span: np.array([each["spans"][span] for each in mine], dtype=float).sum(0) for span in SPANS}
    nll = {span: _mean(sums[span]) for span in SPANS}
    tokens, seconds = (sum(each[name] for each in mine) for name in ("tokens", "seconds"))
    return {
        "tokens": tokens,
        "scored": {span: int(sums[span][1]) for span in SPANS},
        "nll": nll,
        "perplexity": {span: math.exp(each) for span, each in nll.items()},
        "closed": _closed(arm, documents, plan, records, seed),
        "cache_bytes": max(max(each["points"]["cache_bytes"]) for each in mine),
        "tokens_per_second": tokens / seconds,
    }


def _closed(
    arm: str, documents: Sequence[TokenDocument], plan: PerplexityPlan, records: Records, seed: int
) -> dict[str, float] | None:
    """Share of the gap from window to full that an arm closes, with its 95 % interval over documents."""
    if not {"window", "full"} <= set(plan.arms) or arm in ("window", "full"):
        return None
    columns = [
        [records[key(each, name)]["spans"]["beyond"][0] for each in documents] for name in ("window", arm, "full")
    ]
    rows = np.array(columns, dtype=float).T
    low, high = interval(rows, closed_share, seed=seed)
    return {"share": closed_share(rows), "low": low, "high": high}


def closed_share(sums: NDArray[np.float64]) -> float:
    """Share of the gap from window to full that an arm closes: 0 is as bad as the window, 1 as good as full attention.

    Args:
        sums: Summed scores of a document in the columns window, arm, full: `[documents, 3]`.
    """
    window, arm, full = sums.sum(0)
    return float((window - arm) / (window - full)) if window != full else math.nan


def _groups(span: str, documents: Sequence[TokenDocument], plan: PerplexityPlan, records: Records) -> dict[str, Any]:
    """Number of tokens and mean scores of each group."""
    rows: dict[str, Any] = {}
    for group in GROUPS:
        sums = {arm: [records[key(each, arm)]["groups"][span][group] for each in documents] for arm in plan.arms}
        totals = {arm: np.array(each, dtype=float).sum(0) for arm, each in sums.items()}
        tokens = int(max(each[1] for each in totals.values()))
        rows[group] = {"tokens": tokens, "nll": {arm: _mean(each) for arm, each in totals.items()}}
    return rows


def _curve(bins: Sequence[Sequence[Sequence[float]]]) -> list[float]:
    """Mean score of each bin over all documents that reach it; NaN for an empty one."""
    total = np.zeros((max(len(each) for each in bins), 2))
    for each in bins:
        total[: len(each)] += np.array(each, dtype=float).reshape(-1, 2)
    return [_mean(each) for each in total]


def _mean(sum_and_number: Sequence[float] | NDArray[np.float64]) -> float:
    total, number = sum_and_number
    return float(total / number) if number else math.nan
