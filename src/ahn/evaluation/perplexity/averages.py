"""From the records of single documents and arms to what is reported of all of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
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


@dataclasses.dataclass(frozen=True)
class Averages:
    """What is reported of all documents and arms.

    Attributes:
        documents: What was read.
        plan: How it was read.
        records: The records of `measure` by `key`, of all documents and arms.
        seed: Of the bootstraps.
    """

    documents: Sequence[TokenDocument]
    plan: PerplexityPlan
    records: Mapping[str, Mapping[str, Any]]
    seed: int = 0

    def report(
        self, model: nn.Module, sizes: CacheSizes | None = None, equal_windows: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """What is reported.

        Args:
            model: The model that read, for what full attention would hold.
            sizes: What counts the bytes of caches; not counted if left out.
            equal_windows: Arms with a larger window, by the names of the arms that take as many bytes.

        Returns:
            Plain values: `documents`, `arms`, `groups` by span, `positions` (mean score in each bin), `points` (bytes
            held, of the longest document), `equal_bytes` and `other_text`. Scores are means over tokens in nats. What
            does not exist is NaN.
        """
        longest = max(self.documents, key=lambda each: len(each.ids))
        points = {arm: self.records[key(longest, arm)]["points"] for arm in self.plan.arms}
        marks = max((each["tokens"] for each in points.values()), key=lambda tokens: tokens[-1])
        full = {"tokens": marks, "bytes": [full_cache_bytes(model, tokens) for tokens in marks]}
        counted = {} if sizes is None else {arm: {"counted_bytes": sizes.bytes_of(arm)} for arm in self.plan.arms}
        return {
            "documents": [self._document(each) for each in self.documents],
            "arms": {arm: {**self._arm(arm), **counted.get(arm, {})} for arm in self.plan.arms},
            "equal_bytes": {
                arm: {"arm": other, **self.difference(other, arm)} for arm, other in (equal_windows or {}).items()
            },
            "other_text": {arm: self.other_text(arm) for arm in self.plan.controlled},
            "groups": {span: {group: self._group(span, group) for group in GROUPS} for span in SPANS},
            "positions": {
                "bin_tokens": self.plan.bin_tokens,
                "nll": {arm: _curve([each["bins"] for each in self._records_of(arm)]) for arm in self.plan.arms},
            },
            "points": {"document": longest.name, "arms": points, "full_cache": full},
        }

    def difference(self, arm: str, better: str) -> dict[str, float]:
        """How much better one arm scores than another, over all tokens beyond sinks and window.

        Args:
            arm: Name of the other.
            better: Name of the one.

        Returns:
            Nats per token that it has less, `nats_better`, with the ends of the 95 % interval over documents.
        """
        return self._nats_better(self._records_of(arm), self._records_of(better))

    def other_text(self, arm: str) -> dict[str, Any]:
        """An arm beside the same arm with the memory of another text.

        Args:
            arm: Name of the arm.

        Returns:
            `nll`: scores with the memory of another text, by span. `closed`: the share of the gap from window to full
            that is closed so. `own`: what the text's own memory closes beyond it, of the same gap. Both have 95 %
            intervals over documents, and are `None` without the gap. Then the same as nats, as `difference` has them,
            over the tokens beyond sinks and window that all arms have read.
        """
        others = self._records_of(arm, has_other_memory=True)
        return {
            "nll": {span: _mean(_total(each["spans"][span] for each in others)) for span in SPANS},
            "closed": self._part_of_gap(self._records_of("window"), others) if self._has_gap else None,
            "own": self._part_of_gap(others, self._records_of(arm)) if self._has_gap else None,
            **self._nats_better(others, self._records_of(arm), ("beyond",)),
        }

    def _nats_better(
        self,
        records: Sequence[Mapping[str, Any]],
        better: Sequence[Mapping[str, Any]],
        spans: Sequence[str] = SPANS,
    ) -> dict[str, float]:
        sums, less = (
            np.array([_total(each["spans"][span] for span in spans) for each in reading])
            for reading in (records, better)
        )
        rows = np.stack((sums[:, 0] - less[:, 0], sums[:, 1]), axis=1)
        low, high = interval(rows, lambda drawn: _mean(drawn.sum(0)), seed=self.seed)
        return {"nats_better": _mean(rows.sum(0)), "low": low, "high": high}

    def _records_of(self, arm: str, has_other_memory: bool = False) -> list[Mapping[str, Any]]:
        """The records of an arm, document by document."""
        return [self.records[key(each, arm, has_other_memory)] for each in self.documents]

    def _document(self, document: TokenDocument) -> dict[str, Any]:
        spans = {arm: self.records[key(document, arm)]["spans"] for arm in self.plan.arms}
        return {
            "name": document.name,
            "tokens": len(document.ids),
            "nll": {span: {arm: _mean(spans[arm][span]) for arm in self.plan.arms} for span in SPANS},
        }

    def _arm(self, arm: str) -> dict[str, Any]:
        """The row of an arm in the table."""
        records = self._records_of(arm)
        sums = {span: _total(each["spans"][span] for each in records) for span in SPANS}
        nll = {span: _mean(sums[span]) for span in SPANS}
        tokens, seconds = (sum(each[name] for each in records) for name in ("tokens", "seconds"))
        return {
            "tokens": tokens,
            "scored": {span: int(sums[span][1]) for span in SPANS},
            "nll": nll,
            "perplexity": {span: math.exp(each) for span, each in nll.items()},
            "closed": self._closed(arm),
            "cache_bytes": max(max(each["points"]["cache_bytes"]) for each in records),
            "tokens_per_second": tokens / seconds,
        }

    def _closed(self, arm: str) -> dict[str, float] | None:
        """Share of the gap from window to full that an arm closes, with its 95 % interval over documents."""
        if not self._has_gap or arm in ("window", "full"):
            return None
        return self._part_of_gap(self._records_of("window"), self._records_of(arm))

    @property
    def _has_gap(self) -> bool:
        """Whether both ends of the gap were read."""
        return {"window", "full"} <= set(self.plan.arms)

    def _part_of_gap(self, worse: Sequence[Mapping[str, Any]], better: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """What lies between two readings, as a share of the gap from window to full."""
        readings = worse, better, self._records_of("window"), self._records_of("full")
        rows = np.array([[each["spans"]["beyond"][0] for each in reading] for reading in readings], dtype=float).T
        low, high = interval(rows, part_of_gap, seed=self.seed)
        return {"share": part_of_gap(rows), "low": low, "high": high}

    def _group(self, span: str, group: str) -> dict[str, Any]:
        """Number of tokens and mean scores of a group."""
        totals = {arm: _total(each["groups"][span][group] for each in self._records_of(arm)) for arm in self.plan.arms}
        tokens = int(max(each[1] for each in totals.values()))
        return {"tokens": tokens, "nll": {arm: _mean(each) for arm, each in totals.items()}}


def part_of_gap(sums: NDArray[np.float64]) -> float:
    """What lies between two readings, as a share of the gap from window to full: 1 is all that the window loses.

    Args:
        sums: Summed scores of a document in the columns worse reading, better reading, window, full: `[documents, 4]`.
    """
    worse, better, window, full = sums.sum(0)
    return float((worse - better) / (window - full)) if window != full else math.nan


def _curve(bins: Sequence[Sequence[Sequence[float]]]) -> list[float]:
    """Mean score of each bin over all documents that reach it; NaN for an empty one."""
    total = np.zeros((max(len(each) for each in bins), 2))
    for each in bins:
        total[: len(each)] += np.array(each, dtype=float).reshape(-1, 2)
    return [_mean(each) for each in total]


def _total(sums_and_numbers: Iterable[Sequence[float]]) -> NDArray[np.float64]:
    total: NDArray[np.float64] = np.array(list(sums_and_numbers), dtype=float).sum(0)
    return total


def _mean(sum_and_number: Sequence[float] | NDArray[np.float64]) -> float:
    total, number = sum_and_number
    return float(total / number) if number else math.nan
