"""Texts with hidden facts, and questions about them at the end, so that late tokens need early ones."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from ahn.errors import AHNError
from ahn.models import prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PEOPLE = (
    *("Anna", "Peter", "Mr. Holt", "Lady Ames", "the captain"),
    *("Dr. Reyes", "the gardener", "Miss Orde", "her aunt"),
)
_THINGS = ("the blue house", "the old safe", "the boat", "the garden gate", "the clock", "his cabin", "the archive")
_QUOTED = (40, 160)  # characters of a sentence that is asked for
_BEFORE = 0.6  # share of the sentences that facts are hidden among
_ENDS = re.compile(r"[.!?][\"'’”)\]]*\s+|\n\s*")
_LEAST_ENDS = 4
_WORDS = re.compile(r"\b[a-z]{4,10}\b"), re.compile(r"[^\W\d_]{2,10}")  # the second for other scripts
_LEAST_WORDS = 8
_ALIKE = 0.5  # share of the texts whose facts are all of one kind


class UnfitText(AHNError):
    """Nothing can be hidden in a text."""


class Fact(NamedTuple):
    """A sentence to hide, its question and its answer.

    Attributes:
        sentence: The sentence, without its full stop.
        question: The question.
        answer: The whole answer.
        value: The part of the sentence that nobody could guess.
        begin: Where it begins in the sentence, in characters.
    """

    sentence: str
    question: str
    answer: str
    value: str
    begin: int


@dataclasses.dataclass(frozen=True)
class FactText:
    """A text and the questions about it, as tokens.

    Attributes:
        ids: All token ids, `[T]`.
        text: Tokens up to the end of the text, where the questions begin.
        values: For each fact its kind and the indices of its value's tokens in `ids`.
    """

    ids: torch.Tensor
    text: int
    values: tuple[tuple[str, tuple[int, ...]], ...]


class Source(NamedTuple):
    """What facts are made from.

    Attributes:
        rng: Source of all random choices.
        words: Ordinary words of the surrounding text. Facts made of them look like the text.
    """

    rng: random.Random
    words: Sequence[str]


def _thing(source: Source) -> str:
    """The subject of a fact: one of a few things, or a word of the text."""
    return source.rng.choice((source.rng.choice(_THINGS), f"the {source.rng.choice(source.words)}"))


def _number(source: Source) -> str:
    return str(source.rng.randrange(10 ** source.rng.choice((3, 4, 5, 6)), 10**7))


def _name(source: Source) -> str:
    """A word that no language has, such as "Tavoreb"."""
    rng = source.rng
    syllables = (rng.choice("bcdfghklmnprstvw") + rng.choice("aeiou") for _ in range(rng.choice((2, 3))))
    return "".join(syllables).capitalize() + rng.choice(("", "n", "r", "s"))


def _serial(source: Source) -> str:
    """Groups of letters and digits such as "7f3-k20e"."""
    rng = source.rng
    letters = rng.choice(
        ("0123456789abcdef", "0123456789abcdefghijklmnopqrstuvwxyz", "0123456789ABCDEFGHJKLMNPQRSTUVWXYZ")
    )
    groups = ("".join(rng.choices(letters, k=rng.randint(2, 6))) for _ in range(rng.randint(1, 5)))
    return rng.choice(("-", "-", "/", ".")).join(groups)


_DRAW: dict[str, Callable[[Source], str]] = {
    "who": lambda source: source.rng.choice(_PEOPLE),
    "thing": _thing,
    "number": _number,
    "name": _name,
    "variable": lambda source: _name(source).lower(),
    "serial": _serial,
    "words": lambda source: source.rng.choice((" ", "-")).join(source.rng.sample(source.words, 2)),
}


class Format(NamedTuple):
    """How facts of a kind are told and asked for.

    Attributes:
        parts: Names of what is drawn, in this order; the last one is the value.
        sentence: The sentence, with these names in braces.
        question: The question.
        answer: The whole answer; the sentence if left out.
    """

    parts: tuple[str, ...]
    sentence: str
    question: str
    answer: str = ""

    def make(self, source: Source) -> Fact:
        """A new fact."""
        drawn, value = {part: _DRAW[part](source) for part in self.parts}, self.parts[-1]
        said, question, answer = (
            text.format(**drawn) for text in (self.sentence, self.question, self.answer or self.sentence)
        )
        begin = len(self.sentence[: self.sentence.index(f"{{{value}}}")].format(**drawn))
        return Fact(said, question, answer, drawn[value], begin)


FORMATS = {
    "code": Format(("thing", "number"), "The code for {thing} is {number}", "What is the code for {thing}?"),
    "letter": Format(("who", "name"), "{who} had hidden the letter in {name}", "Where had {who} hidden the letter?"),
    "fare": Format(
        ("who", "name", "number"),
        "On the train to {name}, {who} paid {number} shillings",
        "How many shillings did {who} pay on the train to {name}?",
        "{number} shillings",
    ),
    "setting": Format(("variable", "number"), "{variable} = {number}", "What is the value of {variable}?"),
    "called": Format(
        ("who", "name"), "the dog of {who} was called {name}", "What was the dog of {who} called?", "It was {name}"
    ),
    "serial": Format(
        ("thing", "serial"), "The serial of {thing} reads {serial}", "What does the serial of {thing} read?"
    ),
    "password": Format(("thing", "words"), "The password of {thing} is {words}", "What is the password of {thing}?"),
}
"""Kinds of facts by name. Beside them, sentences of the text itself are asked for."""


def make_document(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    rng: random.Random,
    formats: Sequence[str],
    quotes: bool,
    *,
    least: int,
    most: int,
) -> FactText:
    """Hides facts in the first part of a text and asks for them at its end.

    Half of the texts have two to four facts of one kind, so that the subject of a fact matters as much as its value.
    The others have one to three facts of any kinds. What does not fit is cut off the end of the text, behind its facts.

    Args:
        text: The text.
        tokenizer: The model's tokenizer; its chat template is used if it has one.
        rng: Source of all random choices.
        formats: Names of the kinds of facts.
        quotes: Whether to ask for a sentence of the text itself, too.
        least: Fewest tokens of the text with its questions.
        most: Most of them.

    Raises:
        UnfitText: The text has no sentences to hide something between, or no words, or is too short, or leaves no room
            for the questions.
    """
    ends = [match.end() for match in _ENDS.finditer(text)]
    early = ends[: max(1, int(len(ends) * _BEFORE))]
    if len(ends) < _LEAST_ENDS:
        raise UnfitText(f"a text has fewer than {_LEAST_ENDS} sentences, so nothing can be hidden in it")
    asked = [quoted] if quotes and (quoted := _quote(text[: early[-1]], rng)) else []
    hidden = _facts(text, rng, formats)
    places = sorted(rng.choices(early, k=len(hidden)), reverse=True)
    whole, begins = _hide(text, [fact for _, fact in hidden], places)
    asked += [(fact.question, fact.answer) for _, fact in hidden]
    rng.shuffle(asked)
    opening_T, text_T, questions_T = _tokens(tokenizer, whole, asked)
    shift, room = opening_T.numel(), most - opening_T.numel() - questions_T.numel()
    if room < text_T.numel() and room < _count(tokenizer, whole[: early[-1] + len(whole) - len(text)]):
        raise UnfitText(f"a text leaves no room for its questions in {most:,} tokens")
    ids_T = torch.cat((opening_T, text_T[:room], questions_T))
    if ids_T.numel() < least:
        raise UnfitText(f"a text and its questions have fewer than {least:,} tokens")
    values = tuple(
        (name, _positions(tokenizer, whole, begin, begin + len(fact.value), shift))
        for (name, fact), begin in zip(hidden, begins)
    )
    return FactText(ids_T, ids_T.numel() - questions_T.numel(), values)


def _hide(text: str, facts: Sequence[Fact], places: Sequence[int]) -> tuple[str, list[int]]:
    """A text with facts at some places, the last one first, and where the value of each begins."""
    after = []  # characters from each value's first to the end, which facts before it do not move
    for fact, place in zip(facts, places):
        text = f"{text[:place]}{fact.sentence}. {text[place:]}"
        after.append(len(text) - place - fact.begin)
    return text, [len(text) - count for count in after]


def _tokens(
    tokenizer: PreTrainedTokenizerBase, text: str, asked: Sequence[tuple[str, str]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids of what comes before a text, of the text, and of the questions with their answers."""
    chat = prompts.has_chat(tokenizer)
    first = prompts.passage(tokenizer, text, asked[0][0], chat)
    parts = [first.closing, prompts.tokens(tokenizer, f" {asked[0][1]}")]
    for question, answer in asked[1:]:
        turn = prompts.follow_up(tokenizer, "", question, chat)
        parts += [turn.opening, turn.closing, prompts.tokens(tokenizer, f" {answer}")]
    return first.opening, first.text, torch.cat(parts)


def _facts(text: str, rng: random.Random, formats: Sequence[str]) -> list[tuple[str, Fact]]:
    """Facts with the names of their kinds; all questions differ."""
    vocabularies = (sorted(set(words.findall(text))) for words in _WORDS)
    source = Source(rng, next((words for words in vocabularies if len(words) >= _LEAST_WORDS), []))
    if not source.words:
        raise UnfitText(f"a text has fewer than {_LEAST_WORDS} words, so nothing can be made of them")
    alike = rng.random() < _ALIKE
    kinds = [rng.choice(formats)] * rng.randint(2, 4) if alike else rng.choices(formats, k=rng.randint(1, 3))
    pairs = [(kind, FORMATS[kind].make(source)) for kind in kinds]
    return list({fact.question: (kind, fact) for kind, fact in pairs}.values())


def _quote(text: str, rng: random.Random) -> tuple[str, str] | None:
    """A question for a sentence by its beginning, and the sentence."""
    fitting = [each for each in _ENDS.split(text) if _QUOTED[0] < len(each) < _QUOTED[1]]
    if not fitting:
        return None
    words = rng.choice(fitting).split()
    return f'How does the sentence that begins with "{" ".join(words[:4])}" go on?', " ".join(words)


def _positions(tokenizer: PreTrainedTokenizerBase, text: str, begin: int, stop: int, shift: int) -> tuple[int, ...]:
    """Indices in the document of the tokens of some characters of its text."""
    return tuple(range(shift + _count(tokenizer, text[:begin].rstrip(" ")), shift + _count(tokenizer, text[:stop])))


def _count(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])
