"""Gated DeltaNet: a delta rule whose state also decays. Shapes as in `ahn.memories.base`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from ahn.memories.base import (
    Gating,
    Memory,
    MemoryShape,
    at_least_float32,
    draw_decay,
    draw_step,
    gate_projection,
    project_layers,
    unit,
)
from ahn.memories.delta_rule import DeltaRule
from ahn.ops import gated_delta_rule


class GatedDeltaNet(DeltaRule):
    """S <- alpha (I - beta k k^T) S + beta k v^T, with beta and alpha from the evicted token's hidden state.

    Source: arXiv 2510.07318, equations 5 to 8; the rule is that of arXiv 2412.06464.
    """

    gate_count = 2

    def __init__(self, shape: MemoryShape) -> None:
        super().__init__(shape)
        heads, hidden = shape.query_heads, shape.hidden_size
        self.A_log = draw_decay(heads)
        self.dt_bias = draw_step(heads)
        self.a_proj = gate_projection(hidden, heads)
        self.b_proj = gate_projection(hidden, heads)
        self.g_proj = gate_projection(hidden, heads)
        self.o_norm = nn.Parameter(torch.ones(shape.value_size))

    def gates(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Log decay (natural, <= 0) and write strength beta in (0, 1), `[B, T, 2, H]`."""
        return _gates(self.a_proj(x_BTD), self.b_proj(x_BTD), self.A_log, self.dt_bias)

    @classmethod
    def gates_of_layers(cls, memories: Sequence[Memory], x_LBD: torch.Tensor) -> torch.Tensor:
        """See `Memory.gates_of_layers`."""
        mine = cast("Sequence[GatedDeltaNet]", memories)
        a_LBH, b_LBH = project_layers(x_LBD, [(memory.a_proj, memory.b_proj) for memory in mine])
        A_log, dt_bias = (torch.stack(each)[:, None] for each in zip(*((m.A_log, m.dt_bias) for m in mine)))
        return _gates(a_LBH, b_LBH, A_log, dt_bias)

    def gating(self, gates_BTNH: torch.Tensor) -> Gating:
        """Write strength beta and decay alpha."""
        g_BTH, beta_BTH = gates_BTNH.unbind(-2)
        return Gating(beta_BTH, g_BTH.exp())

    def scan(
        self,
        q_BTHK: torch.Tensor,
        k_BTGK: torch.Tensor,
        v_BTGV: torch.Tensor,
        gates_BTNH: torch.Tensor,
        state: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Memory.scan`; keys and queries are l2-normalised, queries also divided by sqrt(K)."""
        g_BTH, beta_BTH = gates_BTNH.unbind(-2)
        return gated_delta_rule(self.queries(q_BTHK), unit(k_BTGK), at_least_float32(v_BTGV), g_BTH, beta_BTH, state)


def _gates(a: torch.Tensor, b: torch.Tensor, A_log: torch.Tensor, dt_bias: torch.Tensor) -> torch.Tensor:
    """Log decay and write strength from what the projections give, side by side as the last dimension but one."""
    step = F.softplus(at_least_float32(a) + dt_bias)
    return torch.stack((-at_least_float32(A_log).exp() * step, at_least_float32(torch.sigmoid(b))), dim=-2)
