"""`make peers`: what is counted of an item, and the table; the reading itself needs kvpress, in another environment."""

from __future__ import annotations

import pytest
import torch

from tests.scripts import load_script

peers = load_script("peers")


def test_losses_count_from_where_all_forget_to_a_whole_step_without_the_facts() -> None:
    item = {"task": "word", "length": 256, "depth": 0.5, "value": "oak", "context": [0] * 300, "fact": [200, 201]}
    losses = [float(place) for place in range(1, 300)]
    found = peers._result(item, "window", "oak", losses, 100)
    counted = [place for place in range(100, 256) if place not in (200, 201)]
    assert (found["nats"], found["tokens"]) == (sum(counted) / len(counted), len(counted))
    assert peers._result(item, "SnapKV, once", "oak", [], 100)["nats"] is None


def test_the_table() -> None:
    facts = {"task": "word", "length": 256, "depth": 0.0, "value": "old-oak"}
    results = [
        {**facts, "method": "window", "answer": " an Old-Oak.", "nats": 2.0, "tokens": 10},
        {**facts, "method": "window", "answer": "old-oaks", "nats": 3.0, "tokens": 30},
        {**facts, "method": "SnapKV, once", "answer": "", "nats": None, "tokens": 0},
        {**facts, "method": peers.OURS, "answer": "", "nats": 1.5, "tokens": 10},
        {**facts, "method": peers.OURS, "answer": "", "nats": 2.5, "tokens": 30},
    ]
    for number, each in enumerate(results):
        each["depth"] = [0.0, 0.5, 0.0, 0.0, 0.5][number]
    assert peers.table(results, ["window", "SnapKV, once", peers.OURS]).splitlines() == [
        "| method | facts, 256 | nats, 256 | more than `memory and anchors` (95 %) |",
        "|---|---|---|---|",
        "| window | 1 of 2 | 2.7500 | +0.5000 (+0.5000 to +0.5000) |",
        "| SnapKV, once | 0 of 1 |  |  |",
        "| memory and anchors | 0 of 2 | 2.2500 |  |",
    ]


def test_items_come_in_a_mixed_order_the_lengths_in_turn() -> None:
    items = [{"length": length, "key": number} for length in (2048, 4096) for number in range(6)]
    mixed = peers._mixed(items, 1)
    assert sorted(map(str, mixed)) == sorted(map(str, items))
    assert [item["length"] for item in mixed] in ([2048, 4096] * 6, [4096, 2048] * 6)
    assert mixed != items
    assert mixed == peers._mixed(items, 1)


def test_what_streaming_keeps_is_in_order() -> None:
    tokens = torch.arange(20.0)[None, None, :, None]
    keys, values = peers._keep_in_order(2, 7, None, None, tokens, tokens + 100, None, {})
    assert keys.flatten().tolist() == [0, 1, 15, 16, 17, 18, 19]
    assert torch.equal(values, keys + 100)
    with pytest.raises(SystemExit, match="instead of 9"):
        peers._check_size(type("Cache", (), {"layers": [type("Layer", (), {"keys": keys})]}), 9)
