"""The learned vote: two small layers on what an attention layer reads.

Legend of shapes: B batch, T tokens, D hidden size, M width.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


class AnchorGate(nn.Module):
    """How much questions will look at a token, from the hidden state that a layer reads.

    Args:
        hidden_size: Size of the hidden state, D.
        width: Units between the two layers, M.
    """

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(hidden_size, width)
        self.outer = nn.Linear(width, 1)

    def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Votes, `[B, T]` float32.

        Args:
            hidden_BTD: Input of the attention layer, after the layer's input norm.
        """
        inner_BTM = functional.silu(self.inner(hidden_BTD.to(self.inner.weight.dtype)))
        votes_BT: torch.Tensor = self.outer(inner_BTM).squeeze(-1).float()
        return votes_BT
