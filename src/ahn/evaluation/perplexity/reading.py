"""One document read in one arm, as a record of sums: the scores of single tokens are not kept.

Legend of shapes: T tokens, N bins.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ahn.attachment import attachment_of
from ahn.evaluation.arm_names import find_arm
from ahn.evaluation.arms import arm_reader
from ahn.evaluation.driver import Job, OnProgress, complete
from ahn.evaluation.errors import EvaluationError
from ahn.evaluation.journal import Journal
from ahn.evaluation.perplexity.documents import TokenDocument
from ahn.evaluation.perplexity.ngrams import GROUPS
from ahn.generation import automatic_chunk

Precision = Literal["float32", "bfloat16"]
_BINS = 32
_POINTS = 128  # of the curves of bytes


@dataclasses.dataclass(frozen=True)
class PerplexityPlan:
    """What is measured of every document.

    Attributes:
        arms: Names of the arms.
        exact: Sinks and window: tokens up to which all arms but `tail` read alike.
        bin_tokens: Tokens of a bin of the curve of scores.
        full_limit: Tokens that `full` reads at most.
        precision: What products are rounded to, "float32" or "bfloat16".
        other_texts: Whether arms with a memory are read once more with the memory of another text.
    """

    arms: Sequence[str]
    exact: int
    bin_tokens: int
    full_limit: int
    precision: Precision = "float32"
    other_texts: bool = False

    @property
    def controlled(self) -> list[str]:
        """The arms that are read once more with the memory of another text."""
        return [arm for arm in self.arms if self.other_texts and find_arm(arm).method == "ahn"]

    def limit(self, arm: str, tokens: int) -> int:
        """Tokens that an arm reads of a document with this number of them."""
        return min(tokens, self.full_limit) if arm == "full" else tokens

    def spans(self, tokens: int) -> dict[str, slice]:
        """What is compared: scores beyond sinks and window that every arm has, and those after, which `full` lacks."""
        end = min(self.limit(arm, tokens) for arm in self.arms) - 1
        return {"beyond": slice(self.exact, max(self.exact, end)), "after": slice(max(self.exact, end), tokens)}


def make_plan(
    model: nn.Module,
    arms: Sequence[str],
    documents: Sequence[TokenDocument],
    precision: Precision = "float32",
    other_texts: bool = False,
) -> PerplexityPlan:
    """The plan for these documents and this model.

    Args:
        model: A model with a memory attached; sinks and window are those of its current settings.
        arms: Names of the arms.
        documents: What will be read.
        precision: What products are rounded to.
        other_texts: Whether arms with a memory are read once more with the memory of another text.

    Raises:
        EvaluationError: A document is longer than the positions that the model has, or its other text is missing or the
            same.
    """
    if other_texts:
        _check_others(documents)
    attachment, longest = attachment_of(model), max(len(each.ids) for each in documents)
    limit = attachment.position_limit
    if limit is not None and longest > limit:
        raise EvaluationError(
            f"this model has positions for {limit:,} tokens only, and the longest document has {longest:,}; "
            f"read less of it with --length {limit}"
        )
    exact = attachment.settings.sinks + attachment.settings.window
    return PerplexityPlan(arms, exact, bin_tokens(longest), attachment.trained_context, precision, other_texts)


def bin_tokens(longest: int) -> int:
    """Tokens of a bin, a power of two, so that at most 32 bins hold the longest document."""
    return int(2 ** max(0, math.ceil(math.log2(longest / _BINS))))


def measure(
    model: nn.Module,
    arm: str,
    document: TokenDocument,
    groups: NDArray[np.int8],
    plan: PerplexityPlan,
    on_progress: OnProgress = lambda *_: None,
    other: TokenDocument | None = None,
) -> dict[str, Any]:
    """Reads a document in an arm.

    Args:
        model: A model with a memory attached.
        arm: Name of the arm.
        document: What to read.
        groups: The group of each token but the first, `[T - 1]`.
        plan: What to measure.
        on_progress: Called after every chunk with the tokens that are read and a remark.
        other: The document whose memory is read in place of its own; from its start again where it ends.

    Returns:
        `tokens` and `seconds`; `bins`: sum and number of the scores in each bin; `spans`: the same by name of the span;
        `groups`: the same by name of the span and of the group; `points`: tokens read, bytes of the cache and of the
        process then.
    """
    ids = torch.from_numpy(document.ids[: plan.limit(arm, len(document.ids))])
    other_T = None if other is None else torch.from_numpy(other.ids)
    reader, next_point = arm_reader(model, arm, other_T=other_T), 0.0
    points: dict[str, list[int]] = {"tokens": [], "cache_bytes": [], "resident_bytes": []}
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    for chunk in ids.split(automatic_chunk(model)):
        with torch.autocast(device.type, torch.bfloat16, enabled=plan.precision == "bfloat16"):
            reader.prefill(chunk)
        if reader.tokens >= min(next_point, ids.numel()):
            next_point = reader.tokens + ids.numel() / _POINTS
            for name, value in zip(points, (reader.tokens, reader.cache_bytes, process_bytes(device))):
                points[name].append(value)
        on_progress(reader.tokens, f"{arm}, cache {reader.cache_bytes / 1e6:,.1f} MB")
    nll = reader.nll.double().numpy()
    spans, groups = plan.spans(len(document.ids)), groups[: len(nll)]
    return {
        "tokens": ids.numel(),
        "seconds": reader.seconds,
        "bins": _binned(nll, plan.bin_tokens),
        "spans": {name: _sum(nll[span]) for name, span in spans.items()},
        "groups": {name: _by_group(nll[span], groups[span]) for name, span in spans.items()},
        "points": points,
    }


def read_all(
    model: nn.Module,
    documents: Sequence[TokenDocument],
    groups: Sequence[NDArray[np.int8]],
    plan: PerplexityPlan,
    journal: Journal,
    on_progress: OnProgress = lambda *_: None,
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

    def job(document: TokenDocument, group: NDArray[np.int8], arm: str, other: TokenDocument | None = None) -> Job:
        return Job(
            key(document, arm, other is not None),
            lambda progress: measure(model, arm, document, group, plan, progress, other),
            plan.limit(arm, len(document.ids)),
        )

    # Full attention leaves the process larger than it found it, so it comes last.
    arms = sorted(plan.arms, key=lambda arm: arm == "full")
    jobs = [job(*pair, arm) for pair in zip(documents, groups, strict=True) for arm in arms]
    for document, group, other in zip(documents, groups, other_documents(documents), strict=True):
        jobs += [job(document, group, arm, other) for arm in plan.controlled]
    list(complete(jobs, journal, on_progress))


def other_documents(documents: Sequence[TokenDocument]) -> list[TokenDocument]:
    """For each document the one whose memory it is read with: half of all on, where it is seldom of the same book."""
    half = len(documents) // 2
    return [*documents[half:], *documents[:half]]


def _check_others(documents: Sequence[TokenDocument]) -> None:
    """Checks that each document has another one, with another text."""
    if len(documents) < 2:
        raise EvaluationError(
            "--other-text needs two documents at least. Name more texts, or cut them with --length and --pieces."
        )
    for document, other in zip(documents, other_documents(documents), strict=True):
        if np.array_equal(document.ids, other.ids):
            raise EvaluationError(
                f"{document.name} and {other.name} are the same text. Leave one out for --other-text."
            )


def key(document: TokenDocument, arm: str, has_other_memory: bool = False) -> str:
    """Name of a document's record in an arm, with its own memory or that of another text."""
    return f"{document.name} | {arm}" + (" | other text" if has_other_memory else "")


def process_bytes(device: torch.device) -> int:
    """Bytes that this process holds now: resident memory on a CPU, allocated tensors on a CUDA device.

    Where the system does not tell what is resident now (no /proc), it is the most that was resident so far; 0 where it
    tells nothing.

    Args:
        device: Where the model is.
    """
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        with open("/proc/self/statm", encoding="ascii") as pages:
            return int(pages.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return _peak_bytes()


def _peak_bytes() -> int:
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _sum(scores: NDArray[np.float64]) -> list[float]:
    return [float(scores.sum()), len(scores)]


def _by_group(nll: NDArray[np.float64], groups: NDArray[np.int8]) -> dict[str, list[float]]:
    return {name: _sum(nll[groups == number]) for number, name in enumerate(GROUPS)}


def _binned(nll: NDArray[np.float64], width: int) -> list[list[float]]:
    """Sum and number of the scores in each bin; the score of token `i` stands at position `i`, from 0."""
    positions = np.arange(1, len(nll) + 1) // width
    return [[float(total), int(number)] for total, number in zip(np.bincount(positions, nll), np.bincount(positions))]
