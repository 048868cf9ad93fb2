"""The asked vote: queries that a model itself has once answered questions with, kept and put to every key.

Legend of shapes: B batch, C kinds of facts, G key/value heads, T tokens, K key size, N queries of all heads, M most
queries of a kind in a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class AnchorQueries(nn.Module):
    """How much questions of some kinds would look at a token, from its key: the most that any query of a kind would.

    A query's offset takes away what it gives everything, so that the score is the log of a share of attention, and
    what queries of its kind give few tokens of other texts, so that all kinds are as rare. Nothing here is trained.

    Args:
        counts: Queries of each key/value head, G numbers, for each of C kinds; not all of them 0.
        key_size: Size of a key, K.

    Attributes:
        queries: The queries, those of the first head first, and in each those of the first kind, `[N, K]`.
        offsets: What is added to the product of each with a key, `[C, G, M]`; `NEVER_ASKED` behind the last of a kind
            in a head.
    """

    queries: torch.Tensor
    offsets: torch.Tensor

    def __init__(self, counts: Sequence[Sequence[int]], key_size: int) -> None:
        super().__init__()
        self.counts = tuple(tuple(each) for each in counts)
        most = max(max(each) for each in self.counts)
        self.register_buffer("queries", torch.zeros(sum(map(sum, self.counts)), key_size))
        self.register_buffer("offsets", torch.full((len(self.counts), len(self.counts[0]), most), NEVER_ASKED))

    def forward(self, keys_BGTK: torch.Tensor) -> torch.Tensor:
        """Votes by kind, `[B, T, C]` float32; NaN for kinds that nothing here asks for.

        Args:
            keys_BGTK: Keys as they were before their rotation.
        """
        heads = list(zip(*self.counts))
        votes = keys_BGTK.new_full((len(self.counts), keys_BGTK.size(0), keys_BGTK.size(2)), torch.nan).float()
        for head, queries_NK in enumerate(self.queries.float().split([sum(each) for each in heads])):
            keys_KBT = keys_BGTK[:, head].float().permute(2, 0, 1)
            shares_NBT = (queries_NK @ keys_KBT.flatten(1)).unflatten(1, votes.shape[1:])
            for kind, shares_MBT in enumerate(shares_NBT.split(heads[head])):
                if len(shares_MBT):
                    offsets_M = self.offsets[kind, head, : len(shares_MBT)].float()
                    most_BT = (shares_MBT + offsets_M[:, None, None]).amax(0)
                    votes[kind] = torch.fmax(votes[kind], most_BT)
        return votes.permute(1, 2, 0)


NEVER_ASKED = -1e4
"""Offset of a place without a query."""


def count_asked(offsets_CGM: torch.Tensor) -> list[list[int]]:
    """Queries of each kind in each head, of the offsets that were stored."""
    counts: list[list[int]] = (offsets_CGM > NEVER_ASKED / 2).sum(-1).tolist()
    return counts
