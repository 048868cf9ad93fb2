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


def check(model: Any, engine: Engine, **options: Any) -> None:
    backbone = find_backbone(model)
    expected = [backbone(torch.tensor([text])).last_hidden_state[0] for text in texts()]
    for seed in range(2):
        for ours, alone in zip(engine.read(texts(), seed, **options), expected, strict=True):
            torch.testing.assert_close(ours, alone, rtol=1e-4, atol=1e-4 * alone.abs().max().item())


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("memory", tiny.MEMORIES)
def test_every_memory(memory: str, together: bool) -> None:
    model = tiny.with_memory("llama:wide", memory)
    check(model, Engine(model, together=together))


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "granite", "phi3", "gpt_oss", "smollm3", "olmo2", "qwen3_moe"])
def test_every_family(family: str) -> None:
    model = tiny.with_memory(family, layers=(0, 1, 2), sinks=3)
    check(model, Engine(model))


def test_without_kernels_and_with_sinks_at_a_bounded_distance() -> None:
    model = tiny.with_memory("llama:wide", sink_positions="bounded", model={"max_position_embeddings": 24})
    check(model, Engine(model))
    with native.switched_off():
        check(model, Engine(model))


@pytest.mark.parametrize("score", ["key_diff", "learned", "asked", "window_attention", "value_norm"])
def test_anchors(score: str) -> None:
    model = tiny.with_memory("llama:wide", window=36, anchors=6, anchor_score=score)
    tiny.give_score_weights(model)
    check(model, Engine(model))
