"""Gated DeltaNet: a delta rule whose state also decays. Shapes as in `ahn.memories.base`."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F

from ahn.memories._draws import draw_log_rate, draw_step_bias
from ahn.memories.base import Memory


class GatedDeltaNet(Memory):
    """S <- alpha (I - beta k k^T) S + beta k v^T, with beta and alpha from the evicted token's hidden state.

    Source: arXiv 2510.07318, equations 5 to 8; the rule is that of arXiv 2412.06464.
    """

    rule = "delta"
    projections = ("a_proj", "b_proj")
    gate_parameters: ClassVar = {"A_log": draw_log_rate, "dt_bias": draw_step_bias}
    log_rate = "A_log"

    @staticmethod
    def activate(
        a: torch.Tensor, b: torch.Tensor, A_log: torch.Tensor, dt_bias: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log decay log alpha = -A softplus(a + dt_bias) and write strength beta in (0, 1); see `Memory.activate`."""
        return -A_log.exp() * F.softplus(a + dt_bias), torch.sigmoid(b)
