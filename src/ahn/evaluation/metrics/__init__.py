"""Metrics of the public benchmarks, as pure functions of texts: no model, no tensor, no file.

Each takes a prediction and the answers of its record, LV-Eval's gated ones also the keywords, and gives 0 to 1.
`METRICS` has them under the names that the benchmarks' files use. The packages that some need (jieba, rouge,
rouge_score: the extra `eval`) are imported when such a metric is first used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from ahn.evaluation.metrics import choices, infinitebench, longbench, lveval

__all__ = ["METRICS", "Metric"]


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


METRICS = {
    "lveval.gated_f1_en": Metric("F1, keywords >= 20 %", lveval.gated_f1_en, keywords=True),
    "lveval.gated_f1_zh": Metric("F1, keywords >= 40 %", lveval.gated_f1_zh, keywords=True),
    "lveval.f1_en": Metric("F1", lveval.f1_en),
    "lveval.f1_zh": Metric("F1", lveval.f1_zh),
    "lveval.rouge_l_without_blacklist_zh": Metric("ROUGE-L, blacklist", lveval.rouge_l_without_blacklist_zh),
    "infinitebench.first_digits": Metric("first digits", infinitebench.first_digits),
    "infinitebench.kv_retrieval": Metric("word found", infinitebench.kv_retrieval),
    "infinitebench.longdialogue_qa_eng": Metric("name found", infinitebench.longdialogue_qa_eng),
    "infinitebench.code_run": Metric("last number", infinitebench.code_run),
    "infinitebench.code_debug": Metric("option", choices.code_debug),
    "infinitebench.longbook_choice_eng": Metric("option", choices.longbook_choice_eng),
    "infinitebench.longbook_qa_eng": Metric("F1", infinitebench.longbook_qa_eng),
    "infinitebench.longbook_qa_chn": Metric("F1 of characters", infinitebench.longbook_qa_chn),
    "infinitebench.longbook_sum_eng": Metric("ROUGE-Lsum", infinitebench.longbook_sum_eng),
    "infinitebench.math_find": Metric("first number", infinitebench.math_find),
    "infinitebench.math_calc": Metric("right prefix", infinitebench.math_calc),
    "longbench.f1_en": Metric("F1", longbench.f1_en),
    "longbench.first_line_f1_en": Metric("F1 of first line", longbench.first_line_f1_en),
    "longbench.rouge_l": Metric("ROUGE-L", longbench.rouge_l),
    "longbench.rouge_l_zh": Metric("ROUGE-L", longbench.rouge_l_zh),
}
