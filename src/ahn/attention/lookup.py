"""What the new tokens of a layer look up in one call: their queries, and the exact keys and values in reach.

Legend of shapes: B batch, T new tokens, H query heads, K key size.
"""

from __future__ import annotations

import dataclasses

import torch

from ahn.attention.call import Plan
from ahn.tokens import View


@dataclasses.dataclass(frozen=True)
class Lookup:
    """One call of one layer, as local attention sees it.

    Attributes:
        queries: Queries of the new tokens, `[B, H, T, K]`.
        sink_queries: Queries for sinks and extra keys where these differ (bounded positions), or `None`.
        view: What the queries may read.
        plan: The call, for its masks and padding.
        window: Tokens of the layer's window.
        seen: Tokens seen, the new ones included.
    """

    queries: torch.Tensor
    sink_queries: torch.Tensor | None
    view: View
    plan: Plan
    window: int
    seen: int

    @property
    def first(self) -> int:
        """Index of the first new token."""
        return self.seen - self.queries.size(2)
