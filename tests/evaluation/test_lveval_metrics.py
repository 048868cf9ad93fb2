"""LV-Eval's metrics against scores that were computed by hand from its rules."""

from __future__ import annotations

from typing import Any

import pytest

from ahn.evaluation.errors import AnswerError
from ahn.evaluation.metrics import METRICS
from ahn.evaluation.metrics.lveval import BLACKLIST_EN, BLACKLIST_ZH, keyword_recall
from tests.evaluation.common import Row, by_hand, rows, score

FIVE, SIX = "alpha beta gamma delta epsilon", "alpha beta gamma delta epsilon zeta"
TEN = f"{FIVE} zeta eta theta iota kappa"

GATED_EN: list[Row] = [
    ("Paris", ["Paris"], "Paris", 1),
    ("The capital is Paris.", ["Paris"], "Paris", 1 / 2),  # 1 of 3 words, 1 of 1
    ("U.S.A.", ["the USA"], "USA", 1),
    ("well-known", ["well known"], None, 0),
    # the gate: 1/5 and 2/10 are 20 %, 1/6 is just under, 1/10 far under
    ("alpha", ["alpha one"], FIVE, 2 / 3),
    ("alpha", ["alpha one"], SIX, 0),
    ("alpha beta", ["alpha beta two"], TEN, 4 / 5),
    ("alpha", ["alpha one"], TEN, 0),
    ("alpha alpha alpha", ["alpha one"], TEN, 0),  # one keyword, however often it is said
    ("go", ["go go"], "go go go go go", 2 / 3),  # 1 of 5: keywords count as often as they stand there
    # the blacklist: its words are never found, though they count among the keywords
    ("it was in Rome", ["it was in London"], "it was in London", 0),
    ("Thames", ["river Thames"], "he was with her by the river Thames", 0),  # 1 of 7
    ("Thames", ["river Thames"], "by the river Thames", 2 / 3),  # 1 of 3
    ("he is it", ["he is it"], "he is it", 0),
    # F1 is over all words, those of the blacklist too
    ("it was in London", ["in London"], "London", 2 / 3),  # 2 of 4, 2 of 2
    ("yes yes yes", ["yes yes no"], "yes", 2 / 3),
    # no keywords, no gate
    ("a red car", ["red bus"], None, 1 / 2),
    ("a red car", ["red bus"], "", 1 / 2),
    ("a red car", ["red bus"], "?! ...", 1 / 2),
    ("a red car", ["red bus"], "the", 1 / 2),
    ("in it", ["in it"], None, 1),
    # nothing to compare
    ("", ["Paris"], "Paris", 0),
    ("", ["Paris"], None, 0),
    ("...!", ["Paris"], None, 0),
    ("Paris", ["..."], None, 0),
    ("Paris", [""], None, 0),
    ("Paris", [], "Paris", 0),
    ("Paris", ["Rome", "Paris"], None, 0),  # only the first answer counts
]
FRUIT = "苹果 香蕉 西瓜 葡萄 桃子"
EIGHT = f"{FRUIT} 长江 黄河 泰山"
GATED_ZH: list[Row] = [
    ("北京", ["北京"], "北京", 1),
    ("北京是中国的首都", ["北京"], "北京", 1 / 3),  # 1 of 5, 1 of 1
    ("长江，黄河！", ["长江 黄河"], None, 1),
    ("ABC公司", ["abc公司"], None, 1),
    ("《红楼梦》", ["红楼梦"], None, 2 / 3),  # the opening bracket stays a word
    # the gate: 2/5 is 40 %, 3/8 just under, 1/5 under
    ("苹果 香蕉", ["苹果 香蕉 西瓜"], FRUIT, 4 / 5),
    ("苹果 香蕉 西瓜", ["苹果 香蕉 西瓜"], EIGHT, 0),
    ("苹果 香蕉 西瓜 葡萄", ["苹果 香蕉 西瓜 葡萄"], EIGHT, 1),
    ("苹果", ["苹果"], FRUIT, 0),
    # without keywords the words of the answer are the keywords
    ("苹果", [FRUIT], None, 0),  # 1 of 5, though F1 would be 1/3
    ("苹果 香蕉", [FRUIT], None, 4 / 7),  # 2 of 2, 2 of 5
    ("苹果", [FRUIT], "", 0),
    ("苹果 香蕉", [FRUIT], "。！", 4 / 7),
    # the blacklist
    ("首都 的 上海", ["首都 的 北京"], "首都 的 北京", 0),  # 1 of 3; with 的 it would be 2 of 3
    ("首都", ["首都 的 北京"], "首都 的", 1 / 2),  # 1 of 2; F1: 1 of 1, 1 of 3
    ("的 北京", ["的 北京"], "北京", 1),
    ("C", ["C"], "C", 0),
    ("是的", ["是的"], "的 是", 0),
    # nothing to compare
    ("", ["北京"], "北京", 0),
    ("。，！", ["北京"], None, 0),
    ("北京", ["。"], None, 0),
    ("。", ["。"], "。", 0),
    ("北京", [], None, 0),
    ("北京", [""], "北京", 0),
    ("上海", ["北京", "上海"], None, 0),
]
F1_EN: list[Row] = [
    ("Ludwig van Beethoven", ["Ludwig Beethoven"], 4 / 5),  # 2 of 3, 2 of 2
    ("Beethoven", ["Ludwig van Beethoven"], 1 / 2),
    ("beethoven!", ["The Beethoven"], 1),
    ("He is Beethoven", ["Beethoven"], 1 / 2),
    ("he is", ["he is"], 1),  # no gate, no blacklist
    ("Mozart", ["Beethoven"], 0),
    ("Mozart", ["Beethoven", "Mozart"], 0),
    ("Beethoven Beethoven", ["Beethoven"], 2 / 3),
    ("Bach, Bach and Bach", ["Bach Bach"], 2 / 3),  # 2 of 4, 2 of 2
    ("", ["Beethoven"], 0),
    ("?!", ["Beethoven"], 0),
    ("Beethoven", [""], 0),
    ("Beethoven", [], 0),
    ("the", ["the"], 0),
]
F1_ZH: list[Row] = [
    ("贝多芬", ["贝多芬"], 1),
    ("北京是中国的首都", ["首都"], 1 / 3),
    ("北京是中国的首都", ["中国的首都是北京"], 1),  # order does not count
    ("首都 北京", ["首都 上海"], 1 / 2),
    ("苹果", [FRUIT], 1 / 3),  # no gate
    ("的", ["的"], 1),  # no blacklist
    ("长江。", ["长江"], 1),
    ("长江 长江", ["长江"], 2 / 3),
    ("ABC", ["abc"], 1),
    ("上海", ["北京"], 0),
    ("上海", ["北京", "上海"], 0),
    ("", ["北京"], 0),
    ("！", ["北京"], 0),
    ("北京", [], 0),
    ("北京", [""], 0),
]
DUREADER: list[Row] = [
    ("苹果 香蕉", ["苹果 香蕉"], 1),
    ("苹果", ["苹果 香蕉 西瓜"], 1 / 2),  # 1 of 1, 1 of 3
    ("苹果 香蕉 西瓜 葡萄", ["苹果"], 2 / 5),  # 1 of 4, 1 of 1
    ("香蕉 苹果", ["苹果 香蕉"], 1 / 2),  # the longest common sequence has one word
    ("北京是中国的首都", ["中国的首都是北京"], 2 / 3),  # 中国 首都 of three words each
    ("的 苹果 是", ["苹果"], 1),
    ("苹果，香蕉！", ["苹果 香蕉"], 1),
    ("ABC 苹果", ["abc 苹果"], 1),
    ("苹果 苹果 苹果", ["苹果"], 1),  # the package counts distinct words
    ("苹果", ["香蕉"], 0),
    ("苹果", ["香蕉", "苹果"], 0),
    # the package raises for these, which scores 0
    ("", ["苹果"], 0),
    ("。，", ["苹果"], 0),
    ("的 和 是", ["苹果"], 0),
    ("苹果", [""], 0),
    ("苹果", ["的 和 是"], 0),
    ("苹果", [], 0),
    ("...", ["..."], 0),
]


@pytest.mark.parametrize("row", rows(GATED_EN))
def test_gated_f1_en(row: Row) -> None:
    assert score("lveval.gated_f1_en", row) == by_hand(row)


@pytest.mark.parametrize("row", rows(GATED_ZH))
def test_gated_f1_zh(row: Row) -> None:
    assert score("lveval.gated_f1_zh", row) == by_hand(row)


@pytest.mark.parametrize("row", rows(F1_EN))
def test_f1_en(row: Row) -> None:
    assert score("lveval.f1_en", row) == by_hand(row)


@pytest.mark.parametrize("row", rows(F1_ZH))
def test_f1_zh(row: Row) -> None:
    assert score("lveval.f1_zh", row) == by_hand(row)


@pytest.mark.parametrize("row", rows(DUREADER))
def test_rouge_l_without_blacklist_zh(row: Row) -> None:
    assert score("lveval.rouge_l_without_blacklist_zh", row) == by_hand(row)


@pytest.mark.parametrize("metric", [name for name in METRICS if name.startswith("lveval.")])
@pytest.mark.parametrize("answers", [[3], [None], ["fine", ["nested"]]])
def test_answers_must_be_texts(metric: str, answers: list[Any]) -> None:
    with pytest.raises(AnswerError, match="an answer must be a text"):
        METRICS[metric].score("text", answers)


def test_the_blacklists() -> None:
    assert (len(BLACKLIST_EN), len(BLACKLIST_ZH)) == (38, 85)
    assert {"because", "does", "her"} <= BLACKLIST_EN
    assert {"的", "‰", "×", "亿元", "c", "度"} <= BLACKLIST_ZH


def test_keyword_recall() -> None:
    assert keyword_recall(["in", "rome", "rome"], ["in", "rome", "rome", "rome"], BLACKLIST_EN) == 2 / 4
    assert keyword_recall([], ["rome"], BLACKLIST_EN) == 0
