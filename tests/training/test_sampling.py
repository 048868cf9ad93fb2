"""Sinks and windows drawn for each sequence: the published rule, the same again and again, without global dice."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import torch

from ahn.errors import ConfigError
from ahn.training.sampling import Span, SpanDraw, subsampled
from tests.tiny import with_memory


def test_the_published_rule() -> None:
    spans = [SpanDraw().draw(4096, step, row) for step in range(200) for row in range(4)]
    totals = Counter(sum(span) for span in spans)
    assert set(totals) == {512, 1024, 2048}  # not under an eighth, and shorter than the sequence
    assert all(200 < count < 333 for count in totals.values())
    assert {span.sinks for span in spans} == {0, 32, 64, 128, 512}
    assert all(2 * span.sinks <= sum(span) for span in spans)


def test_totals_of_long_sequences() -> None:
    def drawn(**settings: float) -> set[int]:
        return {sum(SpanDraw((160, 1056), (32,), **settings).draw(8192, step)) for step in range(9)}

    assert drawn() == {1056}
    assert drawn(least=0) == {160, 1056}


def test_a_draw_hangs_on_its_place_alone() -> None:
    first = [SpanDraw(seed=3).draw(2048, step, 0) for step in range(20)]
    random.seed(1)
    torch.manual_seed(1)
    state, torch_state = random.getstate(), torch.random.get_rng_state()
    assert [SpanDraw(seed=3).draw(2048, step, 0) for step in reversed(range(20))] == first[::-1]
    assert random.getstate() == state
    assert torch.equal(torch.random.get_rng_state(), torch_state)
    assert [SpanDraw(seed=4).draw(2048, step, 0) for step in range(20)] != first
    assert [SpanDraw(seed=3).draw(2048, step, 1) for step in range(20)] != first


def test_the_same_on_every_machine() -> None:
    assert [SpanDraw(seed=0).draw(2048, step, 0) for step in range(4)] == [(512, 512), (448, 64), (128, 128), (448, 64)]


def test_fixed() -> None:
    rule = SpanDraw(fixed=Span(100, 4))
    assert {rule.draw(200, step, 0) for step in range(9)} == {Span(100, 4)}
    with pytest.raises(ConfigError, match="sinks \\+ window = 104"):
        rule.draw(104, 0, 0)


@pytest.mark.parametrize("length", [16, 32, 80_000])
def test_a_length_that_leaves_nothing(length: int) -> None:
    with pytest.raises(ConfigError, match=f"a sequence of {length} tokens"):
        SpanDraw().draw(length, 0)


@pytest.mark.parametrize("wrong", [{"totals": (0,)}, {"sinks": (-1,)}, {"fixed": Span(0, 0)}, {"totals": (1.5,)}])
def test_candidates_are_checked(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="must be a whole number"):
        SpanDraw(**wrong)


class TestThinned:
    def test_a_share_is_kept_at_random(self) -> None:
        labels = torch.arange(20_000).view(2, -1)
        kept = subsampled(labels, 0.25, 0, 1, 2)
        left = kept[kept != -100]
        assert 4_500 < left.numel() < 5_500
        assert torch.equal(labels.flatten()[left], left)
        assert int((left < 10_000).sum()) != int((left >= 10_000).sum())  # row by row another draw

    def test_it_hangs_on_its_place_alone(self) -> None:
        labels = torch.arange(64)[None]
        state = torch.random.get_rng_state()
        assert torch.equal(subsampled(labels, 0.5, 3, 7, 0), subsampled(labels, 0.5, 3, 7, 0))
        assert not torch.equal(subsampled(labels, 0.5, 3, 7, 0), subsampled(labels, 0.5, 3, 8, 0))
        assert torch.equal(torch.random.get_rng_state(), state)

    def test_all_are_kept(self) -> None:
        labels = torch.arange(64)[None]
        assert subsampled(labels, 1.0, 0) is labels


class TestFitting:
    def test_layers_that_slide_bound_the_sinks(self) -> None:
        rule = SpanDraw(totals=(16, 32, 64), sinks=(0, 4, 12, 16)).fitting(
            with_memory("gemma2", window=4, layers=(0, 1, 2))
        )
        assert rule.sinks == (0, 4)

    def test_bounded_sinks_bound_the_total(self) -> None:
        model = with_memory("llama", sink_positions="bounded", model={"max_position_embeddings": 64})
        assert SpanDraw(totals=(32, 64, 128)).fitting(model).totals == (32, 64)
        with pytest.raises(ConfigError):
            SpanDraw(fixed=Span(100, 0)).fitting(model)

    def test_nothing_left(self) -> None:
        with pytest.raises(ConfigError, match="none of the candidates"):
            SpanDraw(sinks=(64, 128)).fitting(with_memory("gemma2", window=4, layers=(0, 1, 2)))
