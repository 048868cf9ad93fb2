"""The asked vote: queries that a model itself has once answered questions with, kept and put to every key.

Legend of shapes: B batch, C kinds of facts, R reaches, G key/value heads, T tokens, K key size, N queries of a layer.
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
        counts: Queries of each kind, C numbers, not all of them 0.
        heads: Key/value heads, G.
        key_size: Size of a key, K.
        long: For each kind whether its facts are long; none are where nothing is said.

    Attributes:
        counts: As given.
        queries: The queries, those of the first kind first, `[N, K]`.
        kinds: Which kind each is of: 1 there, 0 for the others, `[N, C]`.
        offsets: What is added to the product of each with a key of each head, `[N, G]`; `NEVER_ASKED` for all heads but
            the one that it looks at.
        long: For each kind whether its facts are long: 1 or 0, `[C]`.
    """

    queries: torch.Tensor
    kinds: torch.Tensor
    offsets: torch.Tensor
    long: torch.Tensor

    def __init__(self, counts: Sequence[int], heads: int, key_size: int, long: Sequence[bool] | None = None) -> None:
        super().__init__()
        self.counts = tuple(counts)
        self.register_buffer("queries", torch.zeros(sum(counts), key_size))
        self.register_buffer("kinds", torch.eye(len(counts)).repeat_interleave(torch.tensor(counts), 0))
        self.register_buffer("offsets", torch.full((sum(counts), heads), NEVER_ASKED))
        self.register_buffer("long", torch.tensor(long or [False] * len(counts)).float())

    def forward(self, keys_BGTK: torch.Tensor) -> torch.Tensor:
        """Votes by kind, `[B, T, C, R]` float32: for the mean over near neighbours, and for that over more of them.

        They are NaN for kinds that nothing here asks for, and the second for kinds that are not long.

        All queries are put to the keys of all heads, though each looks at one: a few products more, many calls less.

        Args:
            keys_BGTK: Keys as they were before their rotation.
        """
        batch, heads, tokens, size = keys_BGTK.shape
        keys_KX = keys_BGTK.permute(3, 1, 0, 2).reshape(size, -1).float()
        shares_NGX = (self.queries.float() @ keys_KX).view(-1, heads, batch * tokens)
        shares_NGX = shares_NGX + self.offsets.float()[..., None]
        votes = [
            own.amax((0, 1)) if len(own) else own.new_full(own.shape[2:], torch.nan)
            for own in shares_NGX.split(self.counts)
        ]
        near_BTC = torch.stack(votes, dim=-1).view(batch, tokens, -1)
        return torch.stack((near_BTC, near_BTC.masked_fill(self.long == 0, torch.nan)), dim=-1)


NEVER_ASKED = -1e4
"""Offset where a query does not look."""
