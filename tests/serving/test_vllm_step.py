"""Requests read together in blocks give what each text read alone gives, whatever the chunks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ahn import native
from ahn.backbone.survey import find_backbone
from tests import tiny
from tests.serving.vllm_engine import Engine

LENGTHS = (75, 9, 31, 3)


def texts() -> list[list[int]]:
    return [tiny.text(tokens=count, seed=count)[0].tolist() for count in LENGTHS]


def check(model: Any, engine: Engine, seeds: int = 1) -> None:
    backbone = find_backbone(model)
    expected = [backbone(torch.tensor([text])).last_hidden_state[0] for text in texts()]
    for seed in range(seeds):
        for ours, alone in zip(engine.read(texts(), seed), expected, strict=True):
            torch.testing.assert_close(ours, alone, rtol=1e-4, atol=1e-4 * alone.abs().max().item())


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("memory", tiny.MEMORIES)
def test_every_memory(memory: str, together: bool) -> None:
    model = tiny.with_memory("llama:wide", memory)
    engine = Engine(model, together=together)
    assert engine.runtime.decodes_together is together
    check(model, engine, 1 + together)


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "granite", "phi3", "gpt_oss", "smollm3", "olmo2", "qwen3_moe"])
def test_every_family(family: str) -> None:
    model = tiny.with_memory(family, layers=(0, 1, 2), sinks=3)
    check(model, Engine(model))


def test_without_kernels_and_with_sinks_at_a_bounded_distance() -> None:
    model = tiny.with_memory("llama:wide", sink_positions="bounded", model={"max_position_embeddings": 24})
    check(model, Engine(model))
    with native.switched_off():
        check(model, Engine(model))


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("score", ["key_diff", "learned", "asked", "value_norm"])
def test_anchors(score: str, together: bool) -> None:
    model = tiny.with_memory("llama:wide", window=36, anchors=6, anchor_score=score)
    tiny.give_score_weights(model)
    engine = Engine(model, together=together)
    assert engine.runtime.decodes_together is together
    check(model, engine, 1 + together)


def test_anchors_that_are_read_request_by_request() -> None:
    model = tiny.with_memory("llama:wide", window=36, anchors=6, anchor_score="window_attention")
    engine = Engine(model)
    assert not engine.runtime.decodes_together
    check(model, engine)


def test_anchors_without_kernels_and_at_a_bounded_distance() -> None:
    changes = {"max_position_embeddings": 48}
    model = tiny.with_memory("llama:wide", window=36, anchors=6, sink_positions="bounded", model=changes)
    check(model, Engine(model))
    with native.switched_off():
        check(model, Engine(model))


def test_a_softcap() -> None:
    changes = {"layer_types": ["full_attention"] * 3, "attn_logit_softcapping": 5.0}
    model = tiny.with_memory("gemma2", model=changes)
    engine = Engine(model)
    assert engine.runtime.decodes_together
    check(model, engine)
