"""The divergence of two sets of logits, and its gradient, by the kernels.

Legend of shapes: N positions, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ahn import native
from ahn.native.checks import check_shapes

_DTYPES = (torch.float32, torch.bfloat16)


def can_diverge(student_NV: Tensor, teacher_NV: Tensor) -> bool:
    """Whether `divergence` takes these logits: on a CPU, of one dtype, which is float32 or bfloat16."""
    if torch.compiler.is_compiling() or student_NV.dtype not in _DTYPES or teacher_NV.dtype is not student_NV.dtype:
        return False
    return all(each.is_cpu and type(each) is Tensor for each in (student_NV, teacher_NV)) and native.ready()


def divergence(student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    """KL(teacher || student) of each row, `[N]` float32, in nats; gradients flow to the student's logits.

    Args:
        student_NV: Logits of the student, float32 or bfloat16.
        teacher_NV: Those of the teacher, in the same dtype.
    """
    check_shapes((teacher_NV, tuple(student_NV.shape)))
    divergences: Tensor = _Divergence.apply(student_NV.contiguous(), teacher_NV.contiguous())
    return divergences


class _Divergence(torch.autograd.Function):
    """What is kept of a row beside its logits is the largest of each model and the sum of its exponentials."""

    @staticmethod
    def forward(ctx: Any, student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
        N, V = student_NV.shape
        sums = torch.empty(2, N, 2)
        out = torch.empty(N)
        is_half = int(student_NV.dtype is torch.bfloat16)
        native._run("ahn_divergence", N, V, student_NV, teacher_NV, sums[0], sums[1], out, is_half)
        ctx.save_for_backward(student_NV, teacher_NV, sums)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        student_NV, teacher_NV, sums = ctx.saved_tensors
        N, V = student_NV.shape
        slope, factor = torch.empty_like(student_NV), gradients[0].contiguous()
        is_half = int(student_NV.dtype is torch.bfloat16)
        native._run("ahn_divergence_back", N, V, student_NV, teacher_NV, sums[0], sums[1], factor, slope, is_half)
        return slope, None
