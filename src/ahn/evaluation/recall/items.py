"""From a sheet to tokens: a context of the wanted length with needles at their depths, and the questions about it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ahn.evaluation.errors import EvaluationError
from ahn.evaluation.recall.sheets import Ask, Question, Sheet, Wanted
from ahn.evaluation.recall.spans import Exact, joined
from ahn.evaluation.recall.text import Counter, Text
from ahn.models import prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MISSING = 0.05  # share of a length that a haystack may be too short by
_ROOM = 8  # tokens that an answer may take besides its values
_ROOM_PER_VALUE = 6


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
        needles: Tokens of the needles that are asked for, places in `context`.
        exact: What sinks and window hold when the questions are answered.
        window_begins: Depth in the text at which the window begins; 0 or less if all of it is in the window.
        moved: Needles that straddled two spans and were moved.
    """

    context: tuple[int, ...]
    asks: tuple[Asked, ...]
    needles: frozenset[int]
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
        self.count = Counter(tokenizer)
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
        before, after = len(self.opening), max(map(len, closings.values()))
        text = self._filled(sheet, hay, length - before - after, length)

        def exact() -> Exact:
            question = before + len(text.ids)
            end = question + max(len(closings[ask]) + limits[ask] for ask in sheet.asks)
            return Exact(self.sinks, self.window, question, end)

        def label(span: tuple[int, int]) -> str | None:
            return exact().label(before + span[0], before + span[1])

        asked = {index for ask in sheet.asks for wanted in ask.wanted for index in wanted.needles}
        moved = text.settle(asked, lambda span: label(span) is not None)
        labels = [label(span) for span in text.spans]
        asks = (
            Asked(closings[ask], limits[ask], tuple(self._target(wanted, text, labels) for wanted in ask.wanted))
            for ask in sheet.asks
        )
        begins = (exact().window_begins - before) / len(text.ids)
        needles = frozenset(before + place for index in asked for place in range(*text.spans[index]))
        return Item((*self.opening, *text.ids), tuple(asks), needles, exact(), begins, moved)

    def fits(self, sheet: Sheet, length: int) -> bool:
        """Whether the needles and questions of a sheet fit into a length, with half as much text around them."""
        needles = sum(self.count(needle.text + " ") for needle in sheet.needles)
        closing = max(len(self._closing(ask.question)) for ask in sheet.asks)
        return 1.5 * needles <= length - len(self.opening) - closing

    def _filled(self, sheet: Sheet, hay: Iterator[str], room: int, length: int) -> Text:
        """The needles in as much text as there is room for."""
        text = Text(sheet.needles, self.count)
        alone = len(text.ids)
        if room <= alone:
            raise EvaluationError(
                f"{len(sheet.needles)} needle{'' if len(sheet.needles) == 1 else 's'} and the question take "
                f"{length - room + alone:,} tokens, more than a length of {length:,} has room for. Give a longer one."
            )
        source = sheet.hay or hay
        text.fill(source, room)
        if room - len(text.ids) > length * _MISSING and next(source, None) is None:
            raise EvaluationError(
                f"the haystack has about {len(text.ids) - alone:,} tokens, too few for a length of {length:,}. "
                "Give a longer text, or shorter --lengths."
            )
        return text

    def _target(self, wanted: Wanted, text: Text, labels: Sequence[str | None]) -> Target:
        cue = wanted.question.cue
        skip = self.count(cue)
        candidates = (
            tuple(prompts.tokens(self.tokenizer, f"{cue} {value}").tolist()[skip:])
            for value in (wanted.value, *wanted.others)
        )
        start, stop = min(text.spans[index] for index in wanted.needles)
        depth = min(1.0, start / max(1, len(text.ids) - (stop - start)))
        label = joined(labels[index] for index in wanted.needles)
        return Target(wanted.value, label, depth, self._closing(wanted.question), tuple(candidates))

    def _closing(self, question: Question) -> tuple[int, ...]:
        cue = question.cue if self.chat else f"\n{question.cue}"
        return (*self._passage(question).closing.tolist(), *prompts.tokens(self.tokenizer, cue).tolist())

    def _passage(self, question: Question) -> prompts.Passage:
        return prompts.passage(self.tokenizer, "-", question.text, self.chat)  # the text itself is laid out here

    def _limit(self, ask: Ask) -> int:
        return _ROOM + sum(self.count(f" {wanted.value}") + _ROOM_PER_VALUE for wanted in ask.wanted)
