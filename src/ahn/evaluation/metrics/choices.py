"""The scorers of InfiniteBench's two tasks with four options: which of them a free text chooses.

Source: arXiv 2402.13718, and the benchmark's published scorers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ahn.evaluation.errors import AnswerError
from ahn.evaluation.metrics.answers import texts

LETTERS = "ABCD"
# In the order in which they are looked for; case counts.
_DEBUG_CUES = ("answer is:", "is:", "answer:", "correct option is:")
_CHOICE_CUES = ("answer is:", "answer:", "answer is", "option is")
_DEBUG_CLUTTER = re.compile("[\n`'\"*-]|[Oo]ption")
_CHOICE_CLUTTER = re.compile("[\n\"'.,?!{}]")
_SPACES = re.compile(" {2,}")


def code_debug(prediction: str, answers: Sequence[Any]) -> float:
    """Whether the prediction names the function with the bug, by its letter or its name.

    Args:
        prediction: What the model wrote.
        answers: The function's name and its letter; scores 0 if there are none.
    """
    if not answers:
        return 0.0
    if len(answers) != 2 or texts(answers)[1] not in tuple(LETTERS):
        raise AnswerError("the answers must be the function's name and its letter. Correct them.")
    name, letter = answers
    prediction = prediction.strip()
    if prediction.startswith((f"{letter}.", f"{letter}:")):
        return 1.0
    prediction = _SPACES.sub(" ", _DEBUG_CLUTTER.sub(" ", prediction))
    chosen = _after_cue(prediction, _DEBUG_CUES)
    return float(chosen is not None and chosen.startswith((letter, name)))


def longbook_choice_eng(prediction: str, answers: Sequence[Any]) -> float:
    """Whether the prediction chooses the right option.

    Args:
        prediction: What the model wrote.
        answers: The option's text and its letter, or the letter alone; scores 0 if there are none.
    """
    if not answers:
        return 0.0
    if not set(LETTERS) & set(texts(answers)):
        raise AnswerError("the answers must be the option's text and its letter. Correct them.")
    prediction = prediction.strip()
    if not prediction:
        return 0.0
    if prediction[0] in LETTERS:
        return float(prediction[0] in answers)
    if prediction in answers:
        return 1.0
    prediction = _SPACES.sub(" ", _CHOICE_CLUTTER.sub(" ", prediction))
    chosen = _after_cue(prediction, _CHOICE_CUES)
    if chosen is not None:
        return float(chosen.startswith(tuple(answers)))
    letter = next((word for word in prediction.split() if word in tuple(LETTERS)), None)
    return float(letter in answers)


def with_letter(answers: Sequence[Any], options: Sequence[Any]) -> list[Any]:
    """The right option's text with its letter, where a record has its text alone.

    Args:
        answers: Those of the record.
        options: Its options; without any the answers stay as they are.

    Raises:
        AnswerError: The answer is none of the options.
    """
    if not options or len(answers) != 1 or answers[0] in tuple(LETTERS):
        return list(answers)
    if answers[0] not in options[: len(LETTERS)]:
        raise AnswerError("the answer is none of the four options. Correct it.")
    return [answers[0], LETTERS[list(options).index(answers[0])]]


def _after_cue(prediction: str, cues: Sequence[str]) -> str | None:
    """What follows the first of these cues that is there, one character after it; `None` if none is."""
    for cue in cues:
        if (start := prediction.find(cue)) >= 0:
            return prediction[start + len(cue) + 1 :]
    return None
