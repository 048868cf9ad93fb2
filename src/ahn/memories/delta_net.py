"""DeltaNet: the delta rule without decay. Shapes as in `ahn.memories.base`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn

from ahn.memories.base import (
    Gating,
    Memory,
    MemoryShape,
    at_least_float32,
    gate_projection,
    project_layers,
    unit,
)
from ahn.memories.delta_rule import DeltaRule
from ahn.ops import delta_rule


class DeltaNet(DeltaRule):
    """S <- (I - beta k k^T) S + beta k v^T, with beta from the evicted token's hidden state.

    Source: arXiv 2510.07318, table of variants; the rule is that of arXiv 2406.06484.
    """

    gate_count = 1

    def __init__(self, shape: MemoryShape) -> None:
        super().__init__(shape)
        self.b_proj = gate_projection(shape.hidden_size, shape.query_heads)
        self.g_proj = gate_projection(shape.hidden_size, shape.query_heads)
        self.o_norm = nn.Parameter(torch.ones(shape.value_size))

    def gates(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Write strength beta in (0, 1), `[B, T, 1, H]`."""
        return at_least_float32(torch.sigmoid(self.b_proj(x_BTD))).unsqueeze(-2)

    @classmethod
    def gates_of_layers(cls, memories: Sequence[Memory], x_LBD: torch.Tensor) -> torch.Tensor:
        """See `Memory.gates_of_layers`."""
        (b_LBH,) = project_layers(x_LBD, [(memory.b_proj,) for memory in cast("Sequence[DeltaNet]", memories)])
        return at_least_float32(torch.sigmoid(b_LBH)).unsqueeze(-2)

    def gating(self, gates_BTNH: torch.Tensor) -> Gating:
        """Write strength beta; nothing decays."""
        return Gating(gates_BTNH.squeeze(-2), None)

    def scan(
        self,
        q_BTHK: torch.Tensor,
        k_BTGK: torch.Tensor,
        v_BTGV: torch.Tensor,
        gates_BTNH: torch.Tensor,
        state: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Memory.scan`; keys and queries are l2-normalised, queries also divided by sqrt(K)."""
        return delta_rule(self.queries(q_BTHK), unit(k_BTGK), at_least_float32(v_BTGV), gates_BTNH.squeeze(-2), state)
