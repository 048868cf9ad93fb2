"""The record of a token: what the memory needs when the token is evicted, stored beside its key and value until then.

Legend of shapes: B batch, T tokens, N gates per head, H query heads, P numbers of a position, F numbers of a record.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class TokenRecord(NamedTuple):
    """Gates and positions of tokens.

    Attributes:
        gates: `[..., N, H]`, as the memory gives them.
        position: What `Rotation.unrotate_recorded` needs, `[..., P]`; `None` for a memory that keeps the rotation.
    """

    gates: torch.Tensor
    position: torch.Tensor | None

    def pack(self) -> torch.Tensor:
        """Both in one tensor, `[..., F]` in the dtype of the gates."""
        gates = self.gates.flatten(-2)
        return gates if self.position is None else torch.cat((gates, self.position.to(gates.dtype)), dim=-1)

    @classmethod
    def unpack(cls, record: torch.Tensor, gate_count: int, heads: int) -> TokenRecord:
        """What `pack` put into one tensor.

        Args:
            record: `[..., F]`.
            gate_count: Gates per head, N.
            heads: Query heads, H.
        """
        width = gate_count * heads
        position = record[..., width:] if record.size(-1) > width else None
        return cls(record[..., :width].unflatten(-1, (gate_count, heads)), position)
