"""Norms and gated activations with gradients, by the kernels.

Legend of shapes: N rows, D numbers of a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ahn import native
from ahn.native.checks import check_shapes

_SLABS = 64  # of rows, whose gradients of a weight are summed one after the other: the order is always the same


def can_norm(x: Tensor, weight_D: Tensor | None = None) -> bool:
    """Whether `norm` takes these, and a gradient is wanted: plain float32 on a CPU."""
    tensors = [x] if weight_D is None else [x, weight_D]
    if not torch.is_grad_enabled() or not any(each.requires_grad for each in tensors):
        return False
    return x.dim() > 0 and is_plain(*tensors)


def is_plain(*tensors: Tensor) -> bool:
    """Whether these are plain float32 tensors on a CPU, with or without gradients, and there are kernels."""
    with torch.no_grad():
        return native.ready(*tensors)


def norm(x: Tensor, weight_D: Tensor | None, share: float, eps: float) -> Tensor:
    """`weight * x / sqrt(share * sum(x^2) + eps)` over the last dimension, `[..., D]`; with gradients.

    Args:
        x: Vectors, `[..., D]` float32.
        weight_D: The weight, `[D]` float32, or `None` for ones.
        share: Factor on the sum of the squares.
        eps: What is added to it.
    """
    normed: Tensor = _RowNorm.apply(x.contiguous(), weight_D, share, eps, False)[0]
    return normed


def norm_twice(x: Tensor, weight_D: Tensor, share: float, eps: float) -> tuple[Tensor, Tensor]:
    """What `norm` gives, and the same in bfloat16; gradients of both flow back."""
    both: tuple[Tensor, Tensor] = _RowNorm.apply(x.contiguous(), weight_D, share, eps, True)
    return both


class _RowNorm(torch.autograd.Function):
    """Keeps nothing but its input."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_D: Tensor | None, share: float, eps: float, twice: bool
    ) -> tuple[Tensor, Tensor | None]:
        D = x.size(-1)
        check_shapes((weight_D, (D,)))
        weight_D = None if weight_D is None else weight_D.contiguous()
        out, half = torch.empty_like(x), torch.empty_like(x, dtype=torch.bfloat16) if twice else None
        native._run("ahn_norm", x.numel() // max(1, D), D, share, eps, x, weight_D, out, half)
        ctx.save_for_backward(x, weight_D)
        ctx.share, ctx.eps = share, eps
        ctx.set_materialize_grads(False)
        return out, half

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight_D = ctx.saved_tensors
        to_out, to_half = (None if each is None else each.contiguous() for each in gradients)
        D = x.size(-1)
        N = x.numel() // max(1, D)
        slabs = max(1, min(N, _SLABS))
        to_weight = torch.zeros(slabs, D) if ctx.needs_input_grad[1] else None
        to_x = torch.empty_like(x)
        slopes = to_out, to_half, to_x, to_weight
        native._run("ahn_norm_back", N, D, slabs, ctx.share, ctx.eps, x, weight_D, *slopes)
        return to_x, None if to_weight is None else to_weight.sum(0), None, None, None


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, rounded once; without gradients.

    Args:
        gate: Numbers, bfloat16, dense.
        up: As many.
    """
    check_shapes((up, tuple(gate.shape)))
    out = torch.empty_like(gate)
    native._run("ahn_gated", gate.numel(), gate, up, out)
    return out


def gated_back(gate: Tensor, up: Tensor, to_out: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `gate` and `up` from that of `gated`; all bfloat16 and dense."""
    check_shapes((up, tuple(gate.shape)), (to_out, tuple(gate.shape)))
    to_gate, to_up = torch.empty_like(gate), torch.empty_like(up)
    native._run("ahn_gated_back", gate.numel(), gate, up, to_out, to_gate, to_up)
    return to_gate, to_up
