"""Mamba2: a state-space update with one decay per head and token. Shapes as in `ahn.memories.base`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from ahn import native
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
from ahn.ops import state_space, write_state_space_


class Mamba2(Memory):
    """S <- exp(-dt A) S + dt v k^T, with the step dt from the evicted token's hidden state.

    Source: arXiv 2510.07318, table of variants; the update is that of arXiv 2405.21060.
    """

    gate_count = 1
    state_products = 2  # the write, the read

    def __init__(self, shape: MemoryShape) -> None:
        super().__init__(shape)
        heads, hidden = shape.query_heads, shape.hidden_size
        self.A_log = draw_decay(heads)
        self.dt_bias = draw_step(heads)
        self.dt_proj = gate_projection(hidden, heads, bias=True)
        self.g_proj = gate_projection(hidden, heads, bias=True)
        self.norm = nn.Parameter(torch.ones(heads * shape.value_size))

    def state_shape(self) -> tuple[int, int, int]:
        """`[H, V, K]`: transposed against the delta rules, as published."""
        return self.shape.query_heads, self.shape.value_size, self.shape.key_size

    def gates(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Step dt > 0, `[B, T, 1, H]`."""
        return F.softplus(at_least_float32(self.dt_proj(x_BTD)) + self.dt_bias).unsqueeze(-2)

    def gating(self, gates_BTNH: torch.Tensor) -> Gating:
        """Step dt and decay exp(-dt A)."""
        dt_BTH = gates_BTNH.squeeze(-2)
        return Gating(dt_BTH, self._log_decay(dt_BTH).exp())

    def scan(
        self,
        q_BTHK: torch.Tensor,
        k_BTGK: torch.Tensor,
        v_BTGV: torch.Tensor,
        gates_BTNH: torch.Tensor,
        state: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Memory.scan`; keys and queries are l2-normalised, queries are not scaled further."""
        dt_BTH = gates_BTNH.squeeze(-2)
        g_BTH = self._log_decay(dt_BTH)
        return state_space(unit(q_BTHK), unit(k_BTGK), at_least_float32(v_BTGV), g_BTH, dt_BTH, state)

    @classmethod
    def gates_of_layers(cls, memories: Sequence[Memory], x_LBD: torch.Tensor) -> torch.Tensor:
        """See `Memory.gates_of_layers`."""
        mine = cast("Sequence[Mamba2]", memories)
        (dt_LBH,) = project_layers(x_LBD, [(memory.dt_proj,) for memory in mine])
        bias, dt_bias = (torch.stack(each)[:, None] for each in zip(*((m.dt_proj.bias, m.dt_bias) for m in mine)))
        return F.softplus(at_least_float32(dt_LBH + bias) + dt_bias).unsqueeze(-2)

    @classmethod
    def update(
        cls,
        memories: Sequence[Memory],
        k_LBGK: torch.Tensor,
        v_LBGV: torch.Tensor,
        gates_LBNH: torch.Tensor,
        state_LB: torch.Tensor,
    ) -> None:
        """See `Memory.update`."""
        A_log = torch.stack([memory.A_log for memory in cast("Sequence[Mamba2]", memories)])
        dt_LBH = gates_LBNH.squeeze(-2)
        decay_LBH = (-at_least_float32(A_log).exp()[:, None] * dt_LBH).exp()
        k, v, decay, dt, state = (x.flatten(0, 1) for x in (unit(k_LBGK), v_LBGV, decay_LBH, dt_LBH, state_LB))
        write_state_space_(k, at_least_float32(v), decay, dt, state)

    def read(self, q_BTHK: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """See `Memory.read`."""
        return read_rows(unit(q_BTHK), state.mT)

    def output_weights(self) -> native.OutputWeights:
        """See `Memory.output_weights`."""
        return native.OutputWeights(
            self.g_proj.weight, self.g_proj.bias, self.norm, self.o_proj, scale=1.0, per_head=False
        )

    def gated_norm(self, read_BTHV: torch.Tensor, x_BTD: torch.Tensor) -> torch.Tensor:
        """RMS norm over all heads at once, after multiplying with silu of one gate per head."""
        gate_BTH = F.silu(at_least_float32(self.g_proj(x_BTD)))
        gated_BTHV = read_BTHV * gate_BTH[..., None]
        return rms_norm(gated_BTHV.flatten(-2), self.norm).view_as(gated_BTHV)

    def _log_decay(self, dt_BTH: torch.Tensor) -> torch.Tensor:
        return -at_least_float32(self.A_log).exp() * dt_BTH
