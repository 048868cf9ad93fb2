"""Norms and gated activations by the kernels, with their gradients, against torch in float64."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ahn import native, ops
from ahn.errors import ShapeError
from ahn.native import elementwise

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=f"no kernels here: {native.why_not()}")

SHAPES = [(1, 1), (3, 7), (2, 5, 8), (130, 36), (0, 4)]


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def expected(x: Tensor, weight: Tensor | None, share: float, eps: float) -> Tensor:
    """The norm as a formula."""
    normed = x * torch.rsqrt(share * x.square().sum(-1, keepdim=True) + eps)
    return normed if weight is None else normed * weight


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm(shape: tuple[int, ...], weighted: bool) -> None:
    x, weight, mix = normal(*shape), normal(shape[-1]) if weighted else None, normal(*shape).cos()
    leaves = [each.clone().requires_grad_() for each in (x, weight) if each is not None]
    doubles = [each.detach().double().requires_grad_() for each in leaves]
    found = elementwise.norm(leaves[0], leaves[1] if weighted else None, 0.4, 1e-3)
    wanted = expected(doubles[0], doubles[1] if weighted else None, 0.4, 1e-3)
    torch.testing.assert_close(found.double(), wanted, rtol=2e-6, atol=1e-6)
    slopes = torch.autograd.grad((found * mix).sum(), leaves)
    for slope, each in zip(slopes, torch.autograd.grad((wanted * mix).sum(), doubles), strict=True):
        torch.testing.assert_close(slope.double(), each, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("used", ["both", "float32", "bfloat16"])
def test_norm_in_two_dtypes(used: str) -> None:
    x, weight, mix = normal(6, 20), normal(20), normal(2, 6, 20)
    leaf, double = x.clone().requires_grad_(), x.double().requires_grad_()
    out, half = elementwise.norm_twice(leaf, weight, 1 / 20, 1e-5)
    wanted = expected(double, weight.double(), 1 / 20, 1e-5)
    assert torch.equal(half, out.bfloat16())
    mix = torch.stack((mix[0] * (used != "bfloat16"), (mix[1] * (used != "float32")).bfloat16().float()))
    parts = [(out * mix[0]).sum()] if used != "bfloat16" else []
    parts += [(half.float() * mix[1]).sum()] if used != "float32" else []
    (slope,) = torch.autograd.grad(torch.stack(parts).sum(), leaf)
    (expected_slope,) = torch.autograd.grad((wanted * mix.sum(0)).sum(), double)
    torch.testing.assert_close(slope.double(), expected_slope, rtol=1e-5, atol=1e-5)


def test_rows_of_any_layout() -> None:
    leaf = normal(4, 6, 8).requires_grad_()
    turned = leaf.transpose(0, 1)
    torch.testing.assert_close(ops.unit(turned), ops.unit(turned.contiguous()), rtol=0, atol=0)


@pytest.mark.parametrize("function", [ops.unit, lambda x: ops.rms_norm(x, torch.linspace(0, 2, 9))])
def test_norms_are_the_same_in_torch(function: Callable[[Tensor], Tensor]) -> None:
    found = []
    for off in (False, True):
        leaf = normal(5, 9).requires_grad_()
        with native.switched_off() if off else torch.enable_grad():
            out = function(leaf)
        found.append((out.detach(), *torch.autograd.grad(out.sin().sum(), leaf)))
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [1, 7, 8, 5000])
def test_gated_activation(count: int) -> None:
    gate, up, to_out = (each.bfloat16() for each in (8 * normal(count), normal(1, count)[0], normal(2, count)[1]))
    leaves = [each.double().requires_grad_() for each in (gate, up)]
    wanted = F.silu(leaves[0]) * leaves[1]
    slopes = torch.autograd.grad(wanted, leaves, to_out.double())
    found = elementwise.gated(gate, up), *elementwise.gated_back(gate, up, to_out)
    for got, each in zip(found, (wanted.detach(), *slopes), strict=True):
        torch.testing.assert_close(got.double(), each, rtol=2**-8, atol=1e-6)


def test_numbers_that_are_none_stay_so() -> None:
    gate = torch.tensor([float("nan"), 1.0]).bfloat16()
    assert elementwise.gated(gate, torch.ones(2).bfloat16()).isnan().tolist() == [True, False]


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ShapeError):
        elementwise.norm(normal(2, 4).requires_grad_(), normal(3), 1.0, 1e-5)
    with pytest.raises(ShapeError):
        elementwise.gated(torch.zeros(2).bfloat16(), torch.zeros(3).bfloat16())
