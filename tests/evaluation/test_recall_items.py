"""Items: prompts of the wanted length, needles where they belong, and spans that hold to the token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from ahn.cli.texts import reference
from ahn.evaluation.errors import EvaluationError
from ahn.evaluation.recall.items import ItemMaker, RecallItem
from ahn.evaluation.recall.tasks import TASKS, RecallSettings
from ahn.models.text import sentences
from tests.cli.test_cli import write_tokenizer

SINKS, WINDOW = 100, 900
HAYSTACK = sentences(reference()[:60_000])
SETTINGS = RecallSettings(
    tuple(TASKS), (2500,), arms=("full", "window"), depths=4, items=1, values=2, facts=(4, 8), distractors=3
)


@pytest.fixture(scope="module", params=["model", "chatty"])
def tokenizer(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, chat=request.param == "chatty")
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def maker(tokenizer: Any) -> ItemMaker:
    return ItemMaker(SETTINGS, tokenizer, WINDOW, SINKS, HAYSTACK)


@pytest.fixture(scope="module")
def items(maker: ItemMaker) -> dict[str, RecallItem]:
    return {spec.key: maker.item(spec) for spec in maker.specs}


def test_prompts_have_the_wanted_length(items: dict[str, RecallItem]) -> None:
    for key, item in items.items():
        room = 60 if key.startswith("needles") else 12  # a needle takes some 50 bytes
        assert 2500 - room <= item.tokens <= 2500 + 2, key


def test_spans_hold_to_the_token(tokenizer: Any, maker: ItemMaker, items: dict[str, RecallItem]) -> None:
    seen = set()
    for key, item in items.items():
        for question, right in item.questions.items():
            whole = [*item.context, *maker.closing(question)]
            kept = tokenizer.decode(item.context[:SINKS])
            gone = tokenizer.decode(whole[SINKS : len(item.context) - WINDOW])
            last = tokenizer.decode(whole[len(whole) + maker.limit(right) - WINDOW : len(item.context)])
            for value in right:
                places = {"sinks": kept, "evicted": gone, "window": last}
                label = item.labels[value]
                seen.add(label)
                if label is not None and not key.startswith("variables"):
                    assert [name for name, text in places.items() if value.text in text] == [label], key
    assert {"window", "evicted"} <= seen


def test_what_is_read_holds_needles_and_question(
    tokenizer: Any, maker: ItemMaker, items: dict[str, RecallItem]
) -> None:
    for item in items.values():
        text = tokenizer.decode(item.context)
        for question, right in item.questions.items():
            for value in right:
                assert value.text in text
                candidates = maker.ranked_values(value)
                assert tokenizer.decode(candidates[0]) == f" {value.text}"
                assert len(set(candidates)) == 4
                assert len(candidates[0]) <= maker.limit(right)
            assert tokenizer.decode(maker.closing(question)).endswith((" is", " are"))


def test_straddling_needles_are_moved_and_counted(items: dict[str, RecallItem]) -> None:
    assert sum(item.moved for item in items.values()) > 0
    assert all(item.dropped == 0 for item in items.values())


def test_what_fits_nowhere_is_dropped_and_counted(tokenizer: Any) -> None:
    settings = RecallSettings(("number",), (220,), arms=("full",), depths=1, items=1, distractors=1)
    # The question and its answer are longer than the window, and what has left it is shorter than a needle.
    maker = ItemMaker(settings, tokenizer, 100, 0, HAYSTACK)
    item = maker.item(maker.specs[0])
    assert list(item.labels.values()) == [None]
    assert (item.dropped, item.moved) == (1, 0)


def test_the_same_spec_is_the_same_item(maker: ItemMaker) -> None:
    first = maker.item(maker.specs[3])
    maker.item(maker.specs[4])
    again = maker.item(maker.specs[3])
    assert again is not first
    assert again == first


def test_the_depth_is_the_wanted_one(maker: ItemMaker) -> None:
    for spec in maker.specs:
        if spec.task in ("number", "uuid"):
            item = maker.item(spec)
            if not item.moved:
                assert list(item.depths.values()) == [pytest.approx(spec.depth, abs=0.1)]


def test_facts_that_do_not_fit_are_left_out(tokenizer: Any) -> None:
    settings = RecallSettings(("capacity",), (1200,), arms=("full",), items=1, facts=(2, 40))
    assert ItemMaker(settings, tokenizer, 300, 10, HAYSTACK).left_out == [(1200, 40)]


@pytest.mark.parametrize(
    ("changes", "text", "says"),
    [
        ({"lengths": (80,)}, "", "1 needle and the question take"),
        ({"lengths": (5000,)}, "Too short. " * 50, "the haystack has"),
        ({"tasks": ("capacity",), "lengths": (1000,), "facts": (99,)}, "", "no number of facts fits into 1,000 tokens"),
    ],
)
def test_what_cannot_be_made(tokenizer: Any, changes: dict[str, Any], text: str, says: str) -> None:
    settings = RecallSettings(**{"arms": ("full",), "tasks": ("number",), "depths": 2, "items": 1, **changes})
    with pytest.raises(EvaluationError) as raised:
        ItemMaker(settings, tokenizer, 100, 5, sentences(text) or HAYSTACK)
    assert says in str(raised.value)
