"""Scores that need no weights: by keys, by values, and by the attention that a token gets.

Legend of shapes: B batch, T new tokens, N scored tokens, G key/value heads, K key size, Q queries and J keys of a
block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from ahn.anchors.base import LayerTokens, Score, middle_layers

_MEAN_DELAY = 64
"""Tokens before a key is compared with the mean key, which says little near the beginning of a text."""


class KeyDiff(Score):
    """Difference of a key from the mean key so far: minus their cosine. Source: KeyDiff, arXiv 2504.15364."""

    name = "key_diff"
    pre_rope = True
    state_names = ("key_total", "key_recent")

    def delay(self, window: int) -> int:
        """See `Score.delay`."""
        return min(_MEAN_DELAY, window // 4)

    def default_layers(self, layers: Sequence[int]) -> list[int]:
        """See `Score.default_layers`."""
        return middle_layers(layers)

    def score(self, tokens: LayerTokens) -> torch.Tensor:
        """See `Score.score`. The state is the sum of all unit keys, and those that were not scored yet."""
        unit = functional.normalize(tokens.pre_rope_keys, dim=-1) * (tokens.indices >= 0)[:, None, :, None]
        total, line = unit.cumsum(2), unit
        if tokens.state:
            total = tokens.state["key_total"] + total
            line = torch.cat((tokens.state["key_recent"], unit), dim=2)
        tokens.state["key_total"] = total[:, :, -1:].clone()
        tokens.state["key_recent"] = line[:, :, max(0, line.size(2) - tokens.delay) :].clone()
        early = max(0, tokens.delay - tokens.seen)  # new tokens that make no score final
        mean = (total / (tokens.indices + 1).clamp(min=1)[:, None, :, None])[:, :, early:]
        return -torch.cosine_similarity(line[:, :, : mean.size(2)], mean, dim=-1).mean(1)


class KeyNorm(Score):
    """Minus the length of a key: short keys draw attention. Source: arXiv 2406.11430."""

    name = "key_norm"

    def score(self, tokens: LayerTokens) -> torch.Tensor:
        """See `Score.score`."""
        lengths: torch.Tensor = torch.linalg.vector_norm(tokens.keys.float(), dim=-1)
        return -lengths.mean(1)


class ValueNorm(Score):
    """The length of a value: how much a token can change what a query reads. Source: VATP, arXiv 2406.12335."""

    name = "value_norm"

    def score(self, tokens: LayerTokens) -> torch.Tensor:
        """See `Score.score`."""
        lengths: torch.Tensor = torch.linalg.vector_norm(tokens.values.float(), dim=-1)
        return lengths.mean(1)


class WindowAttention(Score):
    """Mean attention that a token gets from the half window of tokens after it.

    Every token is judged by equally many queries, at the same distances. Source: SnapKV (arXiv 2404.14469), which asks
    the last queries of a prompt, and TOVA (arXiv 2401.06104), which asks the last query of all.
    """

    name = "window_attention"
    accumulates = True

    def delay(self, window: int) -> int:
        """See `Score.delay`."""
        return window // 2

    def default_layers(self, layers: Sequence[int]) -> list[int]:
        """See `Score.default_layers`."""
        return middle_layers(layers)

    def score(self, tokens: LayerTokens) -> torch.Tensor:
        """See `Score.score`. What the queries of a call give is a part of the mean of each token before them."""
        rows, new = tokens.keys.size(0), tokens.keys.size(2)
        parts_BN = tokens.keys.new_zeros(rows, tokens.seen + new - tokens.first, dtype=torch.float32)
        for block in tokens.attention():
            queries, keys = block.weights_BHQJ.shape[2:]
            counted_BQJ = self._counted(tokens, block.query, block.key, queries, keys)
            given_BJ = (block.weights_BHQJ.mean(1) * counted_BQJ).sum(1) / tokens.delay
            skipped = max(0, tokens.first - block.key)  # tokens whose mean is complete
            start = block.key + skipped - tokens.first
            parts_BN[:, start : start + keys - skipped] += given_BJ[:, skipped:]
        return parts_BN

    def _counted(self, tokens: LayerTokens, query: int, key: int, queries: int, keys: int) -> torch.Tensor:
        """Which queries count for which tokens, `[B or 1, Q, J]`."""
        query_Q = torch.arange(query, query + queries, device=tokens.keys.device)
        distance_QJ = query_Q[:, None] - torch.arange(key, key + keys, device=query_Q.device)
        is_real_BQ = tokens.indices[:, query - tokens.seen :][:, :queries] >= 0
        return ((distance_QJ > 0) & (distance_QJ <= tokens.delay)) & is_real_BQ[..., None]


class Recent(Score):
    """The later the better, which enlarges the window: a measure for the others."""

    name = "recent"

    def score(self, tokens: LayerTokens) -> torch.Tensor:
        """See `Score.score`."""
        return tokens.indices.float()
