"""What gate parameters of fresh memories are drawn from. Legend of shapes: H query heads."""

from __future__ import annotations

import torch


def draw_log_rate(heads: int) -> torch.Tensor:
    """Log of the decay rate of each head, `[H]`: the rate is drawn from U(0, 16). Source: arXiv 2412.06464."""
    return torch.empty(heads).uniform_(0, 16).clamp_(min=1e-4).log()


def draw_step_bias(heads: int) -> torch.Tensor:
    """Bias of each step, `[H]`: its softplus is drawn log-uniformly from (0.001, 0.1). Source: arXiv 2405.21060."""
    low, high = torch.tensor(0.001).log(), torch.tensor(0.1).log()
    step = (torch.rand(heads) * (high - low) + low).exp()
    return step + torch.log(-torch.expm1(-step))  # the inverse of softplus
