"""InfiniteBench's scorers against scores that were computed by hand from its rules."""

from __future__ import annotations

from typing import Any

import pytest

from ahn.evaluation.benchmarks.infinitebench import INFINITEBENCH
from ahn.evaluation.errors import AnswerError
from ahn.evaluation.metrics import METRICS
from ahn.evaluation.metrics.choices import with_letter
from tests.evaluation.common import Row, by_hand, score

PASSKEY: list[Row] = [
    ("71432", ["71432"], 1),
    (" The pass key is 71432.", ["71432"], 1),
    ("密码是71432。", ["71432"], 1),
    ("71432 or 71433", ["71432"], 1),
    ("71432", [71432], 1),
    ("1. 71432", ["71432"], 0),  # the first run of digits decides
    ("7143", ["71432"], 0),
    ("714321", ["71432"], 0),
    ("71,432", ["71432"], 0),
    ("071432", ["71432"], 0),  # digit by digit
    ("７１４３２", ["71432"], 0),
    ("71432", ["99999", "71432"], 0),  # only the first label counts
    ("there is no pass key", ["71432"], 0),
    ("", ["71432"], 0),
    ("?!", ["71432"], 0),
    ("71432", [], 0),
    ("", [""], 0),
]
NUMBER_STRING: list[Row] = [
    ("1111222233", ["1111222233"], 1),
    ("The digits: 1111222233, I think", ["1111222233"], 1),
    ("数字串为1111222233", ["1111222233"], 1),
    ("0000222233", ["0000222233"], 1),
    ("222233", ["0000222233"], 0),
    ("1111222233", [1111222233], 1),
    ("11112222333", ["1111222233"], 0),
    ("1111 222233", ["1111222233"], 0),
    ("one", ["1111222233"], 0),
    ("", ["1111222233"], 0),
    ("...", ["1111222233"], 0),
    ("1111222233", [], 0),
]
KEY = "2a8d601d-1d69-4e64-9f90-8ad825a74195"
KV_RETRIEVAL: list[Row] = [
    (KEY, [KEY], 1),
    (f'"{KEY}"', [KEY], 1),
    (f'{{"value":"{KEY}"}}\n', [KEY], 1),
    (f"It is {KEY}, isn't it?", [KEY], 1),
    (f"值：{KEY}", [KEY], 0),  # a full-width colon separates nothing
    (f"值： {KEY}", [KEY], 1),
    (f"{KEY};", [KEY], 0),  # nor does a semicolon
    (f"({KEY})", [KEY], 0),
    (KEY.upper(), [KEY], 0),
    (KEY[:-1], [KEY], 0),
    (f"{KEY}0", [KEY], 0),
    ("", [KEY], 0),
    ("{}", [KEY], 0),
    (KEY, [], 0),
    (KEY, ["other", KEY], 0),
]
DIALOGUE: list[Row] = [
    ("JOHN", ["JOHN"], 1),
    ("john", ["JOHN"], 1),
    ("I think it's John.", ["JOHN"], 1),
    ("John's", ["JOHN"], 1),  # the apostrophe separates
    ("Johnny", ["JOHN"], 0),
    ("(John)", ["JOHN"], 0),
    ("Mary", ["JOHN", "MARY"], 0),  # only the first label counts
    ("John Smith", ["JOHN SMITH"], 0),  # no word is two words
    ("John Smith", ["SMITH"], 1),
    ("约翰", ["约翰"], 1),
    ("是约翰", ["约翰"], 0),
    ("", ["JOHN"], 0),
    ("?!...", ["JOHN"], 0),
    ("John", [], 0),
]
CODE_RUN: list[Row] = [
    ("4", [4], 1),
    ("4", ["4"], 1),
    (" -477.", [-477], 1),
    ("func_1(3) = 4", [4], 1),
    ("The value is `4`:\n", [4], 1),
    ("结果 是 4", [4], 1),
    ("结果是4", [4], 0),
    ("4 is the answer", [4], 0),  # the last word decides
    ("4.0", [4], 0),  # the point separates, so that the last word is 0
    ("4.0", [0], 1),
    ("+4", [4], 1),
    ("=4", [4], 0),
    ("4", [5, 4], 0),
    ("four", [4], 0),
    ("", [4], 0),
    ("\n'.", [4], 0),
    ("4", [], 0),
]
BUG = ["load_data", "B"]
CODE_DEBUG: list[Row] = [
    ("B.", BUG, 1),
    ("B: load_data", BUG, 1),
    (" \nB. load_data", BUG, 1),
    ("B", BUG, 0),  # a letter needs its point or colon
    ("A.", BUG, 0),
    ("load_data", BUG, 0),
    ("The answer is: B", BUG, 1),
    ("The answer is: `load_data`", BUG, 1),
    ("The answer is: **Option B**", BUG, 1),
    ("The correct option is: B", BUG, 1),
    ("the answer:\nB", BUG, 1),
    ("Answer: B", BUG, 0),  # the cues are in lower case
    ("The answer is:B", BUG, 0),  # one character is skipped, whatever it is
    ("The answer is: (B)", BUG, 0),
    ("This is: A, and the answer is: B", BUG, 1),  # "answer is:" is looked for before "is:"
    ("answer: B, or it is: C", BUG, 0),  # and "is:" before "answer:"
    ("The answer is:", BUG, 0),
    ("答案 answer: B", BUG, 1),
    ("", BUG, 0),
    ("***", BUG, 0),
    ("B.", [], 0),
]
CHOICE: list[Row] = [
    ("C", ["Hall Farm", "C"], 1),
    ("C. Hall Farm", ["Hall Farm", "C"], 1),
    ("\n C", ["Hall Farm", "C"], 1),
    ("C", ["C"], 1),
    ("D. Hall Farm", ["Hall Farm", "C"], 0),
    ("Canada", ["Hall Farm", "C"], 1),  # a first character among ABCD decides
    ("Both, so C", ["Hall Farm", "C"], 0),
    ("Hall Farm", ["Hall Farm", "C"], 1),
    ("Hall Farm.", ["Hall Farm", "C"], 0),
    ("The answer is: C", ["Hall Farm", "C"], 1),
    ("The answer is C.", ["Hall Farm", "C"], 1),
    (
        "The answer is 'Hall Farm'",
        ["Hall Farm", "C"],
        1,
    ),  # the quote becomes a space, two of them one, which is skipped
    ("The right option is C", ["Hall Farm", "C"], 1),
    ("the answer:C", ["Hall Farm", "C"], 0),
    ("the answer is: A, not C", ["Hall Farm", "C"], 0),  # a cue decides, and what follows it
    ("I take C, not A", ["Hall Farm", "C"], 1),  # else the first word that is a letter
    ("I take A, not C", ["Hall Farm", "C"], 0),
    ("I take c", ["Hall Farm", "C"], 0),
    ("答案是 C。", ["Hall Farm", "C"], 0),
    ("答案是 C", ["Hall Farm", "C"], 1),
    ("答案是C", ["Hall Farm", "C"], 0),
    ("none of them", ["Hall Farm", "C"], 0),
    ("", ["Hall Farm", "C"], 0),
    ("?!", ["Hall Farm", "C"], 0),
    ("C", [], 0),
]
QA_ENG: list[Row] = [
    ("Hall Farm", ["Hall Farm"], 1),
    ("the Hall Farm", ["Snowfield", "a hall-farm", "Hall farm!"], 1),
    ("It is Hall Farm", ["Hall Farm"], 2 / 3),  # 2 of 4, 2 of 2
    ("Snowfield", ["Hall Farm", "Snowfield Hall"], 2 / 3),  # the best answer counts
    ("hall hall farm", ["hall farm"], 4 / 5),
    ("Hall", ["Hall Farm"], 2 / 3),
    ("Rome", ["Hall Farm"], 0),
    ("in it", ["in it"], 1),  # no blacklist
    ("", ["Hall Farm"], 0),
    ("?!", ["Hall Farm"], 0),
    ("Hall Farm", [""], 0),
    ("Hall Farm", [], 0),
]
QA_CHN: list[Row] = [
    ("北京", ["北京"], 1),
    ("北京市", ["北京"], 4 / 5),  # characters: 2 of 3, 2 of 2
    ("京北", ["北京"], 1),  # whose order does not count
    ("在北京。", ["北京"], 4 / 5),
    ("北 京！", ["北京"], 1),
    ("南京", ["北京"], 1 / 2),
    ("南京", ["北京", "南京市"], 4 / 5),
    ("看看", ["看"], 2 / 3),
    ("ABC", ["abc"], 1),
    ("《红楼梦》", ["红楼梦"], 6 / 7),  # 3 of 4, 3 of 3
    ("上海", ["北京"], 0),
    ("", ["北京"], 0),
    ("，。", ["北京"], 0),
    ("北京", ["。"], 0),
    ("北京", [], 0),
]
SUM: list[Row] = [
    ("The cat sat", ["the cat sat"], 1),
    ("the cat sat", ["the cat sat on"], 6 / 7),  # 3 of 3, 3 of 4
    ("the cat sat", ["the cat\nsat on"], 6 / 7),  # lines are sentences
    ("c d a b", ["a b c d"], 1 / 2),
    ("c d\na b", ["a b\nc d"], 1),
    ("a c b d", ["a b c d"], 3 / 4),
    ("dog", ["the cat", "a dog"], 2 / 3),  # the best answer counts
    ("cats", ["cat"], 0),  # no stemmer
    ("don't", ["don t"], 1),
    ("no no no", ["no"], 1 / 2),  # 1 of 3, 1 of 1
    ("书 的 摘要", ["书 的 摘要"], 0),  # the package reads letters and digits of ASCII
    ("", ["the cat"], 0),
    ("?!", ["the cat"], 0),
    ("the cat", [""], 0),
    ("the cat", [], 0),
]
MATH_FIND: list[Row] = [
    ("7", [7], 1),
    ("The largest is 7.", [7], 1),
    ("最大的数是7", [7], 1),
    ("7", ["7"], 1),
    ("7.5", [7.5], 1),
    ("7.5", ["7.5"], 1),
    ("7.50", [7.5], 1),
    ("7", [7.0], 1),
    ("7.0", [7], 0),  # a whole label takes a whole number
    ("7.5", [7], 0),
    ("8 or 7", [7], 0),  # the first number decides
    ("-7", [-7], 0),  # signs are not read
    (".5", [5], 1),
    ("seven", [7], 0),
    ("", [7], 0),
    ("...", [7], 0),
    ("7", [], 0),
    ("9" * 5000, [7], 0),  # more digits than Python turns into a number
]
MATH_CALC: list[Row] = [
    ("[3, 5, 2, 9]", [3, 5, 2, 9], 1),
    ("3 5 2 9", ["3", "5", "2", "9"], 1),
    ("3, 5, 2, 9", [[3, 5, 2, 9]], 1),
    ("3, 5, 2", [3, 5, 2, 9], 3 / 4),
    ("3, 5, 1, 9", [3, 5, 2, 9], 2 / 4),  # up to the first that is wrong
    ("4, 5, 2, 9", [3, 5, 2, 9], 0),
    ("3, 5, 2, 9, 8", [3, 5, 2, 9], 1),
    ("03, 005", [3, 5], 1),
    ("结果是3和5", [3, 5], 1),
    ("-3, 5", [3, 5], 1),  # signs are not read,
    ("-3, 5", [-3, 5], 0),  # so that a negative number is never right
    ("3.5", [3, 5], 1),
    ("0, 00", [0, 0], 1),
    ("", [3, 5], 0),
    ("-,-", [3, 5], 0),
    ("3, 5", [], 0),
    ("3, 5", [[]], 0),
    (f"3, {'9' * 5000}", [3, 5], 1 / 2),
]
TABLES = {
    "passkey": PASSKEY,
    "number_string": NUMBER_STRING,
    "kv_retrieval": KV_RETRIEVAL,
    "longbook_sum_eng": SUM,
    "longbook_qa_eng": QA_ENG,
    "longbook_qa_chn": QA_CHN,
    "longbook_choice_eng": CHOICE,
    "longdialogue_qa_eng": DIALOGUE,
    "code_debug": CODE_DEBUG,
    "code_run": CODE_RUN,
    "math_calc": MATH_CALC,
    "math_find": MATH_FIND,
}


@pytest.mark.parametrize(("task", "row"), [(task, row) for task, table in TABLES.items() for row in table])
def test_scorers(task: str, row: Row) -> None:
    assert score(INFINITEBENCH.tasks[task].official.metric, row) == by_hand(row)


def test_every_task_has_its_table() -> None:
    assert list(TABLES) == list(INFINITEBENCH.tasks)
    assert min(map(len, TABLES.values())) >= 10


@pytest.mark.parametrize(
    ("task", "answers", "says"),
    [
        ("passkey", [["71432"]], "a text or a number"),
        ("kv_retrieval", [None], "a text or a number"),
        ("longdialogue_qa_eng", [{"name": "JOHN"}], "a text or a number"),
        ("code_run", ["four"], "a number, not 'four'"),
        ("code_run", [4.5], "a whole number, not 4.5"),
        ("code_run", [True], "a number, not True"),
        ("math_find", ["many"], "a number, not 'many'"),
        ("math_find", [[7]], "a number"),
        ("math_calc", [3, "x"], "a number, not 'x'"),
        ("longbook_qa_eng", [1812], "a text, not 1812"),
        ("longbook_qa_chn", [None], "a text, not None"),
        ("longbook_sum_eng", ["x", 3], "a text, not 3"),
        ("code_debug", ["load_data"], "the function's name and its letter"),
        ("code_debug", ["load_data", "E"], "the function's name and its letter"),
        ("longbook_choice_eng", ["Hall Farm"], "the option's text and its letter"),
        ("longbook_choice_eng", [3, "C"], "a text, not 3"),
    ],
)
def test_answers_of_another_kind(task: str, answers: list[Any], says: str) -> None:
    with pytest.raises(AnswerError, match=says):
        METRICS[INFINITEBENCH.tasks[task].official.metric].score("B. 3", answers)


def test_letters_of_options() -> None:
    options = ["Rome", "Hall Farm", "Snowfield", "Oak"]
    assert with_letter(["Hall Farm"], options) == ["Hall Farm", "B"]
    assert with_letter(["Hall Farm", "B"], options) == ["Hall Farm", "B"]
    assert with_letter(["Hall Farm"], []) == ["Hall Farm"]
    assert with_letter(["B"], options) == ["B"]
    with pytest.raises(AnswerError, match="none of the four options"):
        with_letter(["Paris"], options)
