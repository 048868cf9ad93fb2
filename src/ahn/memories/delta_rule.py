"""What DeltaNet and Gated DeltaNet have in common. Shapes as in `ahn.memories.base`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ahn import native
from ahn.memories.base import Memory, at_least_float32, read_rows, rms_norm, unit
from ahn.ops import write_delta_


class DeltaRule(Memory):
    """A memory that corrects what its state recalls of a key; a subclass says how strongly, and what decays."""

    state_products = 3  # what the state recalls of the key, the write, the read
    g_proj: nn.Linear
    o_norm: nn.Parameter

    def state_shape(self) -> tuple[int, int, int]:
        """`[H, K, V]`."""
        return self.shape.query_heads, self.shape.key_size, self.shape.value_size

    def queries(self, q_BTHK: torch.Tensor) -> torch.Tensor:
        """Queries as they read: l2-normalised and divided by sqrt(K)."""
        scale: float = self.shape.key_size**-0.5
        return unit(q_BTHK) * scale

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
        write_LBH, decay_LBH = memories[0].gating(gates_LBNH)
        k, v, write, state = (x.flatten(0, 1) for x in (unit(k_LBGK), v_LBGV, write_LBH, state_LB))
        write_delta_(k, at_least_float32(v), None if decay_LBH is None else decay_LBH.flatten(0, 1), write, state)

    def read(self, q_BTHK: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """See `Memory.read`."""
        return read_rows(self.queries(q_BTHK), state)

    def output_weights(self) -> native.OutputWeights:
        """See `Memory.output_weights`."""
        scale = self.shape.key_size**-0.5
        return native.OutputWeights(
            self.g_proj.weight, self.g_proj.bias, self.o_norm, self.o_proj, scale, per_head=True
        )

    def gated_norm(self, read_BTHV: torch.Tensor, x_BTD: torch.Tensor) -> torch.Tensor:
        """RMS norm per head times silu of one gate per head."""
        gate_BTH = F.silu(at_least_float32(self.g_proj(x_BTD)))
        return rms_norm(read_BTHV, self.o_norm) * gate_BTH[..., None]
