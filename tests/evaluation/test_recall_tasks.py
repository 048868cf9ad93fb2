"""Recall without a model: what is hidden, where sentences end, what a span is, and the two scores."""

from __future__ import annotations

import dataclasses
import itertools
import random
from typing import Any

import pytest

from ahn.evaluation.recall import tasks as values
from ahn.evaluation.recall.findings import in_answer, rank
from ahn.evaluation.recall.items import ItemMaker, _hardest, _span_label
from ahn.evaluation.recall.tasks import TASKS, Facts, Spec
from ahn.models.text import sentences

SPEC = Spec("", 0, depth=0.5, facts=12, number=0, values=3, distractors=4)


def facts(task: str, seed: int = 0, **changes: Any) -> Facts:
    return TASKS[task].make(random.Random(seed), dataclasses.replace(SPEC, **changes))


class TestTasks:
    @pytest.mark.parametrize("task", TASKS)
    def test_same_seed_same_facts(self, task: str) -> None:
        one, other, third = facts(task), facts(task), facts(task, seed=1)
        assert one[:2] == other[:2]
        assert one.needles != third.needles

    @pytest.mark.parametrize("task", TASKS)
    @pytest.mark.parametrize("seed", range(5))
    def test_every_value_is_told_and_no_wrong_one_is_right(self, task: str, seed: int) -> None:
        made = facts(task, seed)
        for right in made.questions.values():
            for value in right:
                assert any(value.text in made.needles[index].text for index in value.needles)
                assert len(set(value.wrong)) == SPEC.distractors
                assert value.text not in value.wrong
                if task in ("multi_value", "variables"):  # all values answer the same question
                    assert not {each.text for each in right} & set(value.wrong)

    @pytest.mark.parametrize("task", TASKS)
    def test_depths_are_within_the_text(self, task: str) -> None:
        for depth in (0.0, 0.3, 1.0):
            needles = facts(task, depth=depth).needles
            assert all(0 <= needle.depth <= 1 for needle in needles)
            if task not in ("capacity", "multi_value", "multi_query"):
                assert needles[0].depth == depth

    def test_single_needles_say_what_is_asked(self) -> None:
        made = facts("number")
        ((question, (value,)),) = made.questions.items()
        assert made.needles[0].text == f"{question.cue} {value.text}."
        assert value.question == question

    def test_wrong_values_of_one_text_come_first(self) -> None:
        made = facts("multi_key")
        hidden = {needle.text.split()[-1].strip(".") for needle in made.needles[1:]}
        ((value,),) = made.questions.values()
        assert hidden <= set(value.wrong)

    def test_a_variable_needs_those_before_it(self) -> None:
        made = facts("variables")
        ((question, right),) = made.questions.items()
        assert [value.needles for value in right] == [(0,), (0, 1), (0, 1, 2)]
        assert made.needles[1].text == f"VAR {right[1].text} = VAR {right[0].text}."
        assert question.text.split()[-1].strip("?") in made.needles[0].text

    def test_filler_of_needles_repeats_no_key(self) -> None:
        filler = facts("needles").filler
        assert filler is not None
        keys = [text.split()[4] for text in itertools.islice(filler, 3000)]
        assert len(set(keys)) == len(keys)

    def test_capacity_asks_in_all_parts_of_the_text(self) -> None:
        for seed in range(5):
            asked = [value.needles[0] for (value,) in facts("capacity", seed).questions.values()]
            assert [index // 4 for index in asked] == [0, 1, 2]

    def test_capacity_of_fewer_facts_than_are_asked(self) -> None:
        assert len(facts("capacity", values=4, facts=2).questions) == 2


class TestValues:
    def test_more_names_than_pairs_of_words(self) -> None:
        names = values._new(random.Random(0), "word", 12_000)
        assert len(set(names)) == 12_000

    def test_kinds(self) -> None:
        rng = random.Random(0)
        assert len(values._DRAW["number"](rng)) == 7
        assert len(values._DRAW["code"](rng)) == 36
        assert values._DRAW["variable"](rng).isupper()


class TestHaystack:
    def test_pieces_join_to_the_text_and_end_where_sentences_do(self) -> None:
        text = 'He said "No." Then he left!  Why?\n\nA heading\n\n(Nobody knows.) 我走了。他没有。 The end'
        pieces = sentences(text)
        assert "".join(pieces) == text
        assert pieces[:4] == ['He said "No." ', "Then he left!  ", "Why?\n\n", "A heading\n\n"]
        assert pieces[4:] == ["(Nobody knows.) ", "我走了。", "他没有。 ", "The end"]

    def test_endless_sentences_are_cut_between_words(self) -> None:
        pieces = sentences("word " * 300)
        assert max(map(len, pieces)) <= 400
        assert all(piece.endswith("word ") for piece in pieces)
        assert [len(piece) for piece in sentences("x" * 900)] == [400, 400, 100]

    def test_each_sentence_once_from_a_random_one_on(self) -> None:
        maker = ItemMaker.__new__(ItemMaker)
        maker.haystack = ["a", "b", "c", "d"]
        read = list(maker._from_random_one(random.Random(3)))
        assert sorted(read) == ["a", "b", "c", "d"]
        assert "".join(read) in "abcdabcd"


# Sinks 10, window 30, the question begins at 100 and the answer ends at 120: evicted before 70, in the window from 90.
@pytest.mark.parametrize(
    ("start", "stop", "label"),
    [(0, 10, "sinks"), (5, 11, None), (10, 20, "evicted"), (60, 70, "evicted"), (60, 71, None), (80, 95, None),
     (89, 95, None), (90, 100, "window")],
)  # fmt: skip
def test_spans(start: int, stop: int, label: str | None) -> None:
    assert _span_label(start, stop, sinks=10, window=30, question=100, end=120) == label


def test_a_short_text_is_all_window() -> None:
    assert _span_label(8, 15, sinks=10, window=30, question=20, end=38) == "window"
    assert _span_label(2, 9, sinks=10, window=30, question=20, end=38) == "sinks"


@pytest.mark.parametrize(
    ("labels", "expected"),
    [(["sinks"], "sinks"), (["window", "sinks"], "window"), (["window", "evicted", "sinks"], "evicted"),
     (["window", None], None)],
)  # fmt: skip
def test_the_span_that_is_hardest_to_reach(labels: list[Any], expected: str | None) -> None:
    assert _hardest(labels) == expected


@pytest.mark.parametrize(
    ("value", "answer", "is_held"),
    [("1234567", " 1234567.", True), ("1234567", "it is 1,234,567!", True), ("1234567", "91234567", False),
     ("1234567", "123456", False), ("Quiet-Fox", "the quiet-fox, I think", True), ("quiet-fox", "quiet-foxes", False),
     ("ab-cd", "ab.cd", False)],
)  # fmt: skip
def test_in_answer(value: str, answer: str, is_held: bool) -> None:
    assert in_answer(value, answer) == is_held


@pytest.mark.parametrize(
    ("scores", "place"),
    [([-1.0, -2.0, -3.0], 1), ([-2.0, -1.0, -3.0], 2), ([-1.0, -1.0, -3.0], 2), ([float("nan"), -1.0, -2.0], 3)],
)
def test_rank(scores: list[float], place: int) -> None:
    assert rank(scores) == place
