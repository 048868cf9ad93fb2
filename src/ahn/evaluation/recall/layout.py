"""One text of sentences and needles: filled up to a length, and needles moved until each is in one span.

A needle is among the sinks, in the window, or evicted when it is asked for.
"""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ahn.evaluation.recall.tasks import Needle

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EVICTED = "evicted"
LABELS = ("sinks", "window", EVICTED)
"""Spans of a text, in the order of tables; the last one is the hardest to reach."""

_LONGEST = 400  # characters of a sentence; what goes on for longer is cut between words
_SHORTEST = 3  # tokens of a sentence
_ROUNDS = 6
_LOOK_AHEAD = 80  # sentences among which the last one is chosen, so that the text gets the wanted length
_FURTHEST = 60  # sentences by which a needle may be moved
# After the end of a sentence with its quotes and brackets, after an empty line, and after a full stop of Chinese.
_ENDS = re.compile(r"(?<=[.!?])[\"'”’)\]]*\s+|\n\s*\n\s*|[。！？]+[”’」』）]*\s*")


def sentences(text: str) -> list[str]:
    """A text in sentences that join to the whole, each with the white space after it.

    Args:
        text: Any text. A sentence of more than 400 characters is cut between words, or anywhere if it has none.
    """
    ends = [match.end() for match in _ENDS.finditer(text)]
    parts = (text[start:stop] for start, stop in zip([0, *ends], [*ends, len(text)]))
    return [short for part in parts for short in _shortened(part) if short.strip()]


def _shortened(sentence: str) -> Iterator[str]:
    while len(sentence) > _LONGEST:
        cut = sentence.rfind(" ", 1, _LONGEST) + 1 or _LONGEST
        yield sentence[:cut]
        sentence = sentence[cut:]
    yield sentence


class Exact(NamedTuple):
    """What sinks and window hold exactly while a question is read and answered.

    Attributes:
        sinks: Number of sinks.
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

    def label(self, start: int, stop: int) -> str | None:
        """The span of the tokens `start` to `stop` (not included), or `None` for those that straddle two.

        A needle is in the window if it stays there until the answer ends, and evicted if it was gone when the question
        began: in between, the question's own tokens could carry it on.
        """
        if stop <= self.sinks:
            return "sinks"
        if max(start, self.sinks) >= self.window_begins:
            return "window"
        return EVICTED if start >= self.sinks and stop <= max(0, self.question - self.window) else None


class Layout:
    """Sentences with needles between them.

    Args:
        needles: The needles.
        tokenizer: The model's tokenizer.
        count: Counts the tokens of a text.

    Attributes:
        ids: Token ids.
        spans: First token of each needle and the one after its last.
    """

    def __init__(
        self, needles: Sequence[Needle], tokenizer: PreTrainedTokenizerBase, count: Callable[[str], int]
    ) -> None:
        self.needles, self.tokenizer, self.count = needles, tokenizer, count
        self._sentences: list[str] = []
        self._put(self._slots_by_depth())

    def fill(self, filler: Iterator[str], room: int) -> None:
        """Takes sentences until the text has as many tokens as there is room for, or a few less.

        Args:
            filler: The sentences; they are used up as far as they are needed.
            room: Tokens of the whole text.
        """
        for _ in range(_ROUNDS):  # joined, sentences take other numbers of tokens than alone
            more = self._fitting(filler, room - len(self.ids))
            self._sentences += more
            self._put(self._slots_by_depth())
            while len(self.ids) > room and self._sentences:
                self._sentences.pop()
                self._put(self._slots_by_depth())
            if not more or room - len(self.ids) < _SHORTEST:
                break

    def settle(self, wanted: set[int], clear: Callable[[tuple[int, int]], bool]) -> int:
        """Moves needles that straddle two spans to the nearest place where they do not.

        Args:
            wanted: Indices of the needles that matter.
            clear: Whether a needle may have these tokens.

        Returns:
            How many were moved; for others there may be no such place.
        """
        moved: set[int] = set()
        hopeless: set[int] = set()
        for _ in range(2 * len(wanted)):  # a needle that moves may push another one
            unclear = sorted(index for index in wanted - hopeless if not clear(self.spans[index]))
            if not unclear:
                break
            (moved if self._move(unclear[0], clear) else hopeless).add(unclear[0])
        return len(moved)

    def _move(self, index: int, clear: Callable[[tuple[int, int]], bool]) -> bool:
        before = self._slots
        distances = (sign * distance for distance in range(1, _FURTHEST + 1) for sign in (-1, 1))
        for slot in (before[index] + distance for distance in distances):
            if 0 <= slot <= len(self._sentences):
                self._put([*before[:index], slot, *before[index + 1 :]])
                if clear(self.spans[index]):
                    return True
        self._put(before)
        return False

    def _fitting(self, filler: Iterator[str], room: int) -> list[str]:
        """As many sentences as fit into the room, the last one chosen so that little of it stays empty."""
        chosen: list[str] = []
        for sentence in filler:
            if (tokens := self.count(sentence)) > room:
                rest = [sentence, *itertools.islice(filler, _LOOK_AHEAD)]
                return [*chosen, *sorted((each for each in rest if self.count(each) <= room), key=self.count)[-1:]]
            chosen.append(sentence)
            room -= tokens
        return chosen

    def _slots_by_depth(self) -> list[int]:
        """Before which sentence each needle belongs."""
        starts = [0, *itertools.accumulate(map(self.count, self._sentences))]
        slots = range(len(starts))
        return [min(slots, key=lambda slot: abs(starts[slot] - needle.depth * starts[-1])) for needle in self.needles]

    def _put(self, slots: list[int]) -> None:
        """Lays all out as one text, each needle before the sentence of its slot."""
        self._slots = slots
        order = sorted(range(len(slots)), key=lambda index: slots[index])
        text, last, marks = "", 0, [(0, 0)] * len(slots)
        for index in order:
            text += "".join(self._sentences[last : slots[index]])
            text += "" if not text or text[-1].isspace() else " "
            marks[index] = len(text), len(text) + len(self.needles[index].text)
            text += self.needles[index].text + " "
            last = slots[index]
        text += "".join(self._sentences[last:])
        encoded = self.tokenizer(text.rstrip(), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        self.ids: list[int] = list(encoded["input_ids"])
        starts, stops = ([offset[side] for offset in encoded["offset_mapping"]] for side in (0, 1))
        self.spans = [(bisect.bisect_right(stops, first), bisect.bisect_left(starts, end)) for first, end in marks]
