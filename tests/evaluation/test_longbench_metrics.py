"""LongBench's metrics, which are also the paper's for two tasks of InfiniteBench, against scores computed by hand."""

from __future__ import annotations

import pytest

from ahn.evaluation.benchmarks import find
from ahn.evaluation.errors import AnswerError
from ahn.evaluation.metrics import METRICS
from tests.evaluation.common import Row, by_hand, score

F1_EN: list[Row] = [
    ("Miller v. California", ["Miller v. California"], 1),
    ("the Miller case", ["Gates v. Collier", "Miller"], 2 / 3),  # the best answer counts
    ("It is Miller", ["Miller"], 1 / 2),
    ("miller!", ["The Miller"], 1),
    ("Miller\nCalifornia", ["California"], 2 / 3),  # all lines count
    ("no no", ["no"], 2 / 3),
    ("Gates", ["Miller"], 0),
    ("", ["Miller"], 0),
    ("?", ["Miller"], 0),
    ("Miller", [""], 0),
    ("Miller", [], 0),
]
FIRST_LINE: list[Row] = [
    ("Miller", ["Miller"], 1),
    ("\n\nMiller\nQuestion: who?", ["Miller"], 1),  # leading line breaks go first
    ("Gates\nMiller", ["Miller"], 0),
    (" \nMiller", ["Miller"], 0),  # a line of spaces is a line
    ("Miller case\nPassage", ["miller"], 2 / 3),
    ("Miller\r\nGates", ["Miller"], 1),
    ("Gates", ["Miller", "gates"], 1),
    ("\n\n", ["Miller"], 0),
    ("", ["Miller"], 0),
    ("?!\nMiller", ["Miller"], 0),
    ("Miller", [], 0),
]
ROUGE: list[Row] = [
    ("the cat sat", ["the cat sat"], 1),
    ("the cat sat", ["the cat ran"], 2 / 3),
    ("the cat", ["the cat sat on"], 2 / 3),  # 2 of 2, 2 of 4
    ("cat the", ["the cat"], 1 / 2),
    ("the cat. sat on", ["sat on. the cat"], 1),  # sentences end at full stops
    ("the the cat", ["the cat"], 1),  # distinct words are counted
    ("The cat", ["the cat"], 1 / 2),  # case counts
    ("the cat,", ["the cat"], 1 / 2),  # and so does punctuation
    ("a dog", ["the cat", "a dog ran"], 4 / 5),  # the best answer counts
    ("dog", ["cat"], 0),
    ("", ["the cat"], 0),
    ("...", ["the cat"], 0),
    ("the cat", [""], 0),
    ("the cat", [], 0),
]
ROUGE_ZH: list[Row] = [
    ("北京", ["北京"], 1),
    ("北京是中国的首都", ["中国的首都是北京"], 3 / 5),  # 中国 的 首都 of five words each
    ("北京是中国的首都", ["首都"], 1 / 3),
    ("苹果 香蕉", ["苹果"], 2 / 3),
    ("香蕉 苹果", ["苹果 香蕉"], 1 / 2),
    ("长江，黄河", ["长江 黄河"], 4 / 5),  # the comma is a word: 2 of 3, 2 of 2
    ("的", ["的"], 1),  # no blacklist
    ("上海", ["北京", "上海"], 1),
    ("ABC", ["abc"], 0),  # case counts
    ("上海", ["北京"], 0),
    ("", ["北京"], 0),
    (" ", ["北京"], 0),
    ("北京", [""], 0),
    ("北京", [], 0),
]
TABLES = {
    "hotpotqa": F1_EN,
    "musique": F1_EN,
    "narrativeqa": F1_EN,
    "triviaqa": FIRST_LINE,
    "qmsum": ROUGE,
    "dureader": ROUGE_ZH,
}
PAPER = {"longbook_qa_eng": ROUGE, "longbook_qa_chn": ROUGE_ZH}


@pytest.mark.parametrize(("task", "row"), [(task, row) for task, table in TABLES.items() for row in table])
def test_metrics(task: str, row: Row) -> None:
    assert score(find(task).task.official.metric, row) == by_hand(row)


@pytest.mark.parametrize(("task", "row"), [(task, row) for task, table in PAPER.items() for row in table])
def test_the_papers_scoring_of_infinitebench(task: str, row: Row) -> None:
    assert score(find(task).task.rules("paper").metric, row) == by_hand(row)


@pytest.mark.parametrize("metric", [name for name in METRICS if name.startswith("longbench.")])
def test_answers_must_be_texts(metric: str) -> None:
    with pytest.raises(AnswerError, match="an answer must be a text, not 3"):
        METRICS[metric].score("text", ["fine", 3])


def test_a_text_too_long_for_the_package_scores_0() -> None:
    """Its recursion is as deep as a text is long."""
    text = " ".join(map(str, range(1100)))
    assert METRICS["longbench.rouge_l"].score(text, [text]) == 0
