"""Items: prompts of the wanted length, needles where they belong, and spans that hold to the token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from ahn.cli.texts import reference
from ahn.evaluation.errors import EvaluationError
from ahn.evaluation.recall.haystack import sentences
from ahn.evaluation.recall.items import Builder, Item
from ahn.evaluation.recall.plan import Plan, Settings
from ahn.evaluation.recall.tasks import TASKS
from tests.cli.test_cli import write_tokenizer

SINKS, WINDOW = 100, 900
PIECES = sentences(reference()[:60_000])
SETTINGS = Settings(("full", "window"), tuple(TASKS), (2500,), depths=4, items=1, values=2, facts=(4, 8), distractors=3)


@pytest.fixture(scope="module", params=["model", "chatty"])
def tokenizer(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, chat=request.param == "chatty")
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def plan(tokenizer: Any) -> Plan:
    return Plan(SETTINGS, Builder(tokenizer, WINDOW, SINKS), PIECES)


@pytest.fixture(scope="module")
def items(plan: Plan) -> dict[str, Item]:
    return {place.key: plan.item(place) for place in plan.places}


def test_prompts_have_the_wanted_length(items: dict[str, Item]) -> None:
    for key, item in items.items():
        room = 60 if key.startswith("needles") else 12  # a needle takes some 50 bytes
        assert 2500 - room <= item.tokens <= 2500 + 2, key


def test_spans_hold_to_the_token(tokenizer: Any, items: dict[str, Item]) -> None:
    seen = set()
    for key, item in items.items():
        for ask in item.asks:
            whole = [*item.context, *ask.closing]
            kept = tokenizer.decode(item.context[:SINKS])
            gone = tokenizer.decode(whole[SINKS : len(item.context) - WINDOW])
            last = tokenizer.decode(whole[len(whole) + ask.limit - WINDOW : len(item.context)])
            for target in ask.targets:
                places = {"sinks": kept, "evicted": gone, "window": last}
                seen.add(target.label)
                if target.label is not None and not key.startswith("variables"):
                    assert [label for label, text in places.items() if target.value in text] == [target.label], key
    assert {"window", "evicted"} <= seen


def test_what_is_read_holds_needles_and_question(tokenizer: Any, items: dict[str, Item]) -> None:
    for item in items.values():
        text = tokenizer.decode(item.context)
        for ask in item.asks:
            for target in ask.targets:
                assert target.value in text
                first = tokenizer.decode(target.candidates[0])
                assert first == f" {target.value}"
                assert len(set(target.candidates)) == 4
                assert len(target.candidates[0]) <= ask.limit
        assert tokenizer.decode(item.asks[0].closing).endswith((" is", " are"))


def test_straddling_needles_are_moved_and_counted(items: dict[str, Item]) -> None:
    assert sum(item.moved for item in items.values()) > 0
    assert all(item.dropped == 0 for item in items.values())


def test_what_fits_nowhere_is_dropped_and_counted(tokenizer: Any) -> None:
    settings = Settings(("full",), ("number",), (220,), depths=1, items=1, distractors=1)
    # The question and its answer are longer than the window, and what has left it is shorter than a needle.
    plan = Plan(settings, Builder(tokenizer, 100, 0), PIECES)
    item = plan.item(plan.places[0])
    assert item.asks[0].targets[0].label is None
    assert (item.dropped, item.moved) == (1, 0)


def test_the_same_place_is_the_same_item(plan: Plan) -> None:
    assert plan.item(plan.places[3]) == plan.item(plan.places[3])


def test_the_depth_is_the_wanted_one(plan: Plan) -> None:
    for place in plan.places:
        if place.task in ("number", "uuid") and place.depth is not None:
            item = plan.item(place)
            if not item.moved:
                assert item.asks[0].targets[0].depth == pytest.approx(place.depth, abs=0.1)


def test_facts_that_do_not_fit_are_left_out(tokenizer: Any) -> None:
    settings = Settings(("full",), ("capacity",), (1200,), items=1, facts=(2, 40))
    assert Plan(settings, Builder(tokenizer, 300, 10), PIECES).left_out == [(1200, 40)]


@pytest.mark.parametrize(
    ("changes", "text", "says"),
    [
        ({"lengths": (80,)}, "", "1 needle and the question take"),
        ({"lengths": (5000,)}, "Too short. " * 50, "the haystack has"),
        ({"tasks": ("capacity",), "lengths": (1000,), "facts": (99,)}, "", "no number of facts fits into 1,000 tokens"),
    ],
)
def test_what_cannot_be_made(tokenizer: Any, changes: dict[str, Any], text: str, says: str) -> None:
    settings = Settings(**{"arms": ("full",), "tasks": ("number",), "depths": 2, "items": 1, **changes})
    with pytest.raises(EvaluationError) as raised:
        Plan(settings, Builder(tokenizer, 100, 5), sentences(text) or PIECES)
    assert says in str(raised.value)
