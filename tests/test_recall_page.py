"""`make recall`: intervals and tables of what was counted."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.scripts import load_script

recall = load_script("recall")


def part(*cells: tuple[int | None, int, int, int]) -> dict[str, Any]:
    """What is kept of a part: facts in the text, values, those written, those ranked first."""
    return {"cells": [dict(zip(("facts", "values", "hits", "first"), cell)) for cell in cells]}


@pytest.mark.parametrize(("hits", "values"), [(0, 8), (8, 29), (14, 29), (50, 50)])
def test_an_interval_ends_where_the_share_is_two_deviations_away(hits: int, values: int) -> None:
    found = recall.wilson(hits, values)
    assert found["share"] == hits / values
    assert found["low"] <= found["share"] <= found["high"]
    for end in (found["low"], found["high"]):
        assert abs(hits / values - end) == pytest.approx(1.96 * math.sqrt(max(0, end * (1 - end)) / values), abs=1e-9)


def test_the_table_of_single_facts() -> None:
    counts = {
        "number/3072/full": part((None, 55, 45, 55)),
        "number/1536/full": part((None, 50, 50, 50)),
        "word/1536/full": part((None, 50, 40, 49)),
    }
    assert recall._table(counts).splitlines() == [
        "| tokens | arm | number | word |",
        "|---|---|---|---|",
        "| 1,536 | `full` | 50 of 50 (50) | 40 of 50 (49) |",
        "| 3,072 | `full` | 45 of 55 (55) |  |",
    ]


def test_table_and_curve_of_many_facts(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall, "IMAGES", tmp_path)
    counts = {
        "capacity/1536/full": part((8, 29, 16, 29), (16, 29, 11, 20)),
        "capacity/1536/ahn+64:learned": part((8, 29, 9, 29), (16, 29, 7, 20)),
    }
    assert recall._capacity_table(counts).splitlines() == [
        "| facts in the text | `full` | `ahn+64:learned` |",
        "|---|---|---|",
        "| 8 | 16 of 29 | 9 of 29 |",
        "| 16 | 11 of 29 | 7 of 29 |",
    ]
    recall._draw_capacity(counts)
    assert (tmp_path / "recall_capacity.png").stat().st_size > 5_000
