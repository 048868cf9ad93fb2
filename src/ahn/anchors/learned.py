"""The score `learned`: a small trained network on what an attention layer reads.

Legend of shapes: B batch, T tokens, D hidden size, M width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional

from ahn.anchors.base import LayerTokens, Score
from ahn.anchors.pooling import Pooling
from ahn.errors import ShapeError


class AnchorGate(nn.Module):
    """Foresees how much later questions attend to a token, from the hidden state that a layer reads.

    Args:
        hidden_size: Size of the hidden state, D.
        width: Units between the two layers, M.
    """

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(hidden_size, width)
        self.outer = nn.Linear(width, 1)

    def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Scores, `[B, T]` float32.

        Args:
            hidden_BTD: Input of the attention layer, after the layer's input norm.
        """
        inner_BTM = functional.silu(self.inner(hidden_BTD.to(self.inner.weight.dtype)))
        scores_BT: torch.Tensor = self.outer(inner_BTM).squeeze(-1).float()
        return scores_BT


class Learned(Score):
    """What a network says that was trained to foresee how much questions attend to a token: `ahn train anchors`."""

    name = "learned"
    pooling = Pooling(spread=(12, 4), firm=1.1)  # in standard deviations of what was trained for
    weight_names = ("inner.weight", "inner.bias", "outer.weight", "outer.bias")

    def score(self, tokens: LayerTokens) -> torch.Tensor:
        """See `Score.score`."""
        scores: torch.Tensor = tokens.weights(tokens.hidden)
        return scores

    def build(
        self, tensors: Mapping[str, torch.Tensor], *, hidden_size: int, kv_heads: int, key_size: int
    ) -> AnchorGate:
        """See `Score.build`."""
        width = tensors["inner.bias"].numel()
        if tensors["inner.weight"].shape != (width, hidden_size):
            raise ShapeError(
                f"inner.weight has the shape {list(tensors['inner.weight'].shape)} instead of {[width, hidden_size]}"
            )
        return AnchorGate(hidden_size, width)
