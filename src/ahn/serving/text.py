"""An answer's text as its tokens come: no half characters, and nothing of a stop sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ahn.generation import text_of


class GrowingText:
    """The text of tokens that come one by one.

    Args:
        tokenizer: The model's tokenizer.
        stop: Sequences of characters that end the text; they are not part of it.

    Attributes:
        has_stopped: Whether one of them came.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._ids: list[int] = []
        self._first = self._shown = 0  # tokens from `first` to `shown` are out and give the next ones their context
        self._pending = ""  # may be the beginning of a stop sequence
        self.has_stopped = False

    def add(self, token: int) -> str:
        """Takes in a token; the text that is certain now."""
        self._ids.append(token)
        now = text_of(self._tokenizer, self._ids[self._first :])
        if now.endswith("\ufffd"):
            return ""
        more = now[len(text_of(self._tokenizer, self._ids[self._first : self._shown])) :]
        if more:
            self._first, self._shown = self._shown, len(self._ids)
        return self._release(more)

    def end(self) -> str:
        """What was held back, once no token follows."""
        now = text_of(self._tokenizer, self._ids[self._first :])
        more = now[len(text_of(self._tokenizer, self._ids[self._first : self._shown])) :]
        self._first = self._shown = len(self._ids)
        released = self._release(more)
        rest, self._pending = "" if self.has_stopped else self._pending, ""
        return released + rest

    def _release(self, more: str) -> str:
        if self.has_stopped:
            return ""
        text = self._pending + more
        ends = [position for stop in self._stop if (position := text.find(stop)) >= 0]
        if ends:
            self.has_stopped, self._pending = True, ""
            return text[: min(ends)]
        overlap = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._pending = text[len(text) - overlap :]
        return text[: len(text) - overlap]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of a text with which a stop sequence may begin."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
