"""The precision that is measured, and the base that multiplies in half precision."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ahn.backbone.linear import CastWeights
from ahn.checkpoint.content import memory_tensors
from ahn.training import precision
from ahn.training.averaging import WeightAverage
from ahn.training.distiller import Distiller
from ahn.training.precision import fastest_precision
from tests.tiny import give_score_weights, text, tiny, with_memory


@pytest.mark.parametrize(("factor", "expected"), [(1.1, torch.float32), (2.0, torch.bfloat16)])
def test_half_precision_must_be_worth_it(factor: float, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_rate", lambda weight, seconds: factor if weight.dtype == torch.bfloat16 else 1.0)
    assert fastest_precision(tiny()) == expected


def test_it_measures_both() -> None:
    assert fastest_precision(tiny(), seconds=0.01) in (torch.float32, torch.bfloat16)


def test_half_precision_leaves_the_weights_and_about_the_loss() -> None:
    losses, slopes = [], []
    for dtype in (None, torch.bfloat16):
        model = with_memory()
        distiller = Distiller(model, precision=dtype)
        loss = distiller(input_ids=text(1, 70), spans=[(16, 5)])["kl"]
        loss.backward()
        losses.append(loss.item())
        slopes.append(torch.cat([tensor.grad.flatten() for tensor in memory_tensors(model).values()]))
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        distiller.finish()
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert losses[1] == pytest.approx(losses[0], rel=0.1)
    assert torch.cosine_similarity(slopes[0], slopes[1], dim=0) > 0.95


@pytest.mark.parametrize("anchors", [0, 5])
def test_weights_that_are_cast_once_give_the_same_gradients(anchors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With anchors a text is read in chunks, each of which multiplies by the same casts."""
    found, held = [], []
    for once in (True, False):
        model = with_memory()
        give_score_weights(model, (0, 1))
        distiller = Distiller(model, precision=torch.bfloat16)
        if not once:
            monkeypatch.setattr(CastWeights, "cast", lambda self, weight: weight)
        distiller(input_ids=text(1, 90), spans=[(32, 5)], anchors=[anchors])["kl"].backward()
        held.append(len(distiller._casts._casts))
        found.append({name: tensor.grad for name, tensor in memory_tensors(model).items()})
    assert held == [sum(type(module) is nn.Linear for module in tiny().modules()), 0]
    assert all(torch.equal(gradient, found[1][name]) for name, gradient in found[0].items())


def test_a_cast_follows_its_weight() -> None:
    casts, weight = CastWeights(), nn.Linear(4, 4).requires_grad_(False).weight
    assert casts.cast(weight) is weight
    with torch.autocast("cpu", torch.bfloat16):
        cast = casts.cast(weight)
        assert casts.cast(weight) is cast
        assert torch.equal(cast, weight.bfloat16())
        weight.add_(1)
        assert torch.equal(casts.cast(weight), weight.bfloat16())
        with torch.autocast("cpu", torch.float16):
            assert casts.cast(weight).dtype == torch.float16
        learning = nn.Linear(4, 4).weight
        assert casts.cast(learning) is learning


def test_the_average_is_the_mean_of_the_last_steps() -> None:
    model = with_memory()
    whole, part = WeightAverage(model, 1.0), WeightAverage(model, 0.5)
    tensor = next(iter(memory_tensors(model).values()))
    name = next(iter(memory_tensors(model)))
    with torch.no_grad():
        for step in range(1, 9):
            tensor.fill_(float(step))
            whole.update(step)
            part.update(step)
    torch.testing.assert_close(whole.weights[name], torch.full_like(tensor, 4.5))
    assert 5.5 < float(part.weights[name].mean()) < 8
    with part.in_place():
        assert torch.equal(tensor, part.weights[name])
    assert float(tensor.detach().mean()) == 8
