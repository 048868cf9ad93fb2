"""What InfiniteBench's scorers have of their own: what they look for in a free text.

Source: arXiv 2402.13718, and the benchmark's published scorers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ahn.evaluation.metrics.answers import label, number, whole_number

_DIGITS = re.compile("[0-9]+")
_NUMBER = re.compile(r"\d+\.\d+|\d+")


def first_digits(prediction: str, answers: Sequence[Any]) -> float:
    """Whether the first run of digits is the answer, digit by digit: passkey and number_string."""
    digits = _DIGITS.search(prediction)
    return float(digits is not None and digits[0] == label(answers))


def kv_retrieval(prediction: str, answers: Sequence[Any]) -> float:
    """Whether the value is among the words."""
    return float(label(answers) in _words(prediction, "\n:\"'.,?!{}"))


def longdialogue_qa_eng(prediction: str, answers: Sequence[Any]) -> float:
    """Whether the name is among the words in capitals, as records write it; a name of two words never is."""
    return float(label(answers) in [word.upper() for word in _words(prediction, "\n:\"'.,?!{}")])


def code_run(prediction: str, answers: Sequence[Any]) -> float:
    """Whether the last word is the whole number asked for."""
    words = _words(prediction, "\n.`'\":")
    if not answers or not words:
        return 0.0
    answer = whole_number(answers[0])
    try:
        return float(int(words[-1]) == answer)
    except ValueError:
        return 0.0


def math_find(prediction: str, answers: Sequence[Any]) -> float:
    """Whether the first number is the answer; where the answer is whole, one with a decimal point is not."""
    if not answers:
        return 0.0
    answer, match = number(answers[0]), _NUMBER.search(prediction)
    if match is None:
        return 0.0
    try:
        return float(type(answer)(match[0]) == answer)
    except ValueError:
        return 0.0


def math_calc(prediction: str, answers: Sequence[Any]) -> float:
    """Share of the answer's numbers up to the first that is wrong or missing; signs are not read.

    Args:
        prediction: What the model wrote; every run of digits is a number.
        answers: The numbers, or a list that holds the list of them.
    """
    right = answers[0] if answers and isinstance(answers[0], list | tuple) else answers
    # As text without leading zeros: a run may have more digits than Python turns into a number.
    written = [run.lstrip("0") or "0" for run in _DIGITS.findall(prediction)]
    numbers = [str(whole_number(each)) for each in right]
    matching = 0
    while matching < min(len(written), len(numbers)) and written[matching] == numbers[matching]:
        matching += 1
    return matching / len(numbers) if numbers else 0.0


def _words(prediction: str, separators: str) -> list[str]:
    """What stands between white space and these characters."""
    return prediction.translate(str.maketrans(separators, " " * len(separators))).split()
