"""The first stage: each layer by itself, from one pass of the teacher."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ahn
from ahn.attachment import attachment_of
from ahn.checkpoint.content import memory_tensors
from ahn.errors import ConfigError
from ahn.training.recording import recording
from ahn.training.transfer import transfer_loss
from tests.tiny import text, tiny, with_memory

SPAN = {"window": 16, "sinks": 5}


def trainable(**settings: Any) -> Any:
    model = with_memory(**settings)
    for tensor in memory_tensors(model).values():
        tensor.requires_grad_(True)
    return model


def test_a_silent_memory_explains_nothing() -> None:
    model = tiny("qwen3")
    ahn.attach(model, ahn.AHNConfig(**SPAN))
    output = transfer_loss(model, {"input_ids": text(2)}, **SPAN)
    assert float(output.mean({"transfer": 1}).detach()) == pytest.approx(1)


@pytest.mark.parametrize("positions", ["rope", "none"])
def test_the_first_layer_by_hand(memory: str, positions: Any) -> None:
    """In the first layer teacher and student have the same inputs, so the modes themselves give what is compared.

    The n-th token counts by 1 / n.
    """
    model, ids = trainable(family="qwen3", memory=memory, memory_positions=positions, layers=(0,)), text(2)
    backbone = model.model
    full: dict[int, torch.Tensor] = {}
    window: dict[int, torch.Tensor] = {}
    both: dict[int, torch.Tensor] = {}
    for mode, outputs in (("full", full), ("window", window), ("ahn", both)):
        with ahn.mode(model, mode, **SPAN), recording(backbone, outputs):  # type: ignore[arg-type]
            backbone(input_ids=ids, use_cache=False)
    missing, rest = (full[0] - window[0])[:, 21:], (full[0] - both[0])[:, 21:]
    weights = 1 / torch.arange(22, 1 + ids.size(1)).float()[:, None, None]
    expected = (weights * rest.square()).sum() / (weights * missing.square()).sum()
    output = transfer_loss(model, {"input_ids": ids}, **SPAN)
    torch.testing.assert_close(output.mean({"transfer": 1}), expected, rtol=1e-4, atol=1e-5)
    output.mean({"transfer": 1}).backward()
    ours = {name: tensor.grad.clone() for name, tensor in memory_tensors(model).items()}
    model.zero_grad()
    expected.backward()
    for name, tensor in memory_tensors(model).items():
        torch.testing.assert_close(ours[name], tensor.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_padding_counts_for_nothing() -> None:
    model = trainable(family="llama", layers=(1,))
    rows = [text(1, length, seed=length) for length in (75, 50)]
    ids = torch.cat([rows[0], torch.nn.functional.pad(rows[1], (25, 0))])
    mask = torch.cat([torch.ones_like(rows[0]), torch.nn.functional.pad(torch.ones_like(rows[1]), (25, 0))])
    output = transfer_loss(model, {"input_ids": ids, "attention_mask": mask}, **SPAN)
    assert output.tokens == {"transfer": 75 - 21 + 50 - 21}
    shares = [float(transfer_loss(model, {"input_ids": row}, **SPAN).mean({"transfer": 1}).detach()) for row in rows]
    assert min(shares) < float(output.mean({"transfer": 1}).detach()) < max(shares)


def test_the_teacher_sees_nothing_of_it() -> None:
    model, ids = trainable(family="llama"), text()
    with ahn.mode(model, "full"):
        before = model(ids).logits
        transfer_loss(model, {"input_ids": ids}, **SPAN)
        assert torch.equal(model(ids).logits, before)
    assert not any(module._forward_pre_hooks and len(module._forward_pre_hooks) > 1 for module in model.modules())
    assert attachment_of(model).base_implementation != "ahn_transfer"


def test_spans_are_checked() -> None:
    with pytest.raises(ConfigError, match="window"):
        transfer_loss(trainable(family="llama"), {"input_ids": text()}, window=0, sinks=0)
