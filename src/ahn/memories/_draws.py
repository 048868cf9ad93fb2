"""How gate parameters start, as published with Mamba2 (arXiv 2405.21060) and Gated DeltaNet (arXiv 2412.06464)."""

from __future__ import annotations

import torch


def draw_log_rate(heads: int) -> torch.Tensor:
    """Log of the decay rate of each head, `[H]`: the rate is drawn from U(0, 16)."""
    return torch.empty(heads).uniform_(0, 16).clamp_(min=1e-4).log()


def draw_step_bias(heads: int) -> torch.Tensor:
    """Bias of the step of each head, `[H]`: its softplus is drawn log-uniformly from (0.001, 0.1)."""
    low, high = torch.tensor(0.001).log(), torch.tensor(0.1).log()
    step = (torch.rand(heads) * (high - low) + low).exp()
    return step + torch.log(-torch.expm1(-step))  # the inverse of softplus
