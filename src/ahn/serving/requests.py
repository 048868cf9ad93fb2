"""A request on its way through the engine, and the answers that are written for it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ahn.models.text import GrowingText
from ahn.serving.batch import Row
from ahn.serving.errors import RequestError
from ahn.serving.reading import PromptReading
from ahn.serving.sampling import Sampling
from ahn.serving.stream import AnswerStream, FinishReason, Increment, TokenChoice


@dataclass
class Generation:
    """A request for one or more answers to a prompt.

    Attributes:
        tokens: The prompt.
        limit: Most tokens of an answer.
        sampling: How its tokens are chosen.
        stop: Sequences of characters that end it.
        choices: Number of answers.
        root: The document that the prompt follows; empty without one.
        marks: Numbers of tokens after which a conversation can come back to the prompt.
        echo: Whether it is told how likely each token of the prompt was.
        seconds: Time that it may take.
        stream: Where the answers go.
        cancelled: Whether nobody waits for it any more.
        cached_tokens: Tokens of the prompt that had been read before.
        token_choices: How likely each token of the prompt was, where that was asked for.
        written: Tokens of all answers.
    """

    tokens: list[int]
    limit: int
    sampling: Sampling
    stop: Sequence[str] = ()
    choices: int = 1
    root: str = ""
    marks: Sequence[int] = ()
    echo: bool = False
    seconds: float = 600.0
    stream: AnswerStream = field(default_factory=AnswerStream)
    cancelled: bool = False
    cached_tokens: int = 0
    token_choices: list[TokenChoice] = field(default_factory=list)
    written: int = 0
    begun: float = field(default_factory=time.monotonic)

    @property
    def is_late(self) -> bool:
        """Whether its time is over."""
        return time.monotonic() - self.begun > self.seconds

    def fail(self, error: Exception) -> None:
        """Ends it with an error."""
        self.cancelled = True
        self.stream.put(error)


class Choice:
    """One answer that is being written.

    Args:
        generation: The request.
        number: Which of its answers it is.
        row: Its cache.
        tokenizer: The model's tokenizer.
        ends: Tokens that end an answer.

    Attributes:
        tokens: What it has written so far, as far as the cache has read it or is about to.
        count: Number of all tokens that it has written.
    """

    def __init__(self, generation: Generation, number: int, row: Row, tokenizer: Any, ends: set[int]) -> None:
        self.generation = generation
        self.number = number
        self.row = row
        self.tokens: list[int] = []
        self.count = 0
        self._ends = ends
        self._text = GrowingText(tokenizer, generation.stop)
        self._random = generation.sampling.generator(number)

    @property
    def is_waiting(self) -> bool:
        """Whether its reader has to catch up first."""
        return self.generation.stream.is_full

    def advance(self) -> int | None:
        """Chooses the next token and sends what it adds; `None` where the answer ends."""
        generation, logits = self.generation, self.row.logits
        token = generation.sampling.choose(logits, self._random) if generation.limit else None
        if token is None or token in self._ends:
            self._finish("length" if token is None else "stop")
            return None
        token_choices = generation.sampling.token_choices(token, logits)
        self.count += 1
        generation.written += 1
        text = self._text.add(token)
        if self._text.has_stopped or self.count == generation.limit:
            self._finish("length", token_choices, text)
            return None
        self.tokens.append(token)
        if text or token_choices:
            generation.stream.put(Increment(self.number, text, token_choices))
        return token

    def _finish(self, why: FinishReason, token_choices: tuple[TokenChoice, ...] = (), text: str = "") -> None:
        rest = self._text.end()
        why = "stop" if self._text.has_stopped else why
        self.generation.stream.put(Increment(self.number, text + rest, token_choices, why))


class PromptJob:
    """A request whose prompt is being read.

    Args:
        generation: The request.
        reading: The reading.
    """

    def __init__(self, generation: Generation, reading: PromptReading) -> None:
        self.generation = generation
        self.reading = reading

    @property
    def is_cancelled(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.generation.cancelled

    def fail(self, error: Exception) -> None:
        """Ends it with an error."""
        self.generation.fail(error)

    def noted(self, tokens: int) -> None:
        """Notes what was read."""
        self.generation.cached_tokens = self.reading.cached
        self.generation.token_choices = self.reading.token_choices

    def rows(self) -> list[Row]:
        """The caches of its answers, once the prompt is read."""
        logits = self.reading.logits
        if logits is None:
            raise RequestError("the prompt has no token; send one at least", param="prompt")
        cache = self.reading.cache
        forks = [cache.fork() for _ in range(self.generation.choices - 1)]
        return [Row(each, logits) for each in (cache, *forks)]
