"""Norms of vectors, at least in float32, as the kernels in C compute them too."""

from __future__ import annotations

import torch
from torch import Tensor

from ahn.native import elementwise
from ahn.ops._shared import at_least_float32


def unit(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Scale `x` to length 1 along the last dimension; zeros stay zeros.

    Args:
        x: Vectors, `[..., D]`.
        eps: Added to the squared length.

    Returns:
        `[..., D]` float32 (float64 for float64 vectors).
    """
    x = at_least_float32(x)
    if elementwise.can_norm(x):
        return elementwise.norm(x, None, 1.0, eps)
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float = 1e-5) -> Tensor:
    """Divide `x` by its root mean square over the last dimension, and multiply it with a weight.

    Args:
        x: Vectors, `[..., D]` float32 or float64.
        weight_D: The weight, `[D]`.
        eps: Added to the mean square.

    Returns:
        `[..., D]` in the dtype of `x`.
    """
    if elementwise.can_norm(x, weight_D):
        return elementwise.norm(x, weight_D, 1 / x.size(-1), eps)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight_D.to(x.dtype)
