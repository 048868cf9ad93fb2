"""What LV-Eval's metrics have of their own: a gate of keywords before F1, and ROUGE-L without common words.

Source: arXiv 2402.05136, section 3.3, and the benchmark's published scorers.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from ahn.evaluation.metrics.answers import first
from ahn.evaluation.metrics.rouge import rouge_l
from ahn.evaluation.metrics.words import bare_zh, f1, overlap, segments_zh, words_en, words_zh

GATE_EN = 0.2
GATE_ZH = 0.4
_COMMON_EN = """
and to of in her was with for it from is that his he by she they or at because be on are their what as had were about
being this who but have has when which does
"""
_COMMON_ZH = """
的 和 是 等 在 年 可以 为 与 ‰ 了 或 一种 月 c 至 日 有 进行 于 不 中 × 根据 小 由 亩 也 要 指 法 会 元 主要 以及
通过 首先 对 然后 号 以 所 后 丁 包括 无 将 用 能 形 方面 因素 位于 而 从 到 一定 用于 但 使用 让 具有 并 亿元 万元
上 类 基于 才 来 地 片 其他 个 或者 变得 时 给 你 使 条 受 已经 带 度
"""
BLACKLIST_EN = frozenset(_COMMON_EN.split())
BLACKLIST_ZH = frozenset(_COMMON_ZH.split())


def gated_f1_en(prediction: str, answers: Sequence[Any], keywords: str | None = None) -> float:
    """F1 of English words, 0 where the prediction has under 20 % of the keywords; without keywords there is no gate.

    Args:
        prediction: What the model wrote.
        answers: Of which the first counts.
        keywords: Those of the answer, as one text; nothing but punctuation counts as none.
    """
    predicted, answer = words_en(prediction), words_en(first(answers))
    return _gated_f1(predicted, answer, words_en(keywords or ""), BLACKLIST_EN, GATE_EN)


def gated_f1_zh(prediction: str, answers: Sequence[Any], keywords: str | None = None) -> float:
    """F1 of Chinese words, 0 where the prediction has under 40 % of the keywords.

    Args:
        prediction: What the model wrote.
        answers: Of which the first counts.
        keywords: Those of the answer, as one text. Without them, or where they are nothing but punctuation, all words
            of the answer are keywords.
    """
    predicted, answer = words_zh(prediction), words_zh(first(answers))
    return _gated_f1(predicted, answer, words_zh(keywords or "") or answer, BLACKLIST_ZH, GATE_ZH)


def rouge_l_without_blacklist_zh(prediction: str, answer: str) -> float:
    """ROUGE-L of two Chinese texts without the words of the blacklist."""
    return rouge_l(_telling_words(prediction), _telling_words(answer))


def keyword_recall(predicted: Sequence[str], keywords: Sequence[str], blacklist: Collection[str]) -> float:
    """Share of the keywords that a prediction has. Blacklisted words count among the keywords, but never as found.

    Args:
        predicted: Words of the prediction.
        keywords: At least one.
        blacklist: Words that are too common to tell anything.
    """
    counts = overlap(predicted, keywords)
    return sum(count for word, count in counts.items() if word not in blacklist) / len(keywords)


def _gated_f1(
    predicted: Sequence[str], answer: Sequence[str], keywords: Sequence[str], blacklist: Collection[str], gate: float
) -> float:
    if keywords and keyword_recall(predicted, keywords, blacklist) < gate:
        return 0.0
    return f1(predicted, answer)


def _telling_words(text: str) -> str:
    """A text as the published scorer hands it to ROUGE: cut twice, spaces kept where a word became empty."""
    words = map(bare_zh, segments_zh(" ".join(segments_zh(text))))
    return " ".join(word for word in words if word not in BLACKLIST_ZH)
