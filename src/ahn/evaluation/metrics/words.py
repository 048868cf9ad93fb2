"""What counts as a word of a text, and how two lists of words are compared.

Source: the normalisation of SQuAD 1.1 (arXiv 1606.05250) and its Chinese counterpart in LongBench (arXiv 2308.14508),
which LV-Eval and InfiniteBench took over.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

from ahn.evaluation.libraries import jieba

_ARTICLES = re.compile(r"\b(?:an?|the)\b")
_DELETED_EN = str.maketrans("", "", string.punctuation)
# The benchmarks' list of Chinese punctuation as ranges. It has holes, such as the opening brackets 《 and 〈 and the
# middle dot, and published scores were computed with them.
_RANGES_ZH = (
    *((0x2013, 0x2014), (0x2018, 0x2019), (0x201B, 0x201F), (0x2026, 0x2027), (0x3001, 0x3003), (0x300B, 0x3011)),
    *((0x3014, 0x301F), (0x3030, 0x3030), (0x303E, 0x303F), (0xFE4F, 0xFE4F), (0xFF01, 0xFF0D), (0xFF0F, 0xFF0F)),
    *((0xFF1A, 0xFF20), (0xFF3B, 0xFF40), (0xFF5B, 0xFF64)),
)
_PUNCTUATION_ZH = "".join(chr(code) for first, last in _RANGES_ZH for code in range(first, last + 1))
_DELETED_ZH = str.maketrans("", "", string.punctuation + _PUNCTUATION_ZH)


def words_en(text: str) -> list[str]:
    """Words of an English text: lower case, without ASCII punctuation, without the articles a, an and the."""
    return _ARTICLES.sub(" ", text.lower().translate(_DELETED_EN)).split()


def bare_zh(text: str) -> str:
    """A Chinese text in lower case, without ASCII and Chinese punctuation and without white space."""
    return "".join(text.lower().translate(_DELETED_ZH).split())


def segments_zh(text: str) -> list[str]:
    """A Chinese text cut by jieba in its accurate mode; joined, the segments are the text."""
    return list(jieba().cut(text, cut_all=False))


def words_zh(text: str) -> list[str]:
    """Words of a Chinese text: its segments, each bare, those left out of which nothing remains."""
    return [word for word in map(bare_zh, segments_zh(text)) if word]


def overlap(predicted: Sequence[str], answer: Sequence[str]) -> Counter[str]:
    """Words that two lists share, each as often as the list that has it less often."""
    return Counter(predicted) & Counter(answer)


def f1(predicted: Sequence[str], answer: Sequence[str]) -> float:
    """Harmonic mean of the shares of words that are shared, 0 to 1; 0 if none is.

    Args:
        predicted: Words of the prediction.
        answer: Words of the answer.
    """
    shared = overlap(predicted, answer).total()
    if not shared:
        return 0.0
    precision, recall = shared / len(predicted), shared / len(answer)
    return 2 * precision * recall / (precision + recall)
