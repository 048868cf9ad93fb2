"""The tables of the page on recall say what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ahn.evaluation.arm_names import find_arm
from tests.scripts import ROOT, load_script


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """`benchmarks/recall.py` as a module that works in a folder of its own."""
    module = load_script("recall")
    monkeypatch.setattr(module, "WORK", tmp_path / "work")
    return module


def test_the_tables_are_made_of_what_is_kept(driver: Any) -> None:
    written = (ROOT / "docs" / "recall.md").read_text(encoding="utf-8")
    assert written == driver.page(written, driver.measured()), "run: make recall TEXTS=FOLDER ARGS=--page"
    for name in driver.GROUPS:
        assert f"<!-- {name} -->\n" in written
        assert f"<!-- /{name} -->" in written


def test_a_table_stands_between_its_marks(driver: Any) -> None:
    part = {"cells": [{"facts": None, "values": 50, "hits": 49, "first": 48}]}
    many = {"cells": [{"facts": facts, "values": 8, "hits": 8 - facts, "first": 0} for facts in (1, 2)]}
    found = {"single": {"word/3072/full": part, "number/1536/full": part, "word/1536/full": part}}
    found["capacity"] = {"capacity/1536/full": many, "capacity/1536/ahn+64:asked": many}
    written = "a\n<!-- single -->\nold\n<!-- /single -->\nb\n<!-- capacity -->\n<!-- /capacity -->\n"
    assert driver.page(written, found) == (
        "a\n<!-- single -->\n| tokens | arm | word | number |\n|---|---|---|---|\n"
        "| 1,536 | `full` | 49 of 50 (48) | 49 of 50 (48) |\n| 3,072 | `full` | 49 of 50 (48) |  |\n<!-- /single -->\n"
        "b\n<!-- capacity -->\n| facts in the text | `full` | `ahn+64:asked` |\n|---|---|---|\n"
        "| 1 | 7 of 8 | 7 of 8 |\n| 2 | 6 of 8 | 6 of 8 |\n<!-- /capacity -->\n"
    )
    with pytest.raises(SystemExit, match=r"<!-- single -->.*are missing"):
        driver.page("a page", found)


def test_the_haystack_is_made_of_all_texts_and_the_same_every_time(driver: Any, tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in "abc":
        (texts / f"{name}.txt").write_text("\n\n".join(f"{name} {number}." for number in range(5000)))
    made = driver.haystack(texts).read_text()
    assert {line.split()[0] for line in made.splitlines() if len(line.split()) == 2} == {"a", "b", "c"}
    assert driver.haystack(texts).read_text() == made


def test_every_part_is_a_way_to_read_in_a_folder_of_its_own(driver: Any) -> None:
    parts = list(driver.parts())
    assert len({part.folder for part in parts}) == len(parts)
    for part in parts:
        find_arm(part.arm)
        assert not part.finished
        assert part.records == []
