"""The texts of a run as tokens, each made anew from the seed and its name: filled up to a length, needles in spans."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from ahn.evaluation.errors import EvaluationError
from ahn.evaluation.recall.tasks import EVICTED, LABELS, TASKS, Facts, Needle, Question, RecallSettings, Spec, Value
from ahn.models import prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHORTEST = 3  # tokens of a sentence
_ROUNDS = 6
_LOOK_AHEAD = 80  # sentences among which the last one is chosen, so that the text gets the wanted length
_FURTHEST = 60  # sentences by which a needle may be moved
_MISSING = 0.05  # share of a length that a haystack may be too short by
_ROOM = 8  # tokens that an answer may take besides its values
_ROOM_PER_VALUE = 6


def _span_label(start: int, stop: int, sinks: int, window: int, question: int, end: int) -> str | None:
    """The span of a needle, tokens `start` to `stop`, when it is asked for; `None` if it straddles two.

    It is in the window if it stays there until the answer ends, and evicted if it was gone when the question began. In
    between, the question's own tokens could carry it on.
    """
    if stop <= sinks:
        return "sinks"
    if max(start, sinks) >= end - window:
        return "window"
    return EVICTED if start >= sinks and stop <= question - window else None


class _Layout:
    """Sentences with needles between them, as token ids and the first and last of each needle's tokens."""

    def __init__(
        self, needles: Sequence[Needle], tokenizer: PreTrainedTokenizerBase, count: Callable[[str], int]
    ) -> None:
        self.needles, self.tokenizer, self.count = needles, tokenizer, count
        self._sentences: list[str] = []
        self._put(self._slots_by_depth())

    def fill(self, filler: Iterator[str], room: int) -> None:
        """Takes sentences until the text has as many tokens as there is room for, or a few less."""
        for _ in range(_ROUNDS):  # joined, sentences take other numbers of tokens than alone
            more = self._fitting(filler, room - len(self.ids))
            self._sentences += more
            self._put(self._slots_by_depth())
            while len(self.ids) > room and self._sentences:
                self._sentences.pop()
                self._put(self._slots_by_depth())
            if not more or room - len(self.ids) < _SHORTEST:
                break

    def settle(self, asked_for: set[int], clear: Callable[[tuple[int, int]], bool]) -> int:
        """Moves wanted needles that are not clear of two spans to the nearest place where they are; how many moved."""
        moved: set[int] = set()
        hopeless: set[int] = set()
        for _ in range(2 * len(asked_for)):  # a needle that moves may push another one
            unclear = sorted(index for index in asked_for - hopeless if not clear(self.spans[index]))
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
        starts, stops = ([offset[end] for offset in encoded["offset_mapping"]] for end in (0, 1))
        self.spans = [(bisect.bisect_right(stops, first), bisect.bisect_left(starts, end)) for first, end in marks]


@dataclasses.dataclass(frozen=True)
class RecallItem:
    """One text in tokens.

    Attributes:
        context: Token ids of the chat's opening and the text.
        labels: Span of the needles of each value; `None`, which counts for nothing, if they straddle two everywhere.
        depths: Where the first needle of each value is in the text: 0 is the beginning, 1 the end.
        needles: Tokens of the needles that are asked for, places in `context`.
        window_begins: Depth in the text at which the window begins; 0 or less if all of it is in the window.
        moved: Needles that straddled two spans and were moved.
        tokens: Tokens of the longest prompt.
        dropped: Values that count for nothing.
    """

    context: tuple[int, ...]
    questions: dict[Question, tuple[Value, ...]]
    labels: dict[Value, str | None]
    depths: dict[Value, float]
    needles: frozenset[int]
    window_begins: float
    moved: int
    tokens: int
    dropped: int


class ItemMaker:
    """Makes the texts of a run.

    Args:
        settings: What to measure.
        tokenizer: The model's tokenizer; its chat template is used if it has one.
        window: Tokens of the window, for the labels.
        sinks: Number of sinks, for the labels.
        haystack: Sentences.

    Raises:
        EvaluationError: The tokenizer cannot tell which characters a token stands for. Or a length has no room for the
            needles of a task, or the haystack is too short for it.

    Attributes:
        specs: The texts, in the order in which they are read.
        left_out: Lengths and numbers of facts that do not fit into them.
    """

    def __init__(
        self,
        settings: RecallSettings,
        tokenizer: PreTrainedTokenizerBase,
        window: int,
        sinks: int,
        haystack: Sequence[str],
    ) -> None:
        if not tokenizer.is_fast:
            raise EvaluationError("recall needs a tokenizer with a tokenizer.json. Convert it, or take another.")
        self.settings, self.tokenizer, self.haystack = settings, tokenizer, haystack
        self.window, self.sinks = window, sinks
        self.chat = prompts.has_chat(tokenizer)
        self.opening = self._passage(Question("", "")).opening.tolist()
        self.count = functools.cache(
            lambda text: len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        )
        self.item = functools.lru_cache(maxsize=1)(self._item)  # the last one, for the arms that are still to read it
        every = list(settings.specs())
        self.specs = [spec for spec in every if spec.facts is None or self._fits(spec)]
        self.left_out = list(dict.fromkeys((spec.length, spec.facts or 0) for spec in every if spec not in self.specs))
        for first in {(spec.task, spec.length): spec for spec in self.specs}.values():
            self.item(first)  # what cannot be made fails here, before anything is read
        for length in settings.lengths:
            if settings.tasks == ("capacity",) and all(spec.length != length for spec in self.specs):
                raise EvaluationError(f"no number of facts fits into {length:,} tokens. Give fewer --facts.")

    @property
    def tokens(self) -> int:
        """Tokens that all arms read together, about."""
        return sum(spec.length for spec in self.specs) * len(self.settings.arms)

    def closing(self, question: Question) -> tuple[int, ...]:
        """Token ids of a question, up to the end of the answer's cue."""
        cue = question.cue if self.chat else f"\n{question.cue}"
        return (*self._passage(question).closing.tolist(), *prompts.tokens(self.tokenizer, cue).tolist())

    def limit(self, values: Iterable[Value]) -> int:
        """Most tokens of an answer that must hold these values."""
        return _ROOM + sum(self.count(f" {value.text}") + _ROOM_PER_VALUE for value in values)

    def ranked_values(self, value: Value) -> list[tuple[int, ...]]:
        """Token ids of the values that are ranked, the right one first."""
        cue, skip = value.question.cue, self.count(value.question.cue)
        texts = (f"{cue} {text}" for text in (value.text, *value.wrong))
        return [tuple(prompts.tokens(self.tokenizer, text).tolist()[skip:]) for text in texts]

    def _item(self, spec: Spec) -> RecallItem:
        """The text of a spec and its questions, the same every time, of the wanted length or a little less."""
        rng = random.Random(f"{self.settings.seed}/{spec.key}")
        facts = TASKS[spec.task].make(rng, spec)
        closings = {question: len(self.closing(question)) for question in facts.questions}
        before, after = len(self.opening), max(closings.values())
        filler = facts.filler or self._from_random_one(rng)
        text = self._filled(facts, filler, spec.length - before - after, spec.length)
        answered = max(closings[question] + self.limit(values) for question, values in facts.questions.items())

        def label(span: tuple[int, int]) -> str | None:
            question = before + len(text.ids)
            first, stop = before + span[0], before + span[1]
            return _span_label(first, stop, self.sinks, self.window, question, question + answered)

        values = [value for values in facts.questions.values() for value in values]
        asked_for = {index for value in values for index in value.needles}
        moved = text.settle(asked_for, lambda span: label(span) is not None)
        labels = {value: _hardest([label(text.spans[index]) for index in value.needles]) for value in values}
        return RecallItem(
            context=(*self.opening, *text.ids),
            questions=facts.questions,
            labels=labels,
            depths={value: _depth(text, value) for value in values},
            needles=frozenset(before + token for index in asked_for for token in range(*text.spans[index])),
            window_begins=(max(0, before + len(text.ids) + answered - self.window) - before) / len(text.ids),
            moved=moved,
            tokens=before + len(text.ids) + after,
            dropped=sum(span is None for span in labels.values()),
        )

    def _fits(self, spec: Spec) -> bool:
        """Whether needles and questions fit into the length, with half as much text around them."""
        first = dataclasses.replace(spec, number=0)
        facts = TASKS[spec.task].make(random.Random(f"{self.settings.seed}/{first.key}"), first)
        needles = sum(self.count(needle.text + " ") for needle in facts.needles)
        closing = max(len(self.closing(question)) for question in facts.questions)
        return 1.5 * needles <= spec.length - len(self.opening) - closing

    def _filled(self, facts: Facts, filler: Iterator[str], room: int, length: int) -> _Layout:
        """The needles in as much text as there is room for."""
        text = _Layout(facts.needles, self.tokenizer, self.count)
        alone, count = len(text.ids), len(facts.needles)
        if room <= alone:
            raise EvaluationError(
                f"{count} needle{'' if count == 1 else 's'} and the question take {length - room + alone:,} tokens, "
                f"more than a length of {length:,} has room for. Give a longer one."
            )
        text.fill(filler, room)
        if room - len(text.ids) > length * _MISSING and next(filler, None) is None:
            raise EvaluationError(
                f"the haystack has about {len(text.ids) - alone:,} tokens, too few for a length of {length:,}. "
                "Give a longer text, or shorter --lengths."
            )
        return text

    def _from_random_one(self, rng: random.Random) -> Iterator[str]:
        """Sentences of the haystack from a random one on, round its end, each once."""
        start = rng.randrange(len(self.haystack))
        yield from (*self.haystack[start:], *self.haystack[:start])

    def _passage(self, question: Question) -> prompts.Passage:
        return prompts.passage(self.tokenizer, "-", question.text, self.chat)  # the text itself is laid out here


def _hardest(labels: Sequence[str | None]) -> str | None:
    """The span that is hardest to reach of several needles; `None` if one of them straddles."""
    return None if None in labels else max((label for label in labels if label), key=LABELS.index)


def _depth(text: _Layout, value: Value) -> float:
    start, stop = min(text.spans[index] for index in value.needles)
    return min(1.0, start / max(1, len(text.ids) - (stop - start)))
