"""Scores for anchors that are no use but for comparison: chance, and the best that a choice can do."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ahn.anchors.base import LayerTokens, Score


class Random(Score):
    """A number between 0 and 1 that depends on the index of the token alone."""

    name = "random"

    def score(self, tokens: LayerTokens) -> torch.Tensor:
        """See `Score.score`."""
        hashed: torch.Tensor = tokens.indices * 2654435761 % 2**32
        return hashed.float() / 2**32


class Oracle(Score):
    """Keeps the tokens that it was told: the bound of what a choice can bring.

    Args:
        indices: Their indices from each row's first real token.
    """

    name = "oracle"

    def __init__(self, indices: Iterable[int]) -> None:
        self._indices = torch.tensor(sorted(set(indices)), dtype=torch.long)

    def score(self, tokens: LayerTokens) -> torch.Tensor:
        """See `Score.score`."""
        return torch.isin(tokens.indices, self._indices.to(tokens.indices.device)).float()


CONTROLS: dict[str, Score] = {score.name: score for score in (Random(),)}
"""Controls by name, for arms such as `ahn+64:random`."""
