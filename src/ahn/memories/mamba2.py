"""Mamba2: a state-space update with one decay per head and token. Shapes as in `ahn.memories.base`."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F

from ahn.memories._draws import draw_log_rate, draw_step_bias
from ahn.memories.base import Memory


class Mamba2(Memory):
    """S <- exp(-dt A) S + dt v k^T, with the step dt from the evicted token's hidden state.

    Source: arXiv 2510.07318, table of variants; the update is that of arXiv 2405.21060.
    """

    rule = "additive"
    projections = ("dt_proj",)
    gate_parameters: ClassVar = {"A_log": draw_log_rate, "dt_bias": draw_step_bias}
    log_rate = "A_log"
    bias = True
    norm_per_head = False

    @staticmethod
    def activate(dt: torch.Tensor, A_log: torch.Tensor, dt_bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log decay -dt A, with the step dt = softplus(dt + dt_bias) as write strength; see `Memory.activate`."""
        step = F.softplus(dt + dt_bias)
        return -A_log.exp() * step, step
