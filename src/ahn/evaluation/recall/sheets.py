"""What a task hides in a text and asks about it, as plain data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class Question:
    """What is asked, and how the answer begins: the model goes on from there.

    Attributes:
        text: The question.
        cue: Beginning of the answer, without a space behind it.
    """

    text: str
    cue: str


@dataclasses.dataclass(frozen=True)
class Needle:
    """A sentence that is put into the text.

    Attributes:
        text: The sentence.
        depth: Where it is wanted: 0 is the beginning of the text, 1 its end.
    """

    text: str
    depth: float


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A value that an answer must hold.

    Attributes:
        value: The value.
        needles: Indices of the needles that one has to know for it.
        others: Values of the same kind that are wrong.
        question: What asks for it when it is ranked among the others.
    """

    value: str
    needles: tuple[int, ...]
    others: tuple[str, ...]
    question: Question


@dataclasses.dataclass(frozen=True)
class Ask:
    """A question that the model answers in its own words, and the values that the answer must hold."""

    question: Question
    wanted: tuple[Wanted, ...]


@dataclasses.dataclass(frozen=True)
class Sheet:
    """Needles for one text and the questions about it.

    Attributes:
        needles: The needles.
        asks: The questions; each is asked anew of a model that has read the text and nothing else.
        hay: Sentences to hide the needles among, without end; `None` for those of a text.
    """

    needles: tuple[Needle, ...]
    asks: tuple[Ask, ...]
    hay: Iterator[str] | None = None


@dataclasses.dataclass(frozen=True)
class Amounts:
    """How much a task hides and asks.

    Attributes:
        depth: Where its first needle is wanted, 0 to 1.
        values: Values that the tasks with several of them ask for.
        distractors: Wrong values that a right one is ranked among.
        facts: Facts that `capacity` hides.
    """

    depth: float = 0.0
    values: int = 4
    distractors: int = 9
    facts: int = 16
