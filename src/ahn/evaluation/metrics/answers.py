"""Answers as records hold them, read as the kind that a metric compares."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ahn.evaluation.errors import AnswerError

_WHOLE = re.compile(r"[+-]?[0-9]+")


def texts(answers: Sequence[Any]) -> list[str]:
    """All answers, which are texts.

    Raises:
        AnswerError: One is none.
    """
    for answer in answers:
        if not isinstance(answer, str):
            raise AnswerError(f"an answer must be a text, not {_shown(answer)}. Correct it.")
    return list(answers)


def first(answers: Sequence[Any]) -> str:
    """The first answer, which is a text; without any an empty one, which every metric scores 0.

    Raises:
        AnswerError: One is no text.
    """
    return next(iter(texts(answers)), "")


def label(answers: Sequence[Any]) -> str | None:
    """The first answer written out, or `None` if there is none.

    Raises:
        AnswerError: It is neither a text nor a number.
    """
    if not answers:
        return None
    if isinstance(answers[0], bool) or not isinstance(answers[0], str | int | float):
        raise AnswerError(f"an answer must be a text or a number, not {_shown(answers[0])}. Correct it.")
    return str(answers[0])


def number(answer: Any) -> int | float:
    """A number, also one that is written as text, as the hub's copy of InfiniteBench does.

    Raises:
        AnswerError: It is none.
    """
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        return answer
    if isinstance(answer, str):
        try:
            return int(answer) if _WHOLE.fullmatch(answer.strip()) else float(answer)
        except ValueError:
            pass
    raise AnswerError(f"an answer must be a number, not {_shown(answer)}. Correct it.")


def whole_number(answer: Any) -> int:
    """A whole number, also one that is written as text.

    Raises:
        AnswerError: It is none.
    """
    value = number(answer)
    if not isinstance(value, int):
        raise AnswerError(f"an answer must be a whole number, not {_shown(answer)}. Correct it.")
    return value


def _shown(answer: Any) -> str:
    shown = repr(answer)
    return shown if len(shown) <= 40 else f"{shown[:40]}..."
