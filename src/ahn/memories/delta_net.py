"""DeltaNet: the delta rule without decay. Shapes as in `ahn.memories.base`."""

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
    gate_projection,
    project_layers,
    read_rows,
    rms_norm,
    unit,
)
from ahn.ops import delta_rule, write_delta_


class DeltaNet(Memory):
    """S <- (I - beta k k^T) S + beta k v^T, with beta from the evicted token's hidden state.

    Source: arXiv 2510.07318, table of variants; the rule is that of arXiv 2406.06484.
    """

    gate_count = 1
    state_products = 3  # what the state recalls of the key, the write, the read

    def __init__(self, shape: MemoryShape) -> None:
        super().__init__(shape)
        self.b_proj = gate_projection(shape.hidden_size, shape.query_heads)
        self.g_proj = gate_projection(shape.hidden_size, shape.query_heads)
        self.o_norm = nn.Parameter(torch.ones(shape.value_size))

    def state_shape(self) -> tuple[int, int, int]:
        """`[H, K, V]`."""
        return self.shape.query_heads, self.shape.key_size, self.shape.value_size

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
        q_BTHK = unit(q_BTHK) * self.shape.key_size**-0.5
        return delta_rule(q_BTHK, unit(k_BTGK), at_least_float32(v_BTGV), gates_BTNH.squeeze(-2), state)

    @classmethod
    def fold(
        cls,
        memories: Sequence[Memory],
        k_LBGK: torch.Tensor,
        v_LBGV: torch.Tensor,
        gates_LBNH: torch.Tensor,
        state_LB: torch.Tensor,
    ) -> None:
        """See `Memory.fold`."""
        k, v, gates, state = (x.flatten(0, 1) for x in (unit(k_LBGK), v_LBGV, gates_LBNH, state_LB))
        write_delta_(k, at_least_float32(v), None, gates[:, 0], state)

    def read(self, q_BTHK: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """See `Memory.read`."""
        return read_rows(unit(q_BTHK) * self.shape.key_size**-0.5, state)

    def normalise(self, read_BTHV: torch.Tensor, x_BTD: torch.Tensor) -> torch.Tensor:
        """RMS norm per head times silu of one gate per head."""
        gate_BTH = F.silu(at_least_float32(self.g_proj(x_BTD)))
        return rms_norm(read_BTHV, self.o_norm) * gate_BTH[..., None]
