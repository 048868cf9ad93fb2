"""Metrics of the public benchmarks, as pure functions of texts: no model, no tensor, no file.

Each takes a prediction and the answers of its record, LV-Eval's gated ones also the keywords, and gives 0 to 1.
`METRICS` has them under the names that the benchmarks' files use. Answers of a kind that a metric does not compare are
an `AnswerError`. The packages that some need (jieba, rouge, rouge_score: the extra `eval`) are imported when such a
metric is first used; a missing one is an `EvaluationError`.

Sources: arXiv 2402.05136 (LV-Eval), 2402.13718 (InfiniteBench), 2308.14508, table 1 (LongBench), and their scorers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from ahn.evaluation.metrics import choices, infinitebench, lveval
from ahn.evaluation.metrics.answers import first, texts
from ahn.evaluation.metrics.rouge import rouge_l, rouge_l_zh, rouge_lsum
from ahn.evaluation.metrics.words import bare_zh, f1, words_en, words_zh

__all__ = ["METRICS", "Metric"]

Compare = Callable[[str, str], float]


@dataclasses.dataclass(frozen=True)
class Metric:
    """A rule that scores one prediction.

    Attributes:
        title: What it measures, in a few words.
        function: The rule.
        keywords: Whether it also looks at the keywords of a record.
    """

    title: str
    function: Callable[..., float]
    keywords: bool = False

    def score(self, prediction: str, answers: Sequence[Any], keywords: str | None = None) -> float:
        """Scores a prediction, 0 to 1.

        Args:
            prediction: What the model wrote.
            answers: Those of the record.
            keywords: Those of the record; most metrics do not look at them.

        Raises:
            AnswerError: The answers are not of the kind that this metric compares.
            EvaluationError: A package that it needs is not installed.
        """
        if self.keywords:
            return self.function(prediction, answers, keywords)
        return self.function(prediction, answers)


def best(compare: Compare) -> Callable[..., float]:
    """A rule by which the best of several answers counts.

    Args:
        compare: Scores a prediction against one answer.
    """
    return lambda prediction, answers: max((compare(prediction, each) for each in texts(answers)), default=0.0)


def against_first(compare: Compare) -> Callable[..., float]:
    """A rule by which only the first answer counts, as in LV-Eval.

    Args:
        compare: Scores a prediction against one answer.
    """
    return lambda prediction, answers: compare(prediction, first(answers))


def f1_of(words: Callable[[str], Sequence[str]]) -> Compare:
    """F1 of the words of two texts.

    Args:
        words: The words of a text.
    """
    return lambda prediction, answer: f1(words(prediction), words(answer))


def first_line_f1_en(prediction: str, answer: str) -> float:
    """F1 of English words of the first line that is not empty, for triviaqa."""
    return f1_of(words_en)(prediction.lstrip("\n").split("\n")[0], answer)


METRICS = {
    "lveval.gated_f1_en": Metric("F1, keywords >= 20 %", lveval.gated_f1_en, keywords=True),
    "lveval.gated_f1_zh": Metric("F1, keywords >= 40 %", lveval.gated_f1_zh, keywords=True),
    "lveval.f1_en": Metric("F1", against_first(f1_of(words_en))),
    "lveval.f1_zh": Metric("F1", against_first(f1_of(words_zh))),
    "lveval.rouge_l_without_blacklist_zh": Metric(
        "ROUGE-L, blacklist", against_first(lveval.rouge_l_without_blacklist_zh)
    ),
    "infinitebench.first_digits": Metric("first digits", infinitebench.first_digits),
    "infinitebench.kv_retrieval": Metric("word found", infinitebench.kv_retrieval),
    "infinitebench.longdialogue_qa_eng": Metric("name found", infinitebench.longdialogue_qa_eng),
    "infinitebench.code_run": Metric("last number", infinitebench.code_run),
    "infinitebench.code_debug": Metric("option", choices.code_debug),
    "infinitebench.longbook_choice_eng": Metric("option", choices.longbook_choice_eng),
    "infinitebench.longbook_qa_eng": Metric("F1", best(f1_of(words_en))),
    "infinitebench.longbook_qa_chn": Metric("F1 of characters", best(f1_of(bare_zh))),
    "infinitebench.longbook_sum_eng": Metric("ROUGE-Lsum", best(rouge_lsum)),
    "infinitebench.math_find": Metric("first number", infinitebench.math_find),
    "infinitebench.math_calc": Metric("right prefix", infinitebench.math_calc),
    "longbench.f1_en": Metric("F1", best(f1_of(words_en))),
    "longbench.first_line_f1_en": Metric("F1 of first line", best(first_line_f1_en)),
    "longbench.rouge_l": Metric("ROUGE-L", best(rouge_l)),
    "longbench.rouge_l_zh": Metric("ROUGE-L", best(rouge_l_zh)),
}
