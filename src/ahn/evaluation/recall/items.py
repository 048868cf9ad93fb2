"""The texts of a run and the questions about them as tokens, each made anew from the seed and its own name."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from ahn.evaluation.errors import EvaluationError
from ahn.evaluation.recall.layout import LABELS, Exact, Layout
from ahn.evaluation.recall.tasks import TASKS, Facts, Question, Spec, Value
from ahn.models import prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MISSING = 0.05  # share of a length that a haystack may be too short by
_ROOM = 8  # tokens that an answer may take besides its values
_ROOM_PER_VALUE = 6


@dataclasses.dataclass(frozen=True)
class RecallSettings:
    """What a run measures.

    Attributes:
        arms: Names of arms.
        tasks: Names of `TASKS`.
        lengths: Tokens of the prompts.
        depths: How many depths, evenly spread from the beginning of the text to its end.
        items: Texts of each task, length and depth or number of facts.
        values: Values that the tasks with several of them ask for.
        facts: Numbers of facts that `capacity` hides.
        distractors: Wrong values that a right one is ranked among.
        seed: Of all that is drawn.
    """

    arms: tuple[str, ...] = ("full", "window", "ahn")
    tasks: tuple[str, ...] = ("number", "capacity")
    lengths: tuple[int, ...] = (1024,)
    depths: int = 5
    items: int = 2
    values: int = 4
    facts: tuple[int, ...] = (4, 8, 16, 32)
    distractors: int = 9
    seed: int = 0

    def depth(self, index: int) -> float:
        """The depth with this index, 0 to 1."""
        return index / max(1, self.depths - 1)

    @property
    def chance(self) -> float:
        """Share of values that come first among the wrong ones by chance."""
        return 1 / (1 + self.distractors)

    def specs(self, task: str, length: int) -> Iterator[Spec]:
        """The texts of a task at a length, whether or not their needles fit into it."""
        depths = [(self.depth(index), None) for index in range(self.depths)]
        for depth, facts in [(None, count) for count in self.facts] if TASKS[task].counts_facts else depths:
            for number in range(self.items):
                yield Spec(task, length, depth, facts, number, self.values, self.distractors)


@dataclasses.dataclass(frozen=True)
class RecallItem:
    """One text in tokens.

    Attributes:
        context: Token ids of the chat's opening and the text.
        questions: As `Facts.questions`.
        labels: Span of the needles of each value, of `LABELS`; `None` if they straddle two wherever they are put, so
            that the value counts for nothing.
        depths: Where the first needle of each value is in the text: 0 is the beginning, 1 the end.
        needles: Tokens of the needles that are asked for, places in `context`.
        exact: What sinks and window hold when the questions are answered.
        window_begins: Depth in the text at which the window begins; 0 or less if all of it is in the window.
        moved: Needles that straddled two spans and were moved.
        tokens: Tokens of the longest prompt, without the answer.
    """

    context: tuple[int, ...]
    questions: dict[Question, tuple[Value, ...]]
    labels: dict[Value, str | None]
    depths: dict[Value, float]
    needles: frozenset[int]
    exact: Exact
    window_begins: float
    moved: int
    tokens: int

    @property
    def dropped(self) -> int:
        """Values that count for nothing."""
        return sum(label is None for label in self.labels.values())


class ItemMaker:
    """Makes the texts of a run.

    Args:
        settings: What to measure.
        tokenizer: The model's tokenizer; its chat template is used if it has one.
        window: Tokens of the window, for the labels.
        sinks: Number of sinks, for the labels.
        haystack: Sentences.

    Raises:
        EvaluationError: The tokenizer cannot tell which characters a token stands for, a length has no room for the
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
        every = [
            spec for task in settings.tasks for length in settings.lengths for spec in settings.specs(task, length)
        ]
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

    def candidates(self, value: Value) -> list[tuple[int, ...]]:
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
        text = self._filled(
            facts, facts.filler or self._from_random_one(rng), spec.length - before - after, spec.length
        )
        answered = max(closings[question] + self.limit(values) for question, values in facts.questions.items())

        def exact() -> Exact:
            question = before + len(text.ids)
            return Exact(self.sinks, self.window, question, question + answered)

        def label(span: tuple[int, int]) -> str | None:
            return exact().label(before + span[0], before + span[1])

        values = [value for values in facts.questions.values() for value in values]
        wanted = {index for value in values for index in value.needles}
        moved = text.settle(wanted, lambda span: label(span) is not None)
        return RecallItem(
            context=(*self.opening, *text.ids),
            questions=facts.questions,
            labels={value: _hardest([label(text.spans[index]) for index in value.needles]) for value in values},
            depths={value: _depth(text, value) for value in values},
            needles=frozenset(before + place for index in wanted for place in range(*text.spans[index])),
            exact=exact(),
            window_begins=(exact().window_begins - before) / len(text.ids),
            moved=moved,
            tokens=before + len(text.ids) + after,
        )

    def _fits(self, spec: Spec) -> bool:
        """Whether needles and questions fit into the length, with half as much text around them."""
        first = dataclasses.replace(spec, number=0)
        facts = TASKS[spec.task].make(random.Random(f"{self.settings.seed}/{first.key}"), first)
        needles = sum(self.count(needle.text + " ") for needle in facts.needles)
        closing = max(len(self.closing(question)) for question in facts.questions)
        return 1.5 * needles <= spec.length - len(self.opening) - closing

    def _filled(self, facts: Facts, filler: Iterator[str], room: int, length: int) -> Layout:
        """The needles in as much text as there is room for."""
        text = Layout(facts.needles, self.tokenizer, self.count)
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


def _depth(text: Layout, value: Value) -> float:
    start, stop = min(text.spans[index] for index in value.needles)
    return min(1.0, start / max(1, len(text.ids) - (stop - start)))
