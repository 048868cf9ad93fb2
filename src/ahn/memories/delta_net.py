"""DeltaNet: the delta rule without decay. Shapes as in `ahn.memories.base`."""

from __future__ import annotations

import torch

from ahn.memories.base import Memory


class DeltaNet(Memory):
    """S <- (I - beta k k^T) S + beta k v^T, with beta from the evicted token's hidden state.

    Source: arXiv 2510.07318, table of variants; the rule is that of arXiv 2406.06484.
    """

    rule = "delta"
    projections = ("b_proj",)

    @staticmethod
    def activate(b: torch.Tensor) -> tuple[None, torch.Tensor]:
        """No decay, and write strength beta in (0, 1); see `Memory.activate`."""
        return None, torch.sigmoid(b)
