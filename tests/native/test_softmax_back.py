"""The gradient of attention by the kernel and matrix products, against autograd in float64."""

import pytest
import torch
from torch import Tensor

from ahn import native
from ahn.attention.softmax_products import can_multiply, exact_products, gradients
from ahn.errors import ShapeError
from ahn.native.softmax_back import softmax_back

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=f"no kernels here: {native.why_not()}")


def masked(R: int, M: int, dtype: torch.dtype) -> Tensor:
    """A mask that leaves each query at least one key."""
    mask = torch.zeros(R, M, dtype=dtype)
    return mask.masked_fill(torch.arange(M) > torch.arange(R)[:, None] + M // 2, float("-inf"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("X", "R", "M"), [(1, 1, 1), (2, 5, 7), (3, 4, 8), (2, 9, 61)])
def test_the_elementwise_part(X: int, R: int, M: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    scores, to_weights = 5 * torch.randn(X, R, M), torch.randn(X, R, M)
    mask = torch.cat((torch.ones(R, 3, dtype=dtype), masked(R, M, dtype)), 1)[:, 3:]
    leaf = scores.double().requires_grad_()
    added = 0.3 * leaf + mask.double()
    weights = added.softmax(-1)
    (slopes,) = torch.autograd.grad((weights * to_weights.double()).sum(), leaf)
    means = (weights.detach() * to_weights).sum(-1).float()
    found = softmax_back(scores, to_weights, mask, added.detach().logsumexp(-1).float(), means, 0.3)
    tolerance = 2**-8 if dtype == torch.bfloat16 else 2e-6
    for got, wanted in zip(found, (weights.detach(), slopes), strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=2e-6)


@pytest.mark.parametrize(("R", "M"), [(6, 9), (48, 70)])
def test_gradients_by_products(R: int, M: int) -> None:
    torch.manual_seed(1)
    q, k, v, to_out = (torch.randn(2, 3, n, 16).bfloat16() for n in (R, M, M, R))
    if not can_multiply(q):
        pytest.skip("this torch has no exact products")
    mask = masked(R, M, torch.bfloat16)
    leaves = [each.double().requires_grad_() for each in (q, k, v)]
    scores = leaves[0] @ leaves[1].mT * 0.25 + mask.double()
    out = scores.softmax(-1) @ leaves[2]
    wanted = torch.autograd.grad(out, leaves, to_out.double())
    means = (out.detach() * to_out).sum(-1).float()
    with exact_products():
        found = gradients(to_out, q, k, v, mask, scores.detach().logsumexp(-1).float(), means, 0.25)
    for got, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=0.02, atol=0.01 * float(expected.abs().max()))


def test_products_are_as_before_outside_of_the_block() -> None:
    if not can_multiply(torch.zeros(1, dtype=torch.bfloat16)):
        pytest.skip("this torch has no exact products")
    torch.manual_seed(2)
    x, y = torch.randn(64, 64), torch.randn(64, 64)
    before = x @ y
    with exact_products():
        pass
    assert torch.equal(x @ y, before)


def test_other_shapes_are_refused() -> None:
    scores, sums = torch.zeros(2, 3, 4), torch.zeros(2, 3)
    with pytest.raises(ShapeError):
        softmax_back(scores, scores, torch.zeros(2, 4), sums, sums, 1.0)
    with pytest.raises(ShapeError):
        softmax_back(scores.mT.contiguous().mT, scores, torch.zeros(3, 4), sums, sums, 1.0)
