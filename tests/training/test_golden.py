"""The published losses and gradients come out, tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ahn
from ahn.checkpoint.content import memory_tensors
from ahn.training.losses import LossOutput, distillation_loss

FOLDERS = ("qwen2_GatedDeltaNet", "qwen2_DeltaNet", "qwen2_Mamba2", "qwen3_GatedDeltaNet")
DRAWS = {"prefix": (16, 0), "random": (16, 5)}
WEIGHTS = {
    "kl": {"kl": 1.0},
    "ce": {"ce": 1.0},
    "distill": {"attention": 1.0},
    "kl+ce+distill": {"kl": 1.0, "ce": 1.0, "attention": 1.0},
    "distill_nol2": {"attention": 1.0},
}
RENAMED = {"o_norm.weight": "o_norm", "o_proj.weight": "o_proj", "norm.weight": "norm"}


@pytest.fixture(scope="module", params=FOLDERS)
def golden(request: pytest.FixtureRequest) -> tuple[Any, dict[str, torch.Tensor], list[str]]:
    folder = Path(__file__).parents[1] / "fixtures" / "golden" / request.param
    model = ahn.from_pretrained(folder).requires_grad_(False)
    for tensor in memory_tensors(model).values():
        tensor.requires_grad_(True)
    names = json.loads((folder / "train_meta.json").read_text())["gradnorm_names"]
    return model, load_file(folder / "train.safetensors"), names


def ours(name: str) -> str:
    """Our name of a published parameter."""
    _, _, layer, _, _, parameter = name.split(".", 5)
    return f"layers.{layer}.{RENAMED.get(parameter, parameter)}"


def measured(golden: tuple[Any, dict[str, torch.Tensor], Any], draw: str, case: str, prefix: str = "") -> LossOutput:
    model, tensors, _ = golden
    batch = {"input_ids": tensors[f"{prefix}input_ids"], "labels": tensors[f"{prefix}labels"]}
    window, sinks = DRAWS[draw]
    settings: dict[str, Any] = {"normalised_attention": case != "distill_nol2", "ce_pairs": "published"}
    return distillation_loss(model, batch, WEIGHTS[case], window, sinks, slice_tokens=7, **settings)


@pytest.mark.parametrize("case", WEIGHTS)
@pytest.mark.parametrize("draw", DRAWS)
def test_loss_and_gradient_norms(golden: Any, draw: str, case: str) -> None:
    model, tensors, names = golden
    model.zero_grad()
    loss = measured(golden, draw, case).mean(WEIGHTS[case])
    torch.testing.assert_close(loss.detach(), tensors[f"{draw}.{case}.loss"][0], rtol=1e-3, atol=1e-6)
    loss.backward()
    parameters = memory_tensors(model)
    for name, norm in zip(names, tensors[f"{draw}.{case}.gradnorms"], strict=True):
        if not name.endswith(".D"):  # stored there, used by nothing
            torch.testing.assert_close(parameters[ours(name)].grad.norm(), norm, rtol=1e-3, atol=1e-7, msg=name)


@pytest.mark.parametrize("draw", DRAWS)
def test_every_gradient_of_kl(golden: Any, draw: str) -> None:
    model, tensors, _ = golden
    model.zero_grad()
    measured(golden, draw, "kl").mean(WEIGHTS["kl"]).backward()
    parameters = memory_tensors(model)
    published = {key: value for key, value in tensors.items() if key.startswith(f"{draw}.kl.grad.")}
    compared = 0
    for key, expected in published.items():
        name = ours(key.removeprefix(f"{draw}.kl.grad."))
        if name in parameters:
            error = (parameters[name].grad - expected).norm() / expected.norm()
            assert error < 1e-3, (name, float(error))
            compared += 1
    assert compared == len(parameters)


@pytest.mark.parametrize("case", ["kl", "ce", "distill"])
def test_a_batch_of_two(golden: Any, case: str) -> None:
    _, tensors, _ = golden
    if f"b2.random.{case}.loss" not in tensors:
        pytest.skip("this folder holds no batch of two")
    loss = measured(golden, "random", case, "b2.").mean(WEIGHTS[case])
    torch.testing.assert_close(loss.detach(), tensors[f"b2.random.{case}.loss"][0], rtol=1e-3, atol=1e-6)


def test_other_slices_change_nothing(golden: Any) -> None:
    model, tensors, _ = golden
    batch: dict[str, torch.Tensor] = {name: tensors[name] for name in ("input_ids", "labels")}
    found: list[Callable[..., Any] | Any] = []
    for slice_tokens in (1, 16, None):
        model.zero_grad()
        loss = distillation_loss(model, batch, {"kl": 1, "ce": 2}, 16, 5, slice_tokens=slice_tokens)
        loss.mean({"kl": 1, "ce": 2}).backward()
        found.append([p.grad.clone() for p in memory_tensors(model).values()])
    for other in found[1:]:
        for expected, gradient in zip(found[0], other, strict=True):
            # Sums in another order: small elements are off by rounding errors of the large ones.
            torch.testing.assert_close(
                gradient, expected, rtol=1e-4, atol=max(1e-6, 4e-6 * float(expected.abs().max()))
            )
