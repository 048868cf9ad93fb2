"""How much weight the exact tokens have: the log-sum of their scores, by every backend of the softmax."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

import ahn
from ahn import native
from ahn.attachment import attachment_of
from ahn.attention import function
from ahn.attention.recording import RecordedLayer, record_layers
from ahn.tokens import Attended
from tests.tiny import read, text, with_memory

SINKS, WINDOW, LENGTH = 5, 16, 70


def model_of(family: str, **settings: Any) -> Any:
    return with_memory(family, "linearized_attention", **settings)


def recorded(model: Any) -> list[RecordedLayer]:
    """What each layer reads of a text, with the base model's own hidden states."""
    found: list[RecordedLayer] = []
    with ahn.mode(model, "ahn"):
        student = attachment_of(model).settings
    with torch.no_grad(), ahn.mode(model, "full"), record_layers(model, found.append, student):
        model(text(2, LENGTH), use_cache=False)
    return found


def spelled_out(layer: RecordedLayer) -> torch.Tensor:
    """The same in float64, `[B, T, H]`."""
    query, key, _ = (x.double() for x in layer.projected)
    module, window = layer.layer.module, layer._view.window
    scores = query @ key.repeat_interleave(query.size(1) // key.size(1), 1).mT * float(module.scaling)
    if cap := getattr(module, "attn_logit_softcapping", None):
        scores = cap * torch.tanh(scores / cap)
    token, seen = torch.arange(LENGTH), torch.arange(LENGTH)[:, None]
    exact = (token <= seen) & ((token < SINKS) | (seen - token < window))
    scores = scores.masked_fill(~exact, -torch.inf)
    if (extra := getattr(module, "sinks", None)) is not None:  # of gpt-oss, which take weight and give no value
        scores = torch.cat((scores, extra.double()[None, :, None, None].expand(*scores.shape[:3], 1)), -1)
    return scores.logsumexp(-1).transpose(1, 2)


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "torch"])
@pytest.mark.parametrize("family", ["llama", "llama:wide", "qwen3", "gemma2", "gpt_oss", "granite"])
def test_of_many_queries(family: str, kernels: bool) -> None:
    with nullcontext() if kernels else native.switched_off():
        for layer in recorded(model_of(family)):
            log_sum = layer.read_window().log_sum
            assert log_sum is not None
            torch.testing.assert_close(log_sum.double(), spelled_out(layer), rtol=1e-5, atol=1e-5)


def test_with_gradients() -> None:
    """The backend that has a backward pass of its own gives the same, and its gradients are those of torch."""
    model = model_of("llama")
    for layer in recorded(model):
        layer._query.requires_grad_()
        layer._key.requires_grad_()
        log_sum = layer.read_window().log_sum
        expected = spelled_out(layer)
        assert log_sum is not None
        torch.testing.assert_close(log_sum.double(), expected, rtol=1e-5, atol=1e-5)
        weights, tensors = torch.randn_like(log_sum), (layer._query, layer._key)
        got = torch.autograd.grad((log_sum * weights).sum(), tensors)
        torch.testing.assert_close(got, torch.autograd.grad((expected * weights).sum(), tensors), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "llama:wide", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "torch"])
@pytest.mark.parametrize("settings", [{}, {"anchors": 6, "anchor_score": "key_diff"}, {"sink_positions": "bounded"}])
def test_of_a_single_query(
    family: str, kernels: bool, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Token by token it is what it is in one call."""
    model, ids, sums = model_of(family, model={"max_position_embeddings": 40}, **settings), text(2, LENGTH), {}
    attend = function.attend_local

    def noted(layer: Any, *rest: Any) -> Attended:
        attended: Attended = attend(layer, *rest)
        sums.setdefault(layer.layer.index, []).append(attended.log_sum)
        return attended

    monkeypatch.setattr(function, "attend_local", noted)
    with nullcontext() if kernels else native.switched_off():
        read(model, ids, [11] * 5 + [15])
        expected, sums = {index: torch.cat(parts, 1) for index, parts in sums.items()}, {}
        read(model, ids, [11] * 4 + [1] * 26)
    assert expected
    for index, parts in sums.items():
        torch.testing.assert_close(torch.cat(parts, 1), expected[index], rtol=1e-4, atol=1e-4)


def test_in_float64_nothing_is_rounded_to_less() -> None:
    for layer in recorded(model_of("gemma2").double()):
        log_sum = layer.read_window().log_sum
        assert log_sum is not None
        torch.testing.assert_close(log_sum, spelled_out(layer), rtol=1e-12, atol=1e-12)


def test_only_memories_that_read_it_pay_for_it() -> None:
    for layer in recorded(with_memory()):
        assert layer.read_window().log_sum is None
