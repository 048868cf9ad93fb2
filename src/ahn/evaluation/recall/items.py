"""From a sheet to tokens: a context of the wanted length with needles at their depths, and the questions about it."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ahn import prompts
from ahn.evaluation.errors import EvaluationError
from ahn.evaluation.recall.spans import Exact, joined
from ahn.evaluation.recall.tasks import Ask, Question, Sheet, Wanted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LOOK_AHEAD = 80  # sentences among which the last one is chosen, so that the context gets the wanted length
_ROUNDS = 6
_SHORTEST = 3  # tokens of a sentence
_MISSING = 0.05  # share of a length that a haystack may be too short by
_ROOM = 8  # tokens that an answer may take besides its values
_ROOM_PER_VALUE = 6
_FURTHEST = 60  # sentences by which a needle may be moved


@dataclasses.dataclass(frozen=True)
class Target:
    """A value that an answer must hold.

    Attributes:
        value: The value.
        label: Span of its needles, of `LABELS`; `None` if they straddle two wherever they are put, so that it counts
            for nothing.
        depth: Where its first needle is in the text: 0 is the beginning, 1 the end.
        closing: Token ids of what asks for it when it is ranked, up to the end of the cue.
        candidates: Token ids of the values that are ranked, the right one first.
    """

    value: str
    label: str | None
    depth: float
    closing: tuple[int, ...]
    candidates: tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question that is answered in the model's own words.

    Attributes:
        closing: Token ids of the question, up to the end of the answer's cue.
        limit: Most tokens of the answer.
        targets: The values that it must hold.
    """

    closing: tuple[int, ...]
    limit: int
    targets: tuple[Target, ...]


@dataclasses.dataclass(frozen=True)
class Item:
    """One context and the questions about it, each asked of a model that has read the context and nothing else.

    Attributes:
        context: Token ids of the chat's opening and the text.
        asks: The questions.
        exact: What sinks and window hold when the questions are answered.
        window_begins: Depth in the text at which the window begins; 0 or less if all of it is in the window.
        moved: Needles that straddled two spans and were moved.
    """

    context: tuple[int, ...]
    asks: tuple[Asked, ...]
    exact: Exact
    window_begins: float
    moved: int

    @property
    def tokens(self) -> int:
        """Tokens of the longest prompt, without the answer."""
        return len(self.context) + max(len(ask.closing) for ask in self.asks)

    @property
    def dropped(self) -> int:
        """Values that count for nothing, because their needles straddle two spans wherever they are put."""
        return sum(target.label is None for ask in self.asks for target in ask.targets)


@dataclasses.dataclass
class _Layout:
    """Sentences and needles as one text, and where the needles are in it: token indices within the text."""

    ids: list[int]
    spans: list[tuple[int, int]]


class Builder:
    """Makes items for one model.

    Args:
        tokenizer: The model's tokenizer; its chat template is used if it has one.
        window: Tokens of the window, for the labels.
        sinks: Number of sinks, likewise.

    Raises:
        EvaluationError: The tokenizer cannot tell which characters a token stands for.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, window: int, sinks: int) -> None:
        if not tokenizer.is_fast:
            raise EvaluationError("recall needs a tokenizer with a tokenizer.json. Convert it, or take another.")
        self.tokenizer, self.window, self.sinks = tokenizer, window, sinks
        self.chat = prompts.has_chat(tokenizer)
        self._counts: dict[str, int] = {}
        self.opening = self._passage(Question("", "")).opening.tolist()

    def item(self, sheet: Sheet, hay: Iterator[str], length: int) -> Item:
        """One context with its questions.

        Args:
            sheet: Needles and questions.
            hay: Sentences to hide the needles among.
            length: Tokens of the whole prompt, the question and the answer's cue included; it has as many, or a few
                less.

        Raises:
            EvaluationError: The needles do not fit into the length, or the hay is too short for it.
        """
        closings = {ask: self._closing(ask.question) for ask in sheet.asks}
        limits = {ask: self._limit(ask) for ask in sheet.asks}
        room = length - len(self.opening) - max(map(len, closings.values()))
        pieces, layout, slots = self._filled(sheet, hay, room, length)
        question = len(self.opening) + len(layout.ids)
        end = question + max(len(closings[ask]) + limits[ask] for ask in sheet.asks)
        exact = Exact(self.sinks, self.window, question, end)
        asked = {index for ask in sheet.asks for wanted in ask.wanted for index in wanted.needles}
        layout, moved = self._settled(sheet, pieces, layout, slots, asked, exact)
        # Tokens at the joints may differ by a few after a needle has moved.
        shift = len(self.opening) + len(layout.ids) - question
        exact = dataclasses.replace(exact, question=question + shift, end=end + shift)
        asks = (
            Asked(closings[ask], limits[ask], tuple(self._target(wanted, layout, exact) for wanted in ask.wanted))
            for ask in sheet.asks
        )
        begins = (exact.window_begins - len(self.opening)) / len(layout.ids)
        return Item((*self.opening, *layout.ids), tuple(asks), exact, begins, moved)

    def fits(self, sheet: Sheet, length: int) -> bool:
        """Whether the needles and questions of a sheet fit into a length, with half as much text around them."""
        needles = sum(self._count(needle.text + " ") for needle in sheet.needles)
        closing = max(len(self._closing(ask.question)) for ask in sheet.asks)
        return 1.5 * needles <= length - len(self.opening) - closing

    def _filled(self, sheet: Sheet, hay: Iterator[str], room: int, length: int) -> tuple[list[str], _Layout, list[int]]:
        """Sentences that fill the room beside the needles, all of them laid out, and the slots of the needles."""
        needles = sum(self._count(needle.text + " ") for needle in sheet.needles)
        if room <= needles:
            raise EvaluationError(
                f"{len(sheet.needles)} needle{'' if len(sheet.needles) == 1 else 's'} and the question take "
                f"{length - room + needles:,} tokens, more than a length of {length:,} has room for. Give a longer one."
            )
        source, pieces, spare = sheet.hay or hay, [], room - needles
        for _ in range(_ROUNDS):  # joined, sentences take other numbers of tokens than alone
            more = self._sentences(source, spare)
            pieces += more
            layout, slots = self._laid_out(sheet, pieces)
            while len(layout.ids) > room and pieces:
                pieces.pop()
                layout, slots = self._laid_out(sheet, pieces)
            spare = room - len(layout.ids)
            if not more or spare < _SHORTEST:
                break
        if spare > length * _MISSING and next(source, None) is None:
            raise EvaluationError(
                f"the haystack has {len(layout.ids) - needles:,} tokens, too few for a length of {length:,}. Give a "
                "longer text, or shorter --lengths."
            )
        return pieces, layout, slots

    def _sentences(self, hay: Iterator[str], room: int) -> list[str]:
        """As many sentences as fit into the room, the last one chosen so that little of it stays empty."""
        pieces: list[str] = []
        for piece in hay:
            if (count := self._count(piece)) > room:
                rest = [piece, *itertools.islice(hay, _LOOK_AHEAD)]
                fitting = [each for each in rest if self._count(each) <= room]
                return [*pieces, *sorted(fitting, key=self._count)[-1:]]
            pieces.append(piece)
            room -= count
        return pieces

    def _slots(self, sheet: Sheet, pieces: Sequence[str]) -> list[int]:
        """Before which sentence each needle belongs, by its depth."""
        starts = [0, *itertools.accumulate(map(self._count, pieces))]
        return [
            min(range(len(starts)), key=lambda slot: abs(starts[slot] - needle.depth * starts[-1]))
            for needle in sheet.needles
        ]

    def _laid_out(self, sheet: Sheet, pieces: Sequence[str]) -> tuple[_Layout, list[int]]:
        """All as one text, each needle in the slot of its depth."""
        slots = self._slots(sheet, pieces)
        return self._with_slots(sheet, pieces, slots), slots

    def _with_slots(self, sheet: Sheet, pieces: Sequence[str], slots: Sequence[int]) -> _Layout:
        before: dict[int, list[int]] = {}
        for index, slot in enumerate(slots):
            before.setdefault(slot, []).append(index)
        text, marks = "", [(0, 0)] * len(slots)
        for slot in range(len(pieces) + 1):
            for index in before.get(slot, ()):
                if text and not text[-1].isspace():
                    text += " "
                marks[index] = len(text), len(text) + len(sheet.needles[index].text)
                text += sheet.needles[index].text + " "
            text += pieces[slot] if slot < len(pieces) else ""
        encoded = self.tokenizer(text.rstrip(), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        spans = _token_spans(encoded["offset_mapping"], marks)
        return _Layout(list(encoded["input_ids"]), spans)

    def _settled(
        self,
        sheet: Sheet,
        pieces: Sequence[str],
        layout: _Layout,
        slots: list[int],
        asked: set[int],
        exact: Exact,
    ) -> tuple[_Layout, int]:
        """Moves needles that are asked for and straddle two spans to the nearest place where they do not."""
        moved: set[int] = set()
        hopeless: set[int] = set()
        for _ in range(2 * len(asked)):  # a needle that moves may push another one
            straddling = sorted(i for i in asked - hopeless if self._label(layout, i, exact) is None)
            if not straddling:
                break
            index, tried = straddling[0], list(slots)
            for slot in _nearest(slots[index], len(pieces)):
                tried[index] = slot
                other = self._with_slots(sheet, pieces, tried)
                if self._label(other, index, exact) is not None:
                    layout, slots = other, tried
                    moved.add(index)
                    break
            else:
                hopeless.add(index)
        return layout, len(moved)

    def _target(self, wanted: Wanted, layout: _Layout, exact: Exact) -> Target:
        cue = wanted.question.cue
        skip = self._count(cue)
        candidates = (
            tuple(prompts.tokens(self.tokenizer, f"{cue} {value}").tolist()[skip:])
            for value in (wanted.value, *wanted.others)
        )
        start, stop = min(layout.spans[index] for index in wanted.needles)
        depth = start / max(1, len(layout.ids) - (stop - start))
        label = joined(self._label(layout, index, exact) for index in wanted.needles)
        return Target(wanted.value, label, min(1.0, depth), self._closing(wanted.question), tuple(candidates))

    def _label(self, layout: _Layout, index: int, exact: Exact) -> str | None:
        start, stop = (len(self.opening) + place for place in layout.spans[index])
        return exact.label(start, stop)

    def _closing(self, question: Question) -> tuple[int, ...]:
        cue = question.cue if self.chat else f"\n{question.cue}"
        return (*self._passage(question).closing.tolist(), *prompts.tokens(self.tokenizer, cue).tolist())

    def _passage(self, question: Question) -> prompts.Passage:
        return prompts.passage(self.tokenizer, "-", question.text, self.chat)  # the text itself is laid out here

    def _limit(self, ask: Ask) -> int:
        return _ROOM + sum(self._count(f" {wanted.value}") + _ROOM_PER_VALUE for wanted in ask.wanted)

    def _count(self, text: str) -> int:
        if text not in self._counts:
            self._counts[text] = len(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        return self._counts[text]


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
