"""What is hidden in a text and what is asked about it, task by task: pure data, the same for the same random numbers.

The tasks follow RULER (arXiv 2404.06654) with words of their own. The capacity curve asks for some of N facts, as in
associative recall.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from ahn.evaluation.recall import values

_OTHER_KEYS = 3  # needles with other keys beside the one that multi_key asks for


class Needle(NamedTuple):
    """A sentence to hide, and where: depth 0 is the beginning of the text, 1 its end."""

    text: str
    depth: float


class Question(NamedTuple):
    """A question, and how its answer begins, without a space behind it: the model goes on from there."""

    text: str
    cue: str


class Value(NamedTuple):
    """A value that an answer must hold.

    Attributes:
        text: The value.
        needles: Indices of the needles that one has to know for it.
        wrong: Other values of its kind.
        question: What asks for it when it is ranked among the wrong ones.
    """

    text: str
    needles: tuple[int, ...]
    wrong: tuple[str, ...]
    question: Question


class Facts(NamedTuple):
    """What one text hides.

    Attributes:
        needles: The needles.
        questions: Each question, asked of a model that has read the text and nothing else, and what it asks for.
        filler: Endless sentences to hide the needles among; `None` for those of the haystack.
    """

    needles: tuple[Needle, ...]
    questions: dict[Question, tuple[Value, ...]]
    filler: Iterator[str] | None = None


@dataclasses.dataclass(frozen=True)
class Spec:
    """One text of a run.

    Attributes:
        task: Name of its task.
        length: Tokens of its prompt.
        depth: Where its first needle is wanted, 0 to 1; `None` where facts are counted instead.
        facts: Number of facts, or `None`.
        number: Which of the texts that are alike, from 0.
        values: Values that the tasks with several of them ask for.
        distractors: Wrong values that a right one is ranked among.
    """

    task: str
    length: int
    depth: float | None
    facts: int | None
    number: int
    values: int = 4
    distractors: int = 9

    @property
    def key(self) -> str:
        """Its name in the journal: "number/1024/depth 0.25/0"."""
        level = f"facts {self.facts}" if self.depth is None else f"depth {self.depth:.4g}"
        return f"{self.task}/{self.length}/{level}/{self.number}"

    @property
    def spread(self) -> list[float]:
        """Depths of several values at even distances, the further down the larger the wanted depth is."""
        return [(index + (self.depth or 0.0)) / self.values for index in range(self.values)]


def _single(draw: Callable[[random.Random], str], kind: str) -> Callable[[random.Random, Spec], Facts]:
    def make(rng: random.Random, spec: Spec) -> Facts:
        (key,) = values.new(rng, values.name, 1)
        right, *wrong = values.new(rng, draw, 1 + spec.distractors, [key])
        return Facts(_needles([key], [right], [spec.depth or 0.0], kind), dict([_ask(key, right, 0, wrong, kind)]))

    return make


def _multi_key(rng: random.Random, spec: Spec) -> Facts:
    keys, numbers = _pairs(rng, 1 + _OTHER_KEYS)
    depths = [spec.depth or 0.0, *(rng.random() for _ in range(_OTHER_KEYS))]
    wrong = _wrong(rng, numbers, numbers[:1], spec)
    return Facts(_needles(keys, numbers, depths), dict([_ask(keys[0], numbers[0], 0, wrong)]))


def _multi_value(rng: random.Random, spec: Spec) -> Facts:
    (key,), numbers = values.new(rng, values.name, 1), values.new(rng, values.number, spec.values)
    question = Question(f"What are all the secret numbers of {key}?", f"The secret numbers of {key} are")
    wrong = _wrong(rng, (), numbers, spec)
    right = tuple(Value(number, (index,), wrong, question) for index, number in enumerate(numbers))
    return Facts(_needles([key] * spec.values, numbers, spec.spread), {question: right})


def _multi_query(rng: random.Random, spec: Spec) -> Facts:
    keys, numbers = _pairs(rng, spec.values)
    listed = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])} and {keys[-1]}"
    question = Question(f"What are the secret numbers of {listed}?", f"The secret numbers of {listed} are")
    right = tuple(
        Value(number, (index,), _wrong(rng, numbers, [number], spec), _question(key))
        for index, (key, number) in enumerate(zip(keys, numbers))
    )
    return Facts(_needles(keys, numbers, spec.spread), {question: right})


def _variables(rng: random.Random, spec: Spec) -> Facts:
    """Two chains of variables, each set to the one before; one chain is asked for by its number.

    The chain begins at the wanted depth and is spread over the rest of the text. A variable is known only through all
    those before it, so the one that is hardest to reach gives it its span.
    """
    names, numbers = values.new(rng, values.variable, 2 * spec.values), values.new(rng, values.number, 2)
    chain, other = names[: spec.values], names[spec.values :]
    start = spec.depth or 0.0
    depths = [start + (1 - start) * hop / spec.values for hop in range(spec.values)]
    depths += sorted(rng.random() for _ in other)
    texts = [
        f"VAR {name} = {before}."
        for part, number in ((chain, numbers[0]), (other, numbers[1]))
        for name, before in zip(part, [number, *(f"VAR {name}" for name in part)])
    ]
    question = Question(
        f"Which variables have the value {numbers[0]}?", f"The variables with the value {numbers[0]} are"
    )
    wrong = tuple([*other, *values.new(rng, values.variable, spec.distractors, names)][: spec.distractors])
    right = tuple(Value(name, tuple(range(hop + 1)), wrong, question) for hop, name in enumerate(chain))
    return Facts(tuple(map(Needle, texts, depths)), {question: right})


def _among_needles(rng: random.Random, spec: Spec) -> Facts:
    keys, numbers = _pairs(rng, 1 + spec.distractors)

    def filler() -> Iterator[str]:
        yield from (_fact(key, number) + " " for key, number in zip(keys[1:], numbers[1:]))
        taken_keys, taken_numbers = set(keys), set(numbers)
        while True:
            (key,), (number,) = (
                values.new(rng, values.name, 1, taken_keys),
                values.new(rng, values.number, 1, taken_numbers),
            )
            taken_keys.add(key)
            taken_numbers.add(number)
            yield _fact(key, number) + " "

    needles = _needles(keys[:1], numbers[:1], [spec.depth or 0.0])
    return Facts(needles, dict([_ask(keys[0], numbers[0], 0, numbers[1:])]), filler())


def _capacity(rng: random.Random, spec: Spec) -> Facts:
    """Many facts, evenly spread; some of them, from all parts of the text, are asked for one by one."""
    facts = spec.facts or 0
    keys, numbers = _pairs(rng, facts)
    depths = [(index + 0.5) / facts for index in range(facts)]
    count = min(spec.values, facts)
    edges = [round(part * facts / count) for part in range(count + 1)]
    chosen = [rng.randrange(first, last) for first, last in itertools.pairwise(edges)]
    questions = dict(
        _ask(keys[i], numbers[i], i, _wrong(rng, rng.sample(numbers, facts), [numbers[i]], spec)) for i in chosen
    )
    return Facts(_needles(keys, numbers, depths), questions)


class RecallTask(NamedTuple):
    """A kind of facts: what it asks in a few words, what makes them, and whether it is measured by their number."""

    title: str
    make: Callable[[random.Random, Spec], Facts]
    counts_facts: bool = False


TASKS = {
    "number": RecallTask("one needle, a number", _single(values.number, "number")),
    "word": RecallTask("one needle, a word", _single(values.name, "word")),
    "uuid": RecallTask("one needle, a UUID", _single(values.identifier, "code")),
    "multi_key": RecallTask("one of several keys", _multi_key),
    "multi_value": RecallTask("all values of one key", _multi_value),
    "multi_query": RecallTask("the values of several keys", _multi_query),
    "variables": RecallTask("all variables of a chain", _variables),
    "needles": RecallTask("one needle among needles", _among_needles),
    "capacity": RecallTask("some of many facts", _capacity, counts_facts=True),
}


def _fact(key: str, value: str, kind: str = "number") -> str:
    return f"The secret {kind} of {key} is {value}."


def _needles(
    keys: Sequence[str], right: Sequence[str], depths: Sequence[float], kind: str = "number"
) -> tuple[Needle, ...]:
    return tuple(Needle(_fact(key, value, kind), depth) for key, value, depth in zip(keys, right, depths))


def _question(key: str, kind: str = "number") -> Question:
    return Question(f"What is the secret {kind} of {key}?", f"The secret {kind} of {key} is")


def _ask(
    key: str, right: str, needle: int, wrong: Sequence[str], kind: str = "number"
) -> tuple[Question, tuple[Value, ...]]:
    question = _question(key, kind)
    return question, (Value(right, (needle,), tuple(wrong), question),)


def _pairs(rng: random.Random, count: int) -> tuple[list[str], list[str]]:
    return values.new(rng, values.name, count), values.new(rng, values.number, count)


def _wrong(rng: random.Random, near: Sequence[str], right: Sequence[str], spec: Spec) -> tuple[str, ...]:
    """Wrong numbers: those of the same text first, then new ones."""
    wrong = [number for number in near if number not in right][: spec.distractors]
    return (*wrong, *values.new(rng, values.number, spec.distractors - len(wrong), [*near, *right]))
