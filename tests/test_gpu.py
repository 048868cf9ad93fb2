"""What a GPU computes is what a CPU computes: whole models, decoding and gradients. Run with `pytest -m gpu`."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import ahn
from ahn import speed
from tests.tiny import give_score_weights, read, text, with_memory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none"),
]
CHUNKS = [30, 1, 1, 21, 1, 1, 20]  # through the window, with tokens that all layers decode together


def both(memory: str, **settings: Any) -> tuple[Any, Any]:
    """A tiny model and its copy on the GPU."""
    model = with_memory("llama", memory, **settings)
    give_score_weights(model)
    return model, copy.deepcopy(model).cuda()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"anchors": 6},
        {"anchors": 6, "anchor_score": "asked"},
        {"anchors": 6, "anchor_score": "learned"},
        {"sink_positions": "bounded"},
    ],
    ids=["plain", "anchors", "asked", "learned", "bounded"],
)
def test_logits(memory: str, settings: dict[str, Any]) -> None:
    on_cpu, on_gpu = both(memory, **settings)
    ids = text(2)
    expected, found = read(on_cpu, ids, CHUNKS), read(on_gpu, ids.cuda(), CHUNKS).cpu()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_bfloat16(memory: str) -> None:
    on_cpu, on_gpu = both(memory)
    ids = text(2)
    expected, found = read(on_cpu, ids), read(on_gpu.bfloat16(), ids.cuda(), CHUNKS).float().cpu()
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_gradients(memory: str) -> None:
    models = both(memory)
    ids = text(2)
    for model in models:
        for layer in ahn.attachment.attachment_of(model).layers:
            layer.memory.requires_grad_(True)
        device = next(model.parameters()).device
        model(ids.to(device), labels=ids.to(device), use_cache=False).loss.backward()
    pairs = zip(*(model.named_parameters() for model in models), strict=True)
    compared = [(mine.grad, theirs.grad.cpu()) for (_, mine), (_, theirs) in pairs if mine.grad is not None]
    assert compared
    for mine, theirs in compared:
        torch.testing.assert_close(theirs, mine, rtol=1e-2, atol=1e-5)


def test_bench() -> None:
    _, model = both("gated_delta_net")
    found = speed.measure(model, ["full", "window", "ahn"], [40], rounds=1)
    assert [row.arm for row in found.decoding] == ["full", "window", "ahn"]
