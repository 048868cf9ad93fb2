"""One document read in one arm, as a record of sums: the scores of single tokens are not kept.

Legend of shapes: T tokens, N bins.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ahn.attachment import attachment_of
from ahn.evaluation.arms import ArmReader, arm_reader
from ahn.evaluation.errors import EvaluationError
from ahn.evaluation.journal import Journal
from ahn.evaluation.perplexity.documents import Document
from ahn.evaluation.perplexity.ngrams import GROUPS
from ahn.evaluation.process_memory import resident_bytes
from ahn.generation import automatic_chunk

_BINS = 32
_POINTS = 128  # of the curves of bytes


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is measured of every document.

    Attributes:
        arms: Names of the arms.
        exact: Sinks and window: tokens up to which all arms but `tail` read alike.
        bin_tokens: Tokens of a bin of the curve of scores.
        full_limit: Tokens that `full` reads at most.
    """

    arms: Sequence[str]
    exact: int
    bin_tokens: int
    full_limit: int

    def limit(self, arm: str, tokens: int) -> int:
        """Tokens that an arm reads of a document of so many."""
        return min(tokens, self.full_limit) if arm == "full" else tokens

    def spans(self, tokens: int) -> dict[str, slice]:
        """What is compared: scores beyond sinks and window that every arm has, and those after, which `full` lacks."""
        end = min(self.limit(arm, tokens) for arm in self.arms) - 1
        return {"beyond": slice(self.exact, max(self.exact, end)), "after": slice(max(self.exact, end), tokens)}


def make_plan(model: nn.Module, arms: Sequence[str], documents: Sequence[Document]) -> Plan:
    """The plan for these documents and this model.

    Args:
        model: A model with a memory attached; sinks and window are those of its current settings.
        arms: Names of the arms.
        documents: What will be read.

    Raises:
        EvaluationError: A document is longer than the positions that the model has.
    """
    attachment, longest = attachment_of(model), max(len(each.ids) for each in documents)
    limit = attachment.position_limit
    if limit is not None and longest > limit:
        raise EvaluationError(
            f"this model has positions for {limit:,} tokens only, and the longest document has {longest:,}; "
            f"read less of it with --length {limit}"
        )
    exact = attachment.settings.sinks + attachment.settings.window
    return Plan(arms, exact, bin_tokens(longest), attachment.trained_context)


def bin_tokens(longest: int) -> int:
    """Tokens of a bin, a power of two, so that at most 32 bins hold the longest document."""
    return int(2 ** max(0, math.ceil(math.log2(longest / _BINS))))


def measure(
    model: nn.Module,
    arm: str,
    document: Document,
    groups: NDArray[np.int8],
    plan: Plan,
    on_tokens: Callable[[ArmReader], None] | None = None,
) -> dict[str, Any]:
    """Reads a document in an arm.

    Args:
        model: A model with a memory attached.
        arm: Name of the arm.
        document: What to read.
        groups: The group of each token but the first, `[T - 1]`.
        plan: What to measure.
        on_tokens: Called after every chunk.

    Returns:
        `tokens` and `seconds`; `bins`: sum and number of the scores in each bin; `spans`: likewise by name of the span;
        `groups`: likewise by name of the span and of the group; `points`: tokens read, bytes of the cache and of the
        process then.
    """
    ids = torch.from_numpy(document.ids[: plan.limit(arm, len(document.ids))])
    reader, points = arm_reader(model, arm), Points(ids.numel())
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    for piece in ids.split(automatic_chunk(model)):
        reader.feed(piece)
        points.note(reader, device)
        if on_tokens is not None:
            on_tokens(reader)
    nll = reader.nll.double().numpy()
    spans, groups = plan.spans(len(document.ids)), groups[: len(nll)]
    return {
        "tokens": ids.numel(),
        "seconds": reader.seconds,
        "bins": _binned(nll, plan.bin_tokens),
        "spans": {name: _sum(nll[span]) for name, span in spans.items()},
        "groups": {name: _by_group(nll[span], groups[span]) for name, span in spans.items()},
        "points": points.by_name,
    }


def read_all(
    model: nn.Module,
    documents: Sequence[Document],
    groups: Sequence[NDArray[np.int8]],
    plan: Plan,
    journal: Journal,
    on_progress: Callable[[int, str], None] | None = None,
) -> None:
    """Reads every document in every arm, but for those that the journal holds already, and adds them to it.

    Args:
        model: A model with a memory attached.
        documents: What to read.
        groups: The group of each token but the first, `[T - 1]` for each document.
        plan: What to measure.
        journal: Gets a record for every document and arm.
        on_progress: Is told the tokens that were read so far, those of the journal included, and a remark.
    """
    done = 0
    for document, group in zip(documents, groups, strict=True):
        # Full attention leaves the process larger than it found it, so it comes last.
        for arm in sorted(plan.arms, key=lambda each: each == "full"):
            name, before = key(document, arm), done
            if name not in journal.done:

                def tell(reader: ArmReader, before: int = before, arm: str = arm) -> None:
                    if on_progress is not None:
                        on_progress(before + reader.tokens, f"{arm}, cache {reader.cache_bytes / 1e6:,.1f} MB")

                journal.add(name, measure(model, arm, document, group, plan, tell))
            done += plan.limit(arm, len(document.ids))
            if on_progress is not None:
                on_progress(done, arm)


def key(document: Document, arm: str) -> str:
    """Name of a document's record in an arm."""
    return f"{document.name} | {arm}"


class Points:
    """What an arm holds, noted at some of the chunks.

    Args:
        tokens: Tokens that will be read.

    Attributes:
        by_name: Tokens read, bytes of the cache and bytes of the process, a list each.
    """

    def __init__(self, tokens: int) -> None:
        self.by_name: dict[str, list[int]] = {"tokens": [], "cache_bytes": [], "resident_bytes": []}
        self._tokens, self._next = tokens, 0.0

    def note(self, reader: ArmReader, device: torch.device) -> None:
        """Called after a chunk."""
        if reader.tokens < self._next and reader.tokens < self._tokens:
            return
        self._next = reader.tokens + self._tokens / _POINTS
        values = (reader.tokens, reader.cache_bytes, resident_bytes(device))
        for held, value in zip(self.by_name.values(), values, strict=True):
            held.append(value)


def _sum(scores: NDArray[np.float64]) -> list[float]:
    return [float(scores.sum()), len(scores)]


def _by_group(nll: NDArray[np.float64], groups: NDArray[np.int8]) -> dict[str, list[float]]:
    return {name: _sum(nll[groups == number]) for number, name in enumerate(GROUPS)}


def _binned(nll: NDArray[np.float64], width: int) -> list[list[float]]:
    """Sum and number of the scores in each bin; the score of token `i` stands at position `i`, from 0."""
    positions = np.arange(1, len(nll) + 1) // width
    return [[float(total), int(number)] for total, number in zip(np.bincount(positions, nll), np.bincount(positions))]
