"""The work of the demo: several modes read the same text in step, on one model, and answer the same question."""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ahn
from ahn.attachment import attachment_of
from ahn.evaluation.arm_names import find_arm
from ahn.generation import Reader, automatic_chunk, cache_bytes, decode, full_cache_bytes, text_of
from ahn.models import prompts

if TYPE_CHECKING:
    from ahn.cli.loading import Loaded
    from ahn.cli.show import Screen

FULL_CACHE_LIMIT = 2e9
"""Bytes that full attention may fill."""

IN_A_HURRY = 4096
"""Tokens that full attention reads when the time is limited: it is the base model's way, shown for comparison. Where a
fact is hidden, all read so many: far from its end SmolLM2 does not find it in full attention either."""


@dataclass(frozen=True)
class Plan:
    """What to do.

    Attributes:
        modes: Names of the modes; `ahn+64` keeps so many anchors.
        limit: Most tokens to read, or `None` for all.
        deadline: Time of `time.monotonic()` after which nothing more is read, or `None`.
        answer_tokens: Most tokens of an answer.
    """

    modes: list[str]
    limit: int | None
    deadline: float | None
    answer_tokens: int


class Arm:
    """One mode at work.

    Attributes:
        mode: Its name.
        reader: What it has read.
        limit: Tokens that it reads at most.
        bytes: Bytes of its cache after the last piece.
        answer: What it answered.
    """

    def __init__(self, model: Any, mode: str, limit: int) -> None:
        self.model, self.mode, self.limit = model, mode, limit
        self.answer, self.bytes = "", 0
        with self.reading():
            self.reader = Reader(model)

    def reading(self) -> AbstractContextManager[None]:
        """The mode, for as long as a `with` block lasts."""
        arm = find_arm(self.mode)
        settings = arm.settings(0) if arm.added else {}
        return ahn.mode(self.model, arm.method, **settings)  # type: ignore[arg-type]

    def feed(self, ids: Any) -> None:
        """Reads on, up to the arm's limit."""
        ids = ids[: max(0, self.limit - self.reader.tokens)]
        if ids.numel():
            with self.reading():
                self.reader.feed(ids)
            self.bytes = cache_bytes(self.reader.cache)

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
    """Several arms on one text.

    Attributes:
        arms: The arms, in the order of the table.
        total: Tokens of the whole text, with the opening of the chat.
        limit: Tokens that are to be read at most.
        exact: Tokens up to which all modes read alike: sinks and window.
    """

    def __init__(self, loaded: Loaded, passage: prompts.Passage, plan: Plan) -> None:
        import torch

        self.loaded, self.passage, self.plan = loaded, passage, plan
        self.ids = torch.cat((passage.opening, passage.text))
        self.total = self.ids.numel()
        self.limit = min(self.total, plan.limit or self.total)
        self.exact = loaded.config.sinks + loaded.config.window
        self.full_limit = min(self.limit, self._full_limit())
        limits = {"full": self.full_limit}
        self.arms = [Arm(loaded.model, mode, limits.get(mode, self.limit)) for mode in plan.modes]

    def read(self, screen: Screen) -> None:
        """Reads chunk after chunk, every arm in turn, until all are done or the time is over."""
        size = automatic_chunk(self.loaded.model)
        for piece in self.ids[: self.limit].split(size):
            began = time.monotonic()
            for arm in self.arms:
                arm.feed(piece)
                screen.update(self)
            if all(arm.done for arm in self.arms) or self._late(began):
                return

    def answer(self) -> None:
        """Asks every arm the question."""
        stop = prompts.stop_ids(self.loaded.model, self.loaded.tokenizer)
        for arm in self.arms:
            with arm.reading():
                arm.reader.score = False
                arm.reader.feed(self.passage.closing)
                before = arm.reader.tokens
                ids = decode(arm.reader, self.plan.answer_tokens, stop)
                arm.answer = " ".join(text_of(self.loaded.tokenizer, list(ids)).split())
                if arm.reader.tokens - before >= self.plan.answer_tokens:
                    arm.answer += " ..."

    @property
    def read_tokens(self) -> int:
        """Tokens that the arm read which is furthest."""
        return max(arm.reader.tokens for arm in self.arms)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Numbers, from 1, of the first and last token of each column of perplexities.

        Every column is over tokens after sinks and window that all its arms have read: first up to where full
        attention stops, then what only the others read.
        """
        full = [arm.reader.tokens for arm in self.arms if arm.mode == "full"]
        others = [arm.reader.tokens for arm in self.arms if arm.mode != "full"]
        ends = sorted({min(full + others), min(others or full)})
        starts = [self.exact, *ends]
        return [(start + 1, end) for start, end in zip(starts, ends) if end > start]

    def _late(self, began: float) -> bool:
        """Whether another round would pass the deadline; what left the window is worth a few rounds in any case."""
        now = time.monotonic()
        slow = now + (now - began) > (self.plan.deadline or math.inf)
        return slow and self.read_tokens > self.exact + 1

    def _full_limit(self) -> int:
        """Tokens that full attention may read: its trained context, the question and answer included, or less."""
        trained = attachment_of(self.loaded.model).trained_context
        room = trained - self.passage.closing.numel() - self.plan.answer_tokens
        per_token = max(1, full_cache_bytes(self.loaded.model, 1))
        limit = max(1, min(room, int(FULL_CACHE_LIMIT / per_token)))
        return limit if self.plan.deadline is None else min(limit, IN_A_HURRY)


def run(loaded: Loaded, text: str, question: str, plan: Plan, screen: Screen, title: str, fact: str = "") -> None:
    """Reads, asks, and shows both on the screen; interrupted, it shows how far it came.

    Args:
        loaded: The model.
        text: What to read.
        question: What to ask at the end; empty for nothing.
        plan: What to do.
        screen: Where to show it.
        title: What the text is called.
        fact: A sentence that was hidden in the text near its beginning, or nothing.
    """
    chat = prompts.has_chat(loaded.tokenizer)
    comparison = Comparison(loaded, prompts.passage(loaded.tokenizer, text, question, chat), plan)
    screen.opening(comparison, title, fact)
    try:
        with screen.live(comparison):
            comparison.read(screen)
    finally:  # also when interrupted: the table so far
        screen.table(comparison)
    screen.remarks(comparison)
    if question.strip():
        gone = fact if comparison.read_tokens > 2 * comparison.exact else ""
        with screen.thinking():
            comparison.answer()
        screen.answers(comparison, question, gone)
