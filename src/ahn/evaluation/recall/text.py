"""One text of sentences and needles: filled up to a length, and needles moved until each is in one span."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from ahn.evaluation.recall.sheets import Needle

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LOOK_AHEAD = 80  # sentences among which the last one is chosen, so that the text gets the wanted length
_ROUNDS = 6
_SHORTEST = 3  # tokens of a sentence
_FURTHEST = 60  # sentences by which a needle may be moved


class Counter:
    """Counts tokens, each text once.

    Args:
        tokenizer: The model's tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._known: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        """Tokens of a text alone."""
        if text not in self._known:
            self._known[text] = len(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        return self._known[text]


class Text:
    """Sentences with needles between them.

    Args:
        needles: The needles.
        count: Counts tokens with the model's tokenizer.

    Attributes:
        ids: Token ids.
        spans: First token of each needle and the one after its last.
    """

    def __init__(self, needles: Sequence[Needle], count: Counter) -> None:
        self.needles, self.count = needles, count
        self._pieces: list[str] = []
        self._put(self._by_depth())

    def fill(self, hay: Iterator[str], room: int) -> None:
        """Takes sentences until the text has as many tokens as there is room for, or a few less.

        Args:
            hay: The sentences; they are used up as far as they are needed.
            room: Tokens of the whole text.
        """
        for _ in range(_ROUNDS):  # joined, sentences take other numbers of tokens than alone
            more = self._fitting(hay, room - len(self.ids))
            self._pieces += more
            self._put(self._by_depth())
            while len(self.ids) > room and self._pieces:
                self._pieces.pop()
                self._put(self._by_depth())
            if not more or room - len(self.ids) < _SHORTEST:
                break

    def settle(self, asked: set[int], clear: Callable[[tuple[int, int]], bool]) -> int:
        """Moves needles whose tokens are not clear of the border of two spans to the nearest place where they are.

        Args:
            asked: Indices of the needles that matter.
            clear: Whether a needle may have these tokens.

        Returns:
            How many were moved; for others there may be no such place.
        """
        moved: set[int] = set()
        hopeless: set[int] = set()
        for _ in range(2 * len(asked)):  # a needle that moves may push another one
            unclear = sorted(index for index in asked - hopeless if not clear(self.spans[index]))
            if not unclear:
                break
            if self._move(unclear[0], clear):
                moved.add(unclear[0])
            else:
                hopeless.add(unclear[0])
        return len(moved)

    def _move(self, index: int, clear: Callable[[tuple[int, int]], bool]) -> bool:
        before = list(self._slots)
        for slot in _nearest(before[index], len(self._pieces)):
            self._put([*before[:index], slot, *before[index + 1 :]])
            if clear(self.spans[index]):
                return True
        self._put(before)
        return False

    def _fitting(self, hay: Iterator[str], room: int) -> list[str]:
        """As many sentences as fit into the room, the last one chosen so that little of it stays empty."""
        pieces: list[str] = []
        for piece in hay:
            if (tokens := self.count(piece)) > room:
                rest = [piece, *itertools.islice(hay, _LOOK_AHEAD)]
                return [*pieces, *sorted((each for each in rest if self.count(each) <= room), key=self.count)[-1:]]
            pieces.append(piece)
            room -= tokens
        return pieces

    def _by_depth(self) -> list[int]:
        """Before which sentence each needle belongs."""
        starts = [0, *itertools.accumulate(map(self.count, self._pieces))]
        slots = range(len(starts))
        return [min(slots, key=lambda slot: abs(starts[slot] - needle.depth * starts[-1])) for needle in self.needles]

    def _put(self, slots: list[int]) -> None:
        """Lays all out as one text, each needle before the sentence of its slot."""
        self._slots = slots
        before: dict[int, list[int]] = {}
        for index, slot in enumerate(slots):
            before.setdefault(slot, []).append(index)
        text, marks = "", [(0, 0)] * len(slots)
        for slot in range(len(self._pieces) + 1):
            for index in before.get(slot, ()):
                text += "" if not text or text[-1].isspace() else " "
                marks[index] = len(text), len(text) + len(self.needles[index].text)
                text += self.needles[index].text + " "
            text += self._pieces[slot] if slot < len(self._pieces) else ""
        encoded = self.count.tokenizer(
            text.rstrip(), add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        self.ids: list[int] = list(encoded["input_ids"])
        self.spans = _token_spans(encoded["offset_mapping"], marks)


def _token_spans(offsets: Sequence[tuple[int, int]], marks: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """First token and the one after the last that touch each range of characters."""
    starts, stops = [start for start, _ in offsets], [stop for _, stop in offsets]
    return [(bisect.bisect_right(stops, first), bisect.bisect_left(starts, last)) for first, last in marks]


def _nearest(slot: int, last: int) -> Iterator[int]:
    """Other slots from 0 to `last`, the nearest first."""
    for distance in range(1, _FURTHEST + 1):
        for other in (slot - distance, slot + distance):
            if 0 <= other <= last:
                yield other
