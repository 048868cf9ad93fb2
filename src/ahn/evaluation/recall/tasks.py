"""What is hidden in a text and what is asked about it, task by task: pure data, the same for the same random numbers.

The tasks follow RULER (arXiv 2404.06654) with words of their own; capacity asks for some of N facts.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

from ahn.config import setting
from ahn.evaluation.arm_names import ARMS, ARMS_HELP

EVICTED = "evicted"
LABELS = ("sinks", "window", EVICTED)
"""Spans of a text, in the order of tables; the last one is the hardest to reach."""

_OTHER_KEYS = 3  # needles with other keys beside the one that multi_key asks for
_TRIES = 30  # draws of a new value before a longer one is made
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_ADJECTIVES = """
amber ancient azure bitter bold brass brave bright broad bronze calm clever cold copper crimson crooked dark deep
distant dusty eager early faint famous fierce frozen gentle giant gilded golden green happy hidden hollow honest
hungry icy idle ivory jolly kind late lazy lively lonely loud lucky mellow merry misty modest narrow noble northern
old pale patient plain proud purple quick quiet rapid royal rusty salty scarlet secret shiny silent silver sleepy slow
smooth solid southern steady stormy sunny swift tall tender tiny velvet
"""
_NOUNS = """
anchor apple arrow badger barrel basket beacon bell bottle bridge bucket button candle canyon castle cellar cherry
clock cloud comet cradle crown daisy desert diamond dolphin dragon drum eagle ember falcon feather ferry fiddle forest
fountain fox garden glacier goblet guitar hammer harbour harvest hazel heron island ivy jacket kettle ladder lantern
lemon lion lobster maple marble meadow mirror monkey mountain needle oak ocean orchard otter oyster paddle parrot
pebble pepper piano pigeon pillow planet quarry rabbit raven river rocket saddle sailor spider temple thunder tiger
tower valley violin
"""
_FIRST, _SECOND = _ADJECTIVES.split(), _NOUNS.split()
_DRAW: dict[str, Callable[[random.Random], str]] = {
    "number": lambda rng: str(rng.randrange(10**6, 10**7)),  # seven digits
    "word": lambda rng: f"{rng.choice(_FIRST)}-{rng.choice(_SECOND)}",  # one of some 7,000
    "code": lambda rng: str(uuid.UUID(int=rng.getrandbits(128), version=4)),
    "variable": lambda rng: "".join(rng.choices(_LETTERS, k=5)),
}


class Needle(NamedTuple):
    """A sentence to hide, and where: depth 0 is the beginning of the text, 1 its end."""

    text: str
    depth: float


class Question(NamedTuple):
    """A question, and how its answer begins, without a space behind it: the model goes on from there."""

    text: str
    cue: str


class Value(NamedTuple):
    """A value that an answer must hold, the needles that tell it, and what asks for it among wrong ones."""

    text: str
    needles: tuple[int, ...]
    wrong: tuple[str, ...]
    question: Question


Questions = dict[Question, tuple[Value, ...]]


class Facts(NamedTuple):
    """What one text hides, what each question about it asks for, and endless filler in place of the haystack."""

    needles: tuple[Needle, ...]
    questions: Questions
    filler: Iterator[str] | None = None


@dataclasses.dataclass(frozen=True)
class Spec:
    """One text of a run: tokens of its prompt, the depth of its first needle or its number of facts.

    `number` tells alike texts apart. Tasks ask for one or for several `values`, each ranked among `distractors`.
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


def _new(rng: random.Random, kind: str, count: int, taken: Collection[str] = ()) -> list[str]:
    """Values of a kind that differ from one another and from those that are taken."""
    values: list[str] = []
    seen = set(taken)
    while len(values) < count:
        value = next((value for value in (_DRAW[kind](rng) for _ in range(_TRIES)) if value not in seen), None)
        if value is None:  # nearly all names are taken, so that a longer one is needed
            last = _DRAW[kind](rng)
            value = f"{rng.choice(_FIRST)}-{last}"
        if value not in seen:
            seen.add(value)
            values.append(value)
    return values


def _single(rng: random.Random, spec: Spec, kind: str = "number") -> Facts:
    (key,) = _new(rng, "word", 1)
    right, *wrong = _new(rng, kind, 1 + spec.distractors, [key])
    return Facts(_needles([key], [right], [spec.depth or 0.0], kind), _query(key, right, 0, wrong, kind))


def _multi_key(rng: random.Random, spec: Spec) -> Facts:
    keys, numbers = _pairs(rng, 1 + _OTHER_KEYS)
    depths = [spec.depth or 0.0, *(rng.random() for _ in range(_OTHER_KEYS))]
    wrong = _wrong(rng, numbers, numbers[:1], spec)
    return Facts(_needles(keys, numbers, depths), _query(keys[0], numbers[0], 0, wrong))


def _multi_value(rng: random.Random, spec: Spec) -> Facts:
    (key,), numbers = _new(rng, "word", 1), _new(rng, "number", spec.values)
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
    """Two chains of variables, each set to the one before, from the wanted depth on; one is asked for by its number.

    A variable is known only through all those before it, so the one that is hardest to reach gives it its span.
    """
    names, numbers = _new(rng, "variable", 2 * spec.values), _new(rng, "number", 2)
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
    wrong = tuple([*other, *_new(rng, "variable", spec.distractors, names)][: spec.distractors])
    right = tuple(Value(name, tuple(range(hop + 1)), wrong, question) for hop, name in enumerate(chain))
    return Facts(tuple(map(Needle, texts, depths)), {question: right})


def _among_needles(rng: random.Random, spec: Spec) -> Facts:
    keys, numbers = _pairs(rng, 1 + spec.distractors)

    def filler() -> Iterator[str]:
        yield from (_fact(key, number) + " " for key, number in zip(keys[1:], numbers[1:]))
        taken_keys, taken_numbers = set(keys), set(numbers)
        while True:
            (key,) = _new(rng, "word", 1, taken_keys)
            (number,) = _new(rng, "number", 1, taken_numbers)
            taken_keys.add(key)
            taken_numbers.add(number)
            yield _fact(key, number) + " "

    needles = _needles(keys[:1], numbers[:1], [spec.depth or 0.0])
    return Facts(needles, _query(keys[0], numbers[0], 0, numbers[1:]), filler())


def _capacity(rng: random.Random, spec: Spec) -> Facts:
    facts = spec.facts or 0  # some of them, from all parts of the text, are asked for one by one
    keys, numbers = _pairs(rng, facts)
    depths = [(index + 0.5) / facts for index in range(facts)]
    count = min(spec.values, facts)
    edges = [round(part * facts / count) for part in range(count + 1)]
    chosen = [rng.randrange(first, last) for first, last in itertools.pairwise(edges)]
    questions: Questions = {}
    for i in chosen:
        questions |= _query(keys[i], numbers[i], i, _wrong(rng, rng.sample(numbers, facts), [numbers[i]], spec))
    return Facts(_needles(keys, numbers, depths), questions)


class RecallTask(NamedTuple):
    """A kind of facts: what it asks in a few words, what makes them, and whether it is measured by their number."""

    title: str
    make: Callable[[random.Random, Spec], Facts]
    counts_facts: bool = False


TASKS = {
    "number": RecallTask("one needle, a number", _single),
    "word": RecallTask("one needle, a word", functools.partial(_single, kind="word")),
    "uuid": RecallTask("one needle, a UUID", functools.partial(_single, kind="code")),
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


def _query(key: str, right: str, needle: int, wrong: Sequence[str], kind: str = "number") -> Questions:
    question = _question(key, kind)
    return {question: (Value(right, (needle,), tuple(wrong), question),)}


def _pairs(rng: random.Random, count: int) -> tuple[list[str], list[str]]:
    return _new(rng, "word", count), _new(rng, "number", count)


def _wrong(rng: random.Random, near: Sequence[str], right: Sequence[str], spec: Spec) -> tuple[str, ...]:
    wrong = [number for number in near if number not in right][: spec.distractors]
    return (*wrong, *_new(rng, "number", spec.distractors - len(wrong), [*near, *right]))


@dataclasses.dataclass(frozen=True)
class RecallSettings:
    """What a run measures."""

    tasks: tuple[str, ...] = setting(("number", "capacity"), f"Joined by commas: {', '.join(TASKS)}.", joined=True)
    lengths: tuple[int, ...] = setting((1024, 2048, 4096), "Tokens of the prompts, joined by commas.", joined=True)
    depths: int = setting(5, "Depths of a needle, evenly spread over the text.", least=1)
    items: int = setting(2, "Texts of each task, length and depth or number of facts.", least=1)
    values: int = setting(4, "Values asked for by multi_value, multi_query, variables and capacity.", least=1)
    facts: tuple[int, ...] = setting(
        (4, 8, 16, 32), "Numbers of facts that capacity hides, joined by commas.", joined=True
    )
    distractors: int = setting(9, "Wrong values that a right one is ranked among.", least=1)
    haystack: str | None = setting(None, "Text around needles.", metavar="FILE", unset="Python's reference")
    arms: tuple[str, ...] = setting(ARMS, ARMS_HELP, joined=True)
    seed: int = 0

    def depth(self, index: int) -> float:
        """The depth with this index, 0 to 1."""
        return index / max(1, self.depths - 1)

    @property
    def chance(self) -> float:
        """Share of values that come first among the wrong ones by chance."""
        return 1 / (1 + self.distractors)

    def specs(self) -> Iterator[Spec]:
        """All texts, whether or not their needles fit into them."""
        depths = [(self.depth(index), None) for index in range(self.depths)]
        for task, length in itertools.product(self.tasks, self.lengths):
            for depth, facts in [(None, count) for count in self.facts] if TASKS[task].counts_facts else depths:
                for number in range(self.items):
                    yield Spec(task, length, depth, facts, number, self.values, self.distractors)
