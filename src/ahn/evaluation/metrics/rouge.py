"""ROUGE-L by the two packages that the benchmarks use, which differ: neither is replaced by one of our own."""

from __future__ import annotations

from ahn.evaluation import libraries
from ahn.evaluation.metrics.words import segments_zh


def rouge_l(prediction: str, answer: str) -> float:
    """F-measure of ROUGE-L, 0 to 1, by the package `rouge`, which counts distinct words and splits at full stops.

    Whatever that package raises scores 0, as in LongBench and LV-Eval: texts without a word, and texts so long that its
    recursion ends.
    """
    scorer = libraries.rouge()
    try:
        return float(scorer.get_scores([prediction], [answer], avg=True)["rouge-l"]["f"])
    except Exception:  # its kinds are many and no part of its interface
        return 0.0


def rouge_l_zh(prediction: str, answer: str) -> float:
    """`rouge_l` of two Chinese texts, over jieba's segments."""
    return rouge_l(" ".join(segments_zh(prediction)), " ".join(segments_zh(answer)))


def rouge_lsum(prediction: str, answer: str) -> float:
    """F-measure of ROUGE-Lsum, 0 to 1, by the package `rouge_score`; lines are sentences."""
    return float(libraries.rouge_lsum_scorer().score(answer, prediction)["rougeLsum"].fmeasure)
