"""What a word is, in English and in Chinese, and how lists of words are compared."""

from __future__ import annotations

import pytest

from ahn.evaluation.metrics.words import bare_zh, f1, segments_zh, words_en, words_zh


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The Cat sat.", ["cat", "sat"]),
        ("a an the A An The", []),
        ("another theatre, Anna", ["another", "theatre", "anna"]),  # articles are whole words
        ("U.S.A. isn't well-known", ["usa", "isnt", "wellknown"]),  # punctuation is deleted, not replaced
        ("the-best a.m.", ["thebest", "am"]),  # and before the articles are
        ("  two\t\nlines ", ["two", "lines"]),
        ("!?., ;:'\"()[]{}<>@#$%^&*_-+=|\\/~`", []),
        ("“quoted” — dash…", ["“quoted”", "—", "dash…"]),  # ASCII punctuation alone
        ("3.14 1,000", ["314", "1000"]),
        ("", []),
    ],
)
def test_english_words(text: str, words: list[str]) -> None:
    assert words_en(text) == words


@pytest.mark.parametrize(
    ("text", "bare"),
    [
        ("北京，上海。", "北京上海"),
        ("ABC 公司", "abc公司"),
        ("“引号”‘单’", "引号单"),
        ("（一）【二】「三」『四』", "一二三四"),
        ("a.b,c!d？", "abcd"),
        ("……——～", ""),
        ("\u3000全角\u3000空格 ", "全角空格"),
        ("《红楼梦》", "《红楼梦"),  # the benchmarks' list has the closing bracket alone
        ("１２３", "１２３"),  # full-width digits are no punctuation
        ("", ""),
    ],
)
def test_chinese_without_punctuation(text: str, bare: str) -> None:
    assert bare_zh(text) == bare


@pytest.mark.parametrize(
    ("text", "segments"),
    [
        ("北京是中国的首都", ["北京", "是", "中国", "的", "首都"]),
        ("中国的首都是北京", ["中国", "的", "首都", "是", "北京"]),
        ("长江，黄河！", ["长江", "，", "黄河", "！"]),
        ("ABC公司", ["ABC", "公司"]),
        ("苹果 香蕉", ["苹果", " ", "香蕉"]),
        ("《红楼梦》", ["《", "红楼梦", "》"]),
    ],
)
def test_chinese_segments(text: str, segments: list[str]) -> None:
    """The hand-computed tables of the Chinese metrics rest on these."""
    assert segments_zh(text) == segments


def test_chinese_words() -> None:
    assert words_zh("ABC公司，在 北京。") == ["abc", "公司", "在", "北京"]
    assert words_zh("，。！ ") == []


def test_f1_counts_words_as_often_as_both_have_them() -> None:
    assert f1(["a", "a", "b"], ["a", "b", "b"]) == pytest.approx(2 / 3)
    assert f1("abb", "ab") == pytest.approx(4 / 5)
    assert f1([], []) == f1(["a"], []) == f1([], ["a"]) == f1(["a"], ["b"]) == 0
