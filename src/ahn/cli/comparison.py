"""The work of the demo: several modes read the same text in step, on one model, and answer the same question."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ahn.attachment import attachment_of
from ahn.evaluation.arms import arm_reader
from ahn.generation import automatic_chunk, full_cache_bytes
from ahn.models import prompts

if TYPE_CHECKING:
    from ahn.cli.loading import Loaded

FULL_CACHE_LIMIT = 2e9
"""Bytes that full attention may fill."""

IN_A_HURRY = 4096
"""Tokens that full attention reads when the time is limited: it is the base model's way, shown for comparison. Where a
fact is hidden, all modes read no more: far from its end SmolLM2 does not find it in full attention either."""


@dataclass(frozen=True)
class ReadingLimits:
    """How much is read and written.

    Attributes:
        tokens: Most tokens to read, or `None` for all.
        deadline: Time of `time.monotonic()` after which nothing more is read, or `None`.
        answer_tokens: Most tokens of an answer.
    """

    tokens: int | None
    deadline: float | None
    answer_tokens: int


class ComparedMode:
    """One mode at work.

    Args:
        model: A model with a memory attached.
        name: Name of the mode; `ahn+64` keeps 64 anchors.
        limit: Tokens that it reads at most.

    Attributes:
        reader: What it has read.
        answer: What it answered.
    """

    def __init__(self, model: Any, name: str, limit: int) -> None:
        self.model, self.name, self.limit, self.answer = model, name, limit, ""
        self.reader = arm_reader(model, name)

    def prefill(self, ids: torch.Tensor) -> None:
        """Reads on, up to the mode's limit."""
        ids = ids[: max(0, self.limit - self.reader.tokens)]
        if ids.numel():
            self.reader.prefill(ids)

    @property
    def done(self) -> bool:
        """Whether it has read all that it may."""
        return self.reader.tokens >= self.limit

    @property
    def full_bytes(self) -> int:
        """Bytes that full attention would hold here."""
        return full_cache_bytes(self.model, self.reader.tokens)

    def perplexity(self, first: int, last: int) -> float | None:
        """Perplexity of the tokens number `first` to `last`, counted from 1; `None` if it has not read them all."""
        nll = self.reader.nll[first - 2 : last - 1]
        return math.exp(float(nll.double().mean())) if last >= first > 1 and nll.numel() == last - first + 1 else None


class Comparison:
    """Several modes on one text.

    Args:
        loaded: The model.
        passage: What is read, and what is asked at the end.
        names: Names of the modes.
        limits: How much is read and written.

    Attributes:
        modes: The modes, in the order of the table.
        total: Tokens of the whole text, with the opening of the chat.
        limit: Tokens that are to be read at most.
        exact: Tokens up to which all modes read alike: sinks and window.
    """

    def __init__(self, loaded: Loaded, passage: prompts.Passage, names: list[str], limits: ReadingLimits) -> None:
        self.loaded, self.passage, self.limits = loaded, passage, limits
        self.ids = torch.cat((passage.opening, passage.text))
        self.total = self.ids.numel()
        self.limit = min(self.total, limits.tokens or self.total)
        self.exact = loaded.config.sinks + loaded.config.window
        full = min(self.limit, self._full_limit())
        self.modes = [ComparedMode(loaded.model, name, full if name == "full" else self.limit) for name in names]

    def read(self, on_chunk: Callable[[], None]) -> None:
        """Reads chunk after chunk, every mode in turn, until all are done or the time is over.

        Args:
            on_chunk: Called whenever a mode has read a chunk.
        """
        for chunk in self.ids[: self.limit].split(automatic_chunk(self.loaded.model)):
            began = time.monotonic()
            for mode in self.modes:
                mode.prefill(chunk)
                on_chunk()
            if all(mode.done for mode in self.modes) or self._late(began):
                return

    def answer(self) -> None:
        """Asks every mode the question."""
        stop = prompts.stop_ids(self.loaded.model, self.loaded.tokenizer)
        for mode in self.modes:
            mode.reader.prefill(self.passage.closing)
            before = mode.reader.tokens
            text = mode.reader.answer(self.loaded.tokenizer, self.limits.answer_tokens, stop)
            is_cut = mode.reader.tokens - before >= self.limits.answer_tokens
            mode.answer = " ".join(text.split()) + (" ..." if is_cut else "")

    @property
    def read_tokens(self) -> int:
        """Tokens that the mode read which is furthest."""
        return max(mode.reader.tokens for mode in self.modes)

    @property
    def full(self) -> ComparedMode | None:
        """Full attention, if it is compared."""
        return next((mode for mode in self.modes if mode.name == "full"), None)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Numbers, from 1, of the first and last token of each column of perplexities.

        Every column is over tokens after sinks and window that all its modes have read: first up to where full
        attention stops, then what only the others read.
        """
        full = [mode.reader.tokens for mode in self.modes if mode.name == "full"]
        others = [mode.reader.tokens for mode in self.modes if mode.name != "full"]
        ends = sorted({min(full + others), min(others or full)})
        starts = [self.exact, *ends]
        return [(start + 1, end) for start, end in zip(starts, ends) if end > start]

    def _late(self, began: float) -> bool:
        """Whether another round would pass the deadline; what left the window is worth a few rounds in any case."""
        now = time.monotonic()
        slow = now + (now - began) > (self.limits.deadline or math.inf)
        return slow and self.read_tokens > self.exact + 1

    def _full_limit(self) -> int:
        """Tokens that full attention may read: its trained context, the question and answer included, or less."""
        trained = attachment_of(self.loaded.model).trained_context
        room = trained - self.passage.closing.numel() - self.limits.answer_tokens
        per_token = max(1, full_cache_bytes(self.loaded.model, 1))
        limit = max(1, min(room, int(FULL_CACHE_LIMIT / per_token)))
        return limit if self.limits.deadline is None else min(limit, IN_A_HURRY)
