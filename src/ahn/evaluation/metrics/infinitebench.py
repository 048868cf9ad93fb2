"""InfiniteBench's scorers, except those of its two tasks with options (`choices.py`).

Right or wrong is 1.0 or 0.0. A record without an answer scores 0. Where a scorer compares with one answer, that is the
first.

Source: arXiv 2402.13718, and the benchmark's published scorers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ahn.evaluation.metrics.answers import label, number, texts, whole_number
from ahn.evaluation.metrics.rouge import rouge_lsum
from ahn.evaluation.metrics.words import bare_zh, best_f1, words_en

_DIGITS = re.compile("[0-9]+")
_NUMBER = re.compile(r"\d+\.\d+|\d+")


def first_digits(prediction: str, answers: Sequence[Any]) -> float:
    """Whether the first run of digits is the answer, digit by digit: passkey and number_string.

    Raises:
        AnswerError: The answer is neither a text nor a number.
    """
    digits = _DIGITS.search(prediction)
    return float(digits is not None and digits[0] == label(answers))


def kv_retrieval(prediction: str, answers: Sequence[Any]) -> float:
    """Whether the value is among the words.

    Raises:
        AnswerError: The answer is neither a text nor a number.
    """
    return float(label(answers) in _words(prediction, "\n:\"'.,?!{}"))


def longdialogue_qa_eng(prediction: str, answers: Sequence[Any]) -> float:
    """Whether the name, which records write in capitals, is among the words in capitals; a name of two words never is.

    Raises:
        AnswerError: The answer is neither a text nor a number.
    """
    return float(label(answers) in [word.upper() for word in _words(prediction, "\n:\"'.,?!{}")])


def code_run(prediction: str, answers: Sequence[Any]) -> float:
    """Whether the last word is the whole number asked for.

    Raises:
        AnswerError: The answer is no whole number.
    """
    words = _words(prediction, "\n.`'\":")
    if not answers or not words:
        return 0.0
    wanted = whole_number(answers[0])
    try:
        return float(int(words[-1]) == wanted)
    except ValueError:
        return 0.0


def math_find(prediction: str, answers: Sequence[Any]) -> float:
    """Whether the first number is the answer; where the answer is whole, one with a decimal point is not.

    Raises:
        AnswerError: The answer is no number.
    """
    if not answers:
        return 0.0
    wanted, match = number(answers[0]), _NUMBER.search(prediction)
    if match is None:
        return 0.0
    try:
        return float(type(wanted)(match[0]) == wanted)
    except ValueError:
        return 0.0


def math_calc(prediction: str, answers: Sequence[Any]) -> float:
    """Share of the answer's numbers up to the first that is wrong or missing; signs are not read.

    Args:
        prediction: What the model wrote; every run of digits is a number.
        answers: The numbers, or a list that holds the list of them.

    Raises:
        AnswerError: One is no whole number.
    """
    wanted = answers[0] if answers and isinstance(answers[0], list | tuple) else answers
    # As text without leading zeros: a run may have more digits than Python turns into a number.
    written = [run.lstrip("0") or "0" for run in _DIGITS.findall(prediction)]
    numbers = [str(whole_number(each)) for each in wanted]
    right = 0
    while right < min(len(written), len(numbers)) and written[right] == numbers[right]:
        right += 1
    return right / len(numbers) if numbers else 0.0


def longbook_qa_eng(prediction: str, answers: Sequence[Any]) -> float:
    """F1 of English words, the best over the answers.

    Raises:
        AnswerError: An answer is no text.
    """
    return best_f1(words_en(prediction), map(words_en, texts(answers)))


def longbook_qa_chn(prediction: str, answers: Sequence[Any]) -> float:
    """F1 of characters without punctuation and white space, the best over the answers.

    Raises:
        AnswerError: An answer is no text.
    """
    return best_f1(bare_zh(prediction), map(bare_zh, texts(answers)))


def longbook_sum_eng(prediction: str, answers: Sequence[Any]) -> float:
    """ROUGE-Lsum, the best over the answers.

    Raises:
        AnswerError: An answer is no text.
        EvaluationError: `rouge_score` is not installed.
    """
    return rouge_lsum(prediction, texts(answers))


def _words(prediction: str, separators: str) -> list[str]:
    """What stands between white space and these characters."""
    return prediction.translate(str.maketrans(separators, " " * len(separators))).split()
