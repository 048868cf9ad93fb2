"""How far the student's next-token distributions are from the teacher's, and from the text: in slices of positions.

Legend of shapes: B rows, T tokens, N positions that count, D hidden size, V vocabulary. No tensor of [T, V] exists, of
neither model, forward or backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ahn.distillation.head import Head
from ahn.distillation.targets import Targets
from ahn.native.divergence import can_diverge, divergence
from ahn.ops import at_least_float32

_SLICE_BYTES = 2**24  # logits of a slice and model; with twice as many, glibc gives them back and fetches new memory


def vocabulary_losses(
    model: nn.Module,
    student_ND: torch.Tensor,
    teacher_ND: torch.Tensor | None,
    targets: Targets,
    names: tuple[str, ...],
    slice_tokens: int | None = None,
) -> dict[str, torch.Tensor]:
    """Sums of the losses on next-token distributions, in slices of positions.

    Args:
        model: The model.
        student_ND: Last hidden states of the student, `[B * T, D]`.
        teacher_ND: Those of the teacher; needed for "kl" only.
        targets: The positions that count.
        names: Names of losses; those other than "kl" and "ce" are left out.
        slice_tokens: Positions whose logits exist at the same time; as many as make 16 MiB if left out.
    """
    head: Any = Head(model)
    names = tuple(name for name in ("kl", "ce") if name in names)
    rows = torch.cat([getattr(targets, name) for name in names]).unique()
    labels = torch.full((student_ND.size(0),), -100, device=rows.device)
    labels[targets.ce] = targets.ce_labels
    in_kl = torch.zeros(student_ND.size(0), dtype=torch.bool, device=rows.device)
    in_kl[targets.kl] = True

    def measure(hidden_ND: torch.Tensor, rows: torch.Tensor) -> list[torch.Tensor]:
        logits = head(hidden_ND)
        losses = []
        if "kl" in names and teacher_ND is not None:
            with torch.no_grad():
                expected = head(teacher_ND[rows])
            losses.append((_divergence(expected, logits) * in_kl[rows]).sum())
        if "ce" in names:
            losses.append(F.cross_entropy(at_least_float32(logits), labels[rows], ignore_index=-100, reduction="sum"))
        return losses

    size = slice_tokens or max(16, _SLICE_BYTES // (head.backbone.config.vocab_size * _logit_bytes(student_ND)))
    sums: torch.Tensor = _Sliced.apply(student_ND, rows, measure, size, len(names))
    return dict(zip(names, sums.unbind()))


class _Sliced(torch.autograd.Function):
    """Sums of losses over slices of positions; the gradient of each slice is taken while its logits are still there."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        rows: torch.Tensor,
        measure: Callable[[torch.Tensor, torch.Tensor], list[torch.Tensor]],
        size: int,
        count: int,
    ) -> torch.Tensor:
        sums = torch.zeros(count, dtype=at_least_float32(hidden_ND[:0]).dtype, device=hidden_ND.device)
        gradients = [torch.zeros_like(hidden_ND[rows]) for _ in range(count)] if ctx.needs_input_grad[0] else []
        for start in range(0, rows.numel(), size):
            part = rows[start : start + size]
            with torch.set_grad_enabled(bool(gradients)):
                hidden = hidden_ND[part].detach().requires_grad_(bool(gradients))
                losses = measure(hidden, part)
            sums += torch.stack([loss.detach() for loss in losses])
            for number, (gradient, loss) in enumerate(zip(gradients, losses)):
                (slope,) = torch.autograd.grad(loss, hidden, retain_graph=number + 1 < count)
                gradient[start : start + size] = slope
        ctx.save_for_backward(rows, *gradients)
        ctx.shape = hidden_ND.shape
        return sums

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, *gradients = ctx.saved_tensors
        if not gradients:
            return None, None, None, None, None
        total = sum(factor.to(gradient.dtype) * gradient for factor, gradient in zip(outputs[0], gradients))
        spread = gradients[0].new_zeros(ctx.shape)
        spread[rows] = total
        return spread, None, None, None, None


def _logit_bytes(hidden_ND: torch.Tensor) -> int:
    """Bytes of a logit as the head gives it, of float32 at most."""
    device = hidden_ND.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_ND.dtype
    return min(4, dtype.itemsize)


def _divergence(teacher_NV: torch.Tensor, student_NV: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) of each row, `[N]`."""
    if can_diverge(student_NV, teacher_NV):
        return divergence(student_NV, teacher_NV)
    teacher_NV, student_NV = (at_least_float32(logits).log_softmax(-1) for logits in (teacher_NV, student_NV))
    return F.kl_div(student_NV, teacher_NV, reduction="none", log_target=True).sum(-1)
