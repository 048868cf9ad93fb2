"""The score `learned`: a small trained network on what an attention layer reads.

Legend of shapes: B batch, T tokens, D hidden size, M width, R 2, what is foreseen.
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
    """Foresees how much questions about a text attend to a token, and the text itself, from what a layer reads.

    Args:
        hidden_size: Size of the hidden state, D.
        width: Units between the two layers, M.
        outputs: 2 for both; 1 for weights that foresee questions alone.
    """

    def __init__(self, hidden_size: int, width: int, outputs: int = 2) -> None:
        super().__init__()
        self.inner = nn.Linear(hidden_size, width)
        self.outer = nn.Linear(width, outputs)

    def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """What questions need, then what the text needs, `[B, T, R]` float32; the same twice for a single output.

        Args:
            hidden_BTD: Input of the attention layer, after the layer's input norm.
        """
        inner_BTM = functional.silu(self.inner(hidden_BTD.to(self.inner.weight.dtype)))
        scores_BTR: torch.Tensor = self.outer(inner_BTM).float().expand(*inner_BTM.shape[:2], 2)
        return scores_BTR


class Learned(Score):
    """What a network says that was trained to foresee how much later tokens attend to one: `ahn train anchors`.

    What questions will surely ask for is kept first, in whole spans. What the text itself will need fills the rest.
    """

    name = "learned"
    pooling = Pooling(spread=(12, 4), firm=0.95)  # in standard deviations of what was trained for
    weight_names = ("inner.weight", "inner.bias", "outer.weight", "outer.bias")

    def score(self, tokens: LayerTokens) -> torch.Tensor:
        """See `Score.score`."""
        scores_BTR: torch.Tensor = tokens.weights(tokens.hidden)
        return scores_BTR[:, :, None]

    def build(
        self, tensors: Mapping[str, torch.Tensor], *, hidden_size: int, kv_heads: int, key_size: int
    ) -> AnchorGate:
        """See `Score.build`."""
        width, outputs = tensors["inner.bias"].numel(), tensors["outer.bias"].numel()
        if outputs not in (1, 2):
            raise ShapeError(f"outer.bias holds {outputs} numbers; learned foresees one thing or two")
        if tensors["inner.weight"].shape != (width, hidden_size):
            raise ShapeError(
                f"inner.weight has the shape {list(tensors['inner.weight'].shape)} instead of {[width, hidden_size]}"
            )
        return AnchorGate(hidden_size, width, outputs)
