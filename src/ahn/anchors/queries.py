"""The score `asked`: queries that the model itself once answered questions with, kept and put to every key.

Legend of shapes: B batch, C kinds of facts, R scores that the pooling joins, G key/value heads, T tokens, K key size,
N queries of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ahn.anchors.base import LayerTokens, Score
from ahn.anchors.pooling import LONG_POOL, POOL, Pooling
from ahn.errors import ShapeError

NEVER_ASKED = -1e4
"""Offset of a query for the heads that it does not attend to."""


class AnchorQueries(nn.Module):
    """Scores a key by the largest attention that any stored query of each kind would give it.

    Each query has an offset: minus its log normaliser, which makes scores logs of attention shares, and minus a
    threshold of its kind, which makes all kinds equally selective. Nothing here is trained.

    Args:
        counts: Queries of each kind, C numbers, not all of them 0.
        heads: Key/value heads, G.
        key_size: Size of a key, K.
        long: For each kind whether its facts are long; all are short if left out.

    Attributes:
        counts: As given.
        queries: The queries, those of the first kind first, `[N, K]`.
        kinds: The kind of each: 1 there, 0 for the others, `[N, C]`.
        offsets: Added to the product of each with a key of each head, `[N, G]`; `NEVER_ASKED` for all heads but one.
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
        """Scores by kind, `[B, T, C, R]` float32, for short pooling and for long.

        They are NaN for kinds without a query here, and for long pooling of kinds that are not long.

        All queries are put to the keys of all heads, though each attends to one: more products, far fewer calls.

        Args:
            keys_BGTK: Keys as they were before their rotation.
        """
        batch, heads, tokens, size = keys_BGTK.shape
        keys_KX = keys_BGTK.permute(3, 1, 0, 2).reshape(size, -1).float()
        shares_NGX = (self.queries.float() @ keys_KX).view(-1, heads, batch * tokens)
        shares_NGX = shares_NGX + self.offsets.float()[..., None]
        scores = [
            own.amax((0, 1)) if len(own) else own.new_full(own.shape[2:], torch.nan)
            for own in shares_NGX.split(self.counts)
        ]
        short_BTC = torch.stack(scores, dim=-1).view(batch, tokens, -1)
        return torch.stack((short_BTC, short_BTC.masked_fill(self.long == 0, torch.nan)), dim=-1)


class Asked(Score):
    """How much the queries of example questions would attend to a key, by kind of fact: `AnchorQueries`."""

    name = "asked"
    pooling = Pooling((POOL, LONG_POOL), bonus=0.8, spread=(12, 4), slope=0.02)
    pre_rope = True
    weight_names = ("queries", "kinds", "offsets", "long")

    def score(self, tokens: LayerTokens) -> torch.Tensor:
        """See `Score.score`."""
        scores: torch.Tensor = tokens.weights(tokens.pre_rope_keys)
        return scores

    def build(
        self, tensors: Mapping[str, torch.Tensor], *, hidden_size: int, kv_heads: int, key_size: int
    ) -> AnchorQueries:
        """See `Score.build`."""
        kinds = tensors["kinds"].float() if tensors["kinds"].dim() == 2 else torch.zeros(1, 1)
        if not bool(((kinds == 0) | (kinds == 1)).all() and (kinds.sum(1) == 1).all()):
            raise ShapeError("kinds must be [queries, kinds], with one 1 in each row and zeros elsewhere")
        if bool((kinds.nonzero()[:, 1].diff() < 0).any()):
            raise ShapeError("kinds must be in order, the queries of the first kind first")
        return AnchorQueries(kinds.sum(0).long().tolist(), kv_heads, key_size)

    def disagreement(self, weights: Sequence[nn.Module]) -> str | None:
        """See `Score.disagreement`."""
        kinds = {len(own.counts) for own in weights if isinstance(own, AnchorQueries)}
        return "its layers score different kinds of facts" if len(kinds) > 1 else None
