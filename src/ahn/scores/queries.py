"""The asked vote: queries that a model itself has once answered questions with, kept and put to every key.

Legend of shapes: B batch, G key/value heads, T tokens, K key size, M queries of a head.
"""

from __future__ import annotations

import torch
from torch import nn


class AnchorQueries(nn.Module):
    """How much questions would look at a token, from its key: the most that any of the kept queries would.

    A query's offset takes away what it gives everything, so that the score is the log of a share of attention, and
    what queries of its kind give few tokens of other texts, so that all kinds are as rare. Nothing here is trained.

    Args:
        heads: Key/value heads, G.
        count: Queries of each, M; heads that have fewer are filled up with some that never win.
        key_size: Size of a key, K.
    """

    queries: torch.Tensor
    offsets: torch.Tensor

    def __init__(self, heads: int, count: int, key_size: int) -> None:
        super().__init__()
        self.register_buffer("queries", torch.zeros(heads, count, key_size))
        self.register_buffer("offsets", torch.full((heads, count), NEVER_ASKED))

    @property
    def count(self) -> int:
        """Number of queries, of all heads together."""
        return int((self.offsets > NEVER_ASKED / 2).sum())

    def forward(self, keys_BGTK: torch.Tensor) -> torch.Tensor:
        """Votes, `[B, T]` float32.

        Args:
            keys_BGTK: Keys as they were before their rotation.
        """
        queries_GKM = self.queries.float().transpose(1, 2)
        shares_BGTM = keys_BGTK.float() @ queries_GKM + self.offsets.float()[:, None]
        return shares_BGTM.amax((1, 3))


NEVER_ASKED = -1e4
"""Offset of a place without a query."""
