"""The asked vote: queries that a model itself has once answered questions with, kept and put to every key.

Legend of shapes: B batch, G key/value heads, T tokens, K key size, N queries of all heads, M most queries of a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class AnchorQueries(nn.Module):
    """How much questions would look at a token, from its key: the most that any of the kept queries would.

    A query's offset takes away what it gives everything, so that the score is the log of a share of attention, and
    what queries of its kind give few tokens of other texts, so that all kinds are as rare. Nothing here is trained.

    Args:
        counts: Queries of each key/value head, G numbers, not all of them 0.
        key_size: Size of a key, K.

    Attributes:
        queries: The queries, those of the first head first, `[N, K]`.
        offsets: What is added to the product of each with a key, `[G, M]`; `NEVER_ASKED` behind the last of a head.
    """

    queries: torch.Tensor
    offsets: torch.Tensor

    def __init__(self, counts: Sequence[int], key_size: int) -> None:
        super().__init__()
        self.counts = tuple(counts)
        self.register_buffer("queries", torch.zeros(sum(counts), key_size))
        self.register_buffer("offsets", torch.full((len(counts), max(counts)), NEVER_ASKED))

    def forward(self, keys_BGTK: torch.Tensor) -> torch.Tensor:
        """Votes, `[B, T]` float32.

        Args:
            keys_BGTK: Keys as they were before their rotation.
        """
        votes = []
        for head, queries_NK in enumerate(self.queries.float().split(self.counts)):
            if len(queries_NK):
                shares_BTN = keys_BGTK[:, head].float() @ queries_NK.T + self.offsets[head, : len(queries_NK)].float()
                votes.append(shares_BTN.amax(-1))
        return torch.stack(votes).amax(0)


NEVER_ASKED = -1e4
"""Offset of a place without a query."""


def count_asked(offsets_GM: torch.Tensor) -> list[int]:
    """Queries of each head, of the offsets that were stored."""
    counts: list[int] = (offsets_GM > NEVER_ASKED / 2).sum(-1).tolist()
    return counts
