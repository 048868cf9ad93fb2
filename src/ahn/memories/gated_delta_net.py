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
    read_rows,
    rms_norm,
    unit,
)
from ahn.ops import gated_delta_rule, write_delta_


class GatedDeltaNet(Memory):
    """S <- alpha (I - beta k k^T) S + beta k v^T, with beta and alpha from the evicted token's hidden state.

    Source: arXiv 2510.07318, equations 5 to 8; the rule is that of arXiv 2412.06464.
    """

    gate_count = 2
    state_products = 3  # what the state recalls of the key, the write, the read

    def __init__(self, shape: MemoryShape) -> None:
        super().__init__(shape)
        heads, hidden = shape.query_heads, shape.hidden_size
        self.A_log = draw_decay(heads)
        self.dt_bias = draw_step(heads)
        self.a_proj = gate_projection(hidden, heads)
        self.b_proj = gate_projection(hidden, heads)
        self.g_proj = gate_projection(hidden, heads)
        self.o_norm = nn.Parameter(torch.ones(shape.value_size))

    def state_shape(self) -> tuple[int, int, int]:
        """`[H, K, V]`."""
        return self.shape.query_heads, self.shape.key_size, self.shape.value_size

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
        q_BTHK = unit(q_BTHK) * self.shape.key_size**-0.5
        g_BTH, beta_BTH = gates_BTNH.unbind(-2)
        return gated_delta_rule(q_BTHK, unit(k_BTGK), at_least_float32(v_BTGV), g_BTH, beta_BTH, state)

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
        write_delta_(k, at_least_float32(v), gates[:, 0].exp(), gates[:, 1], state)

    def read(self, q_BTHK: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """See `Memory.read`."""
        return read_rows(unit(q_BTHK) * self.shape.key_size**-0.5, state)

    def normalise(self, read_BTHV: torch.Tensor, x_BTD: torch.Tensor) -> torch.Tensor:
        """RMS norm per head times silu of one gate per head."""
        gate_BTH = F.silu(at_least_float32(self.g_proj(x_BTD)))
        return rms_norm(read_BTHV, self.o_norm) * gate_BTH[..., None]


def _gates(a: torch.Tensor, b: torch.Tensor, A_log: torch.Tensor, dt_bias: torch.Tensor) -> torch.Tensor:
    """Log decay and write strength from what the projections give, side by side as the last dimension but one."""
    step = F.softplus(at_least_float32(a) + dt_bias)
    return torch.stack((-at_least_float32(A_log).exp() * step, at_least_float32(torch.sigmoid(b))), dim=-2)
