"""Where a needle is when it is asked for: among the sinks, in the window, or evicted."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

EVICTED = "evicted"
LABELS = ("sinks", "window", EVICTED)
"""Spans of a text, in the order of tables."""


@dataclasses.dataclass(frozen=True)
class Exact:
    """What sinks and window hold exactly while a question is read and answered.

    Attributes:
        sinks: First tokens that are kept for ever.
        window: Tokens that a query sees behind it, itself among them.
        question: Index of the first token of the question.
        end: Index after the last token that the answer may have.
    """

    sinks: int
    window: int
    question: int
    end: int

    @property
    def window_begins(self) -> int:
        """Index of the first token that is in the window from the question to the end of the answer."""
        return max(0, self.end - self.window)

    @property
    def evicted_before(self) -> int:
        """Index of the first token that is still among the last of a window when the question begins."""
        return max(0, self.question - self.window)

    def label(self, start: int, stop: int) -> str | None:
        """The span of the tokens `start` to `stop` (not included), or `None` for those that straddle two.

        A needle is in the window if it stays there until the answer ends, and evicted if it was gone when the question
        began: in between, the question's own tokens could carry it on.
        """
        if stop <= self.sinks:
            return "sinks"
        if max(start, self.sinks) >= self.window_begins:
            return "window"
        return "evicted" if start >= self.sinks and stop <= self.evicted_before else None


def joined(labels: Iterable[str | None]) -> str | None:
    """The span of a value that takes several needles to know: the one that is hardest to reach.

    Args:
        labels: The needles' own.

    Returns:
        `None` if one of them straddles.
    """
    found = list(labels)
    return None if None in found else max((label for label in found if label), key=LABELS.index)
