"""What is hidden in a text and what is asked about it, task by task: pure data, the same for the same random numbers.

The tasks follow RULER (arXiv 2404.06654) with words of their own; the capacity curve asks for some of N facts, as in
associative recall.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterator, Sequence

from ahn.evaluation.recall import values
from ahn.evaluation.recall.sheets import Amounts, Ask, Needle, Question, Sheet, Wanted

_OTHER_KEYS = 3
"""Needles with other keys beside the one that multi_key asks for."""


Draw = Callable[[random.Random], str]


def single(rng: random.Random, much: Amounts, draw: Draw, kind: str) -> Sheet:
    """One needle."""
    (key,) = values.new(rng, values.name, 1)
    right, *others = values.new(rng, draw, 1 + much.distractors, [key])
    return Sheet((Needle(_fact(kind, key, right), much.depth),), (_ask_one(kind, key, right, 0, others),))


def multi_key(rng: random.Random, much: Amounts) -> Sheet:
    """Several needles with a key each; one of them is asked for."""
    keys, numbers = _pairs(rng, 1 + _OTHER_KEYS)
    depths = [much.depth, *(rng.random() for _ in range(_OTHER_KEYS))]
    needles = tuple(Needle(_fact("number", *fact), depth) for *fact, depth in zip(keys, numbers, depths))
    return Sheet(needles, (_ask_one("number", keys[0], numbers[0], 0, _others(rng, numbers, [numbers[0]], much)),))


def multi_value(rng: random.Random, much: Amounts) -> Sheet:
    """Several needles with the same key; all their values are asked for."""
    (key,), numbers = values.new(rng, values.name, 1), values.new(rng, values.number, much.values)
    question = Question(f"What are all the secret numbers of {key}?", f"The secret numbers of {key} are")
    needles = tuple(Needle(_fact("number", key, right), depth) for right, depth in zip(numbers, _spread(much)))
    others = _others(rng, (), numbers, much)
    return Sheet(needles, (Ask(question, tuple(Wanted(v, (i,), others, question) for i, v in enumerate(numbers))),))


def multi_query(rng: random.Random, much: Amounts) -> Sheet:
    """Several needles with a key each; the values of all are asked for at once."""
    keys, numbers = _pairs(rng, much.values)
    needles = tuple(Needle(_fact("number", *fact), depth) for *fact, depth in zip(keys, numbers, _spread(much)))
    named = _listed(keys)
    question = Question(f"What are the secret numbers of {named}?", f"The secret numbers of {named} are")
    wanted = (
        Wanted(right, (index,), _others(rng, numbers, [right], much), _question("number", key))
        for index, (key, right) in enumerate(zip(keys, numbers))
    )
    return Sheet(needles, (Ask(question, tuple(wanted)),))


def variables(rng: random.Random, much: Amounts) -> Sheet:
    """Two chains of variables, each set to the one before; all variables of one chain are asked for by its number.

    The chain begins at the wanted depth and is spread over the rest of the text. A variable is known only through all
    those before it, so the one that is hardest to reach gives it its span.
    """
    names = values.new(rng, values.variable, 2 * much.values)
    numbers = values.new(rng, values.number, 2)
    asked, other = names[: much.values], names[much.values :]
    rest = 1 - much.depth
    depths = [much.depth + rest * hop / much.values for hop in range(much.values)]
    depths += sorted(rng.random() for _ in other)
    texts = [*_chain(asked, numbers[0]), *_chain(other, numbers[1])]
    question = Question(
        f"Which variables have the value {numbers[0]}?", f"The variables with the value {numbers[0]} are"
    )
    wrong = tuple([*other, *values.new(rng, values.variable, much.distractors, names)][: much.distractors])
    wanted = (Wanted(name, tuple(range(hop + 1)), wrong, question) for hop, name in enumerate(asked))
    return Sheet(tuple(map(Needle, texts, depths)), (Ask(question, tuple(wanted)),))


def needles(rng: random.Random, much: Amounts) -> Sheet:
    """One needle in a text that is made of nothing but needles."""
    keys, numbers = _pairs(rng, 1 + much.distractors)

    def hay() -> Iterator[str]:
        taken_keys, taken_numbers = set(keys), set(numbers)
        for key, number in zip(keys[1:], numbers[1:]):
            yield _fact("number", key, number) + " "
        while True:
            (key,) = values.new(rng, values.name, 1, taken_keys)
            (number,) = values.new(rng, values.number, 1, taken_numbers)
            taken_keys.add(key)
            taken_numbers.add(number)
            yield _fact("number", key, number) + " "

    needle = Needle(_fact("number", keys[0], numbers[0]), much.depth)
    return Sheet((needle,), (_ask_one("number", keys[0], numbers[0], 0, numbers[1:]),), hay())


def capacity(rng: random.Random, much: Amounts) -> Sheet:
    """Many facts, evenly spread; some of them, from all parts of the text, are asked for one by one."""
    keys, numbers = _pairs(rng, much.facts)
    hidden = tuple(
        Needle(_fact("number", key, number), (index + 0.5) / much.facts)
        for index, (key, number) in enumerate(zip(keys, numbers))
    )
    count = min(much.values, much.facts)
    edges = [round(part * much.facts / count) for part in range(count + 1)]
    asked = [rng.randrange(first, last) for first, last in itertools.pairwise(edges)]
    asks = (
        _ask_one("number", keys[i], numbers[i], i, _others(rng, rng.sample(numbers, len(numbers)), [numbers[i]], much))
        for i in asked
    )
    return Sheet(hidden, tuple(asks))


@dataclasses.dataclass(frozen=True)
class Task:
    """A kind of sheet.

    Attributes:
        title: What it asks, in a few words.
        make: Makes a sheet.
        by: What it is measured against besides the length: the depth of its needle, or the number of facts.
    """

    title: str
    make: Callable[[random.Random, Amounts], Sheet]
    by: str = "depth"


TASKS = {
    "number": Task("one needle, a number", lambda rng, much: single(rng, much, values.number, "number")),
    "word": Task("one needle, a word", lambda rng, much: single(rng, much, values.name, "word")),
    "uuid": Task("one needle, a UUID", lambda rng, much: single(rng, much, values.identifier, "code")),
    "multi_key": Task("one of several keys", multi_key),
    "multi_value": Task("all values of one key", multi_value),
    "multi_query": Task("the values of several keys", multi_query),
    "variables": Task("all variables of a chain", variables),
    "needles": Task("one needle among needles", needles),
    "capacity": Task("some of many facts", capacity, by="facts"),
}


def _fact(kind: str, key: str, value: str) -> str:
    return f"The secret {kind} of {key} is {value}."


def _question(kind: str, key: str) -> Question:
    return Question(f"What is the secret {kind} of {key}?", f"The secret {kind} of {key} is")


def _ask_one(kind: str, key: str, right: str, needle: int, others: Sequence[str]) -> Ask:
    question = _question(kind, key)
    return Ask(question, (Wanted(right, (needle,), tuple(others), question),))


def _pairs(rng: random.Random, count: int) -> tuple[list[str], list[str]]:
    return values.new(rng, values.name, count), values.new(rng, values.number, count)


def _others(rng: random.Random, near: Sequence[str], right: Sequence[str], much: Amounts) -> tuple[str, ...]:
    """Wrong numbers: those that stand in the same text first, then new ones."""
    wrong = [number for number in near if number not in right][: much.distractors]
    return (*wrong, *values.new(rng, values.number, much.distractors - len(wrong), [*near, *right]))


def _spread(much: Amounts) -> list[float]:
    """Depths at even distances over the whole text, further down the larger the wanted depth is."""
    return [(index + much.depth) / much.values for index in range(much.values)]


def _chain(names: Sequence[str], number: str) -> list[str]:
    return [f"VAR {name} = {before}." for name, before in zip(names, [number, *(f"VAR {name}" for name in names)])]


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
