"""Timing: turns, floors, and baselines that stand where they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ahn
from ahn import speed
from ahn.backbone import compat
from ahn.generation import cache_bytes, read
from ahn.speed.baselines import bare_copy
from ahn.speed.measure import Timing, baselines, read_seconds
from ahn.speed.plot import plot_speed
from ahn.speed.timing import Machine, Spread, interleave, ratio, spread
from tests.tiny import give_score_weights, text, with_memory

ARMS = ["full", "window", "ahn", "ahn+4", "ahn+4:learned", "ct_max"]


@pytest.fixture
def model() -> Any:
    model = with_memory("llama", window=16, sinks=4)
    give_score_weights(model)
    return model


def test_each_has_its_turn_in_every_round_and_the_first_round_does_not_count() -> None:
    order: list[str] = []

    def case(name: str) -> float:
        order.append(name)
        return float(len(order))

    rounds: list[int] = []
    taken = interleave({"a": lambda: case("a"), "b": lambda: case("b")}, 2, lambda: rounds.append(1))
    assert order == ["a", "b"] * 3
    assert taken == {"a": [3.0, 5.0], "b": [4.0, 6.0]}
    assert len(rounds) == 3


def test_spread_and_ratio() -> None:
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == Spread(3.0, 2.0, 4.0)
    assert spread([2.0]) == Spread(2.0, 2.0, 2.0)
    assert ratio([4.0, 6.0, 9.0], [2.0, 2.0, 3.0]).median == 3.0  # of the ratios, not of the times


def test_a_bare_copy_shares_the_weights_and_reads_as_the_base_model(model: Any) -> None:
    base, ids = bare_copy(model), text()
    with ahn.mode(model, "full"), torch.no_grad():
        assert torch.equal(base(ids).logits, model(ids).logits)
    assert {p.data_ptr() for p in base.parameters()} < {p.data_ptr() for p in model.parameters()}
    assert model.config._attn_implementation == "ahn" != base.config._attn_implementation


@pytest.mark.parametrize("context", [3, 20, 90])
def test_a_peer_holds_what_reading_the_context_would_leave(model: Any, context: int) -> None:
    for arm, baseline in baselines(bare_copy(model), model, ARMS, context).items():
        placed = baseline._placed()
        assert placed.get_seq_length() == context, arm
        seconds = (baseline.decode(), baseline.read(7))
        assert all(each > 0 for each in seconds)
        assert baseline._placed().get_seq_length() == context, arm
        assert cache_bytes(baseline._placed()) == baseline.cache_bytes
    with ahn.mode(model, "ahn"):
        assert baselines(None, model, ["ahn"], context)["ahn"].cache_bytes == cache_bytes(
            read(model, text(1, context), score=False).cache
        )


def test_measure(model: Any, tmp_path: Path) -> None:
    rounds: list[int] = []
    found = speed.measure(model, ARMS, [8, 60], rounds=2, reading_rounds=1, on_round=lambda: rounds.append(1))
    assert len(rounds) == 2 * (3 + 2)
    assert [(row.context, row.arm) for row in found.decoding] == [(c, arm) for c in (8, 60) for arm in ARMS]
    for row in (*found.decoding, *found.reading):
        assert row.seconds.low <= row.seconds.median <= row.seconds.high
        assert 0 < row.floor < row.seconds.median
    assert found.find("decoding", "full", 60).of_first == Spread(1.0, 1.0, 1.0)
    assert found.find("decoding", "ahn", 60).cache_bytes < found.find("decoding", "full", 60).cache_bytes
    plot_speed(found, "tiny", [tmp_path / "speed.png", tmp_path / "speed.svg"])
    assert (tmp_path / "speed.png").stat().st_size > 10_000


def test_seconds_of_a_whole_text_are_those_of_its_tokens() -> None:
    def row(context: int, seconds: float) -> Timing:
        return Timing("full", context, Spread(seconds, 0, 0), Spread(1, 1, 1), 0.0, 0)

    timings = [row(10, 1.0), row(30, 3.0)]
    assert read_seconds(timings, "full", 10) == 10.0
    assert read_seconds(timings, "full", 20) == 10.0 + 15.0
    assert read_seconds(timings, "full", 40) == 10.0 + 40.0 + 30.0


def test_the_machine_is_faster_than_any_model(model: Any) -> None:
    machine = speed.measure(model, ["ahn"], [8], rounds=1).machine
    assert isinstance(machine, Machine)
    assert machine.bandwidth > 1e8
    assert machine.flops > 1e8


def test_the_bank_of_a_peer_is_full_and_stays_as_it_is(model: Any) -> None:
    baseline = baselines(None, model, ["ahn+4"], 90)["ahn+4"]
    placed = baseline._placed()
    before = placed.anchor_tokens
    assert sorted(before[0]) == [0, 1, 2, 3]
    with torch.no_grad():
        for _ in range(9):
            model(**compat.with_cache(model, {"input_ids": torch.tensor([[5]])}, placed))
    assert placed.anchor_tokens == before
