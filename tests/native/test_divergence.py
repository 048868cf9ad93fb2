"""The divergence of logits and its gradient by the kernels, against torch in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ahn import native
from ahn.errors import ShapeError
from ahn.native.divergence import can_diverge, divergence

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=f"no kernels here: {native.why_not()}")


def logits(N: int, V: int, dtype: torch.dtype, scale: float = 4.0, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """Of student and teacher, which are alike."""
    random = torch.Generator().manual_seed(N * 1000 + V)
    student = scale * torch.randn(N, V, generator=random)
    teacher = student + 0.3 * scale * torch.randn(N, V, generator=random) + offset
    return student.to(dtype), teacher.to(dtype)


def expected(student: Tensor, teacher: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Divergences and the gradient of their weighted sum, in float64."""
    leaf = student.double().requires_grad_()
    log_shares = teacher.double().log_softmax(-1)
    divergences = F.kl_div(leaf.log_softmax(-1), log_shares, log_target=True, reduction="none").sum(-1)
    (slope,) = torch.autograd.grad((divergences * factor).sum(), leaf)
    return divergences.detach(), slope


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offset", [0.0, 300.0])
@pytest.mark.parametrize(("N", "V"), [(1, 1), (3, 7), (2, 8), (5, 1003), (4, 4096)])
def test_divergence(N: int, V: int, offset: float, dtype: torch.dtype) -> None:
    student, teacher = logits(N, V, dtype, offset=offset)
    factor = torch.linspace(0, 2, N)
    wanted, wanted_slope = expected(student, teacher, factor)
    leaf = student.requires_grad_()
    found = divergence(leaf, teacher)
    (slope,) = torch.autograd.grad((found * factor).sum(), leaf)
    assert found.dtype == torch.float32
    assert slope.dtype == dtype
    torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=1e-5)
    rounding = 2**-8 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(slope.double(), wanted_slope, rtol=rounding, atol=1e-6)


def test_equal_logits_diverge_by_nothing() -> None:
    student, _ = logits(3, 999, torch.float32, scale=20.0)
    leaf = student.clone().requires_grad_()
    found = divergence(leaf, student)
    found.sum().backward()
    torch.testing.assert_close(found, torch.zeros(3), rtol=0, atol=1e-6)
    torch.testing.assert_close(leaf.grad, torch.zeros(3, 999), rtol=0, atol=1e-6)


def test_rows_of_any_layout() -> None:
    student, teacher = logits(6, 50, torch.float32)
    turned = student.T.contiguous().T
    torch.testing.assert_close(divergence(turned, teacher), divergence(student, teacher), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_logit_that_is_no_number_spoils_its_row_only(dtype: torch.dtype) -> None:
    student, teacher = logits(3, 64, dtype)
    student[1, 5] = float("nan")
    leaf = student.requires_grad_()
    found = divergence(leaf, teacher)
    found.sum().backward()
    assert found.isnan().tolist() == [False, True, False]
    assert leaf.grad.isnan().all(-1).tolist() == [False, True, False]


def test_what_is_left_to_torch() -> None:
    student, teacher = logits(2, 16, torch.float32)
    assert can_diverge(student, teacher)
    assert not can_diverge(student.double(), teacher.double())
    assert not can_diverge(student.half(), teacher.half())
    assert not can_diverge(student.bfloat16(), teacher)
    with native.switched_off():
        assert not can_diverge(student, teacher)
    with pytest.raises(ShapeError):
        divergence(student, teacher[:1])
