"""The start in closed form: it is the minimum of the loss of the stage transfer, and a share of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ahn
from ahn.attachment import attachment_of
from ahn.checkpoint.content import memory_tensors
from ahn.training.initialization import set_initial_gate
from ahn.training.readout import solve_readout
from ahn.training.sampling import Span, SpanDraw
from ahn.training.transfer import transfer_loss
from tests.tiny import text, tiny

SPAN = Span(16, 4)


def fresh(memory: str, **settings: Any) -> Any:
    model: Any = tiny("llama")
    torch.manual_seed(0)
    ahn.attach(model, ahn.AHNConfig(memory=memory, **settings))
    set_initial_gate(model, 1.0, [text(1, 64)[0]])
    return model


def readouts(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in memory_tensors(model).items() if name.endswith("o_proj")}


def loss_and_slope(model: Any, batch: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Unexplained share, and the length of its gradient."""
    for tensor in memory_tensors(model).values():
        tensor.requires_grad_(True)
    loss = transfer_loss(model, batch, *SPAN).mean({"transfer": 1})
    loss.backward()
    slope = sum(float(tensor.grad.square().sum()) for tensor in readouts(model).values())
    model.zero_grad()
    return float(loss.detach()), slope**0.5


def test_it_is_the_minimum(memory: str) -> None:
    """Over several texts, one of them padded; what is left of the slope is the ridge's."""
    model, mask = fresh(memory), torch.ones(2, 96, dtype=torch.long)
    mask[1, 80:] = 0
    batch = {"input_ids": text(2, 96), "attention_mask": mask}
    before, slope_before = loss_and_slope(model, batch)
    solve_readout(model, [batch], SpanDraw(fixed=SPAN), 1.0)
    after, slope_after = loss_and_slope(model, batch)
    assert before == pytest.approx(1, abs=1e-5)
    assert after < 0.9
    assert slope_after < 0.2 * slope_before


def test_a_share_of_it() -> None:
    found = []
    for scale in (1.0, 0.25):
        model = fresh("gated_delta_net", memory_positions="none")
        batches = [{"input_ids": text(1, 80, seed=seed)} for seed in (1, 2)]
        solve_readout(model, batches, SpanDraw(fixed=SPAN), scale)
        found.append(readouts(model))
    for name, whole in found[0].items():
        torch.testing.assert_close(found[1][name], 0.25 * whole)
        assert bool(whole.detach().any())


def test_another_share_in_the_upper_half() -> None:
    """Of three layers these are the last one, and the middle one stays below."""
    found = []
    for shares in ((1.0,), (0.25, 0.5)):
        model = fresh("gated_delta_net")
        solve_readout(model, [{"input_ids": text(1, 80)}], SpanDraw(fixed=SPAN), *shares)
        found.append(list(readouts(model).values()))
    for share, whole, part in zip((0.25, 0.25, 0.5), *found, strict=True):
        torch.testing.assert_close(part, share * whole)


def test_of_some_memories_alone() -> None:
    model, batches = fresh("gated_delta_net"), [{"input_ids": text(1, 80)}]
    solve_readout(model, batches, SpanDraw(fixed=SPAN), 1.0, only=attachment_of(model).memories[1:])
    assert [bool(tensor.detach().any()) for tensor in readouts(model).values()] == [False, True, True]


def test_without_texts_it_stays_as_it_is() -> None:
    model = fresh("delta_net", layers=(0, 2))
    solve_readout(model, [], SpanDraw(fixed=SPAN), 1.0)
    assert [float(tensor.detach().abs().max()) for tensor in readouts(model).values()] == [0, 0]
