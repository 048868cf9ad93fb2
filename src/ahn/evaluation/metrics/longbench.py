"""LongBench's metrics for the six tasks that the paper reports; of several answers the best counts.

Source: arXiv 2308.14508, table 1, and the benchmark's published scorers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ahn.evaluation.metrics import rouge
from ahn.evaluation.metrics.answers import texts
from ahn.evaluation.metrics.words import best_f1, words_en


def f1_en(prediction: str, answers: Sequence[Any]) -> float:
    """F1 of English words.

    Raises:
        AnswerError: An answer is no text.
    """
    return best_f1(words_en(prediction), map(words_en, texts(answers)))


def first_line_f1_en(prediction: str, answers: Sequence[Any]) -> float:
    """F1 of English words of the first line that is not empty, for triviaqa.

    Raises:
        AnswerError: An answer is no text.
    """
    return f1_en(prediction.lstrip("\n").split("\n")[0], answers)


def rouge_l(prediction: str, answers: Sequence[Any]) -> float:
    """ROUGE-L of words between spaces.

    Raises:
        AnswerError: An answer is no text.
        EvaluationError: `rouge` is not installed.
    """
    return max((rouge.rouge_l(prediction, answer) for answer in texts(answers)), default=0.0)


def rouge_l_zh(prediction: str, answers: Sequence[Any]) -> float:
    """ROUGE-L of jieba's segments.

    Raises:
        AnswerError: An answer is no text.
        EvaluationError: jieba or `rouge` is not installed.
    """
    return max((rouge.rouge_l_zh(prediction, answer) for answer in texts(answers)), default=0.0)
