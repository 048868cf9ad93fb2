"""The contract of a score for anchors: one method that sees everything a layer knows of its new tokens.

Legend of shapes: B batch, T new tokens, N scored tokens, D hidden size, H query heads, G key/value heads, K key size,
V value size, Q queries of a block, J keys of a block, C kinds of facts, R scores that the pooling joins.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from ahn.anchors.pooling import Pooling
from ahn.backbone.rotary import Rotary
from ahn.tokens import Padding


class AttentionBlock(NamedTuple):
    """The attention weights of a few consecutive queries on consecutive tokens of the window.

    Attributes:
        query: Index of the first query.
        key: Index of the first token of the window.
        weights_BHQJ: The weights, `[B, H, Q, J]` float32; sinks and anchors take the rest of each query's weight.
    """

    query: int
    key: int
    weights_BHQJ: torch.Tensor


@dataclasses.dataclass(eq=False)
class LayerTokens:
    """The new tokens of one layer in one call: all that a score may look at.

    Attributes:
        seen: Tokens read before the call.
        delay: Tokens that must follow a token before its score is final, of the score in use.
        padding: Padding at the left of the rows, or `None`.
        hidden: Input of the attention layer, after its norm, `[B, T, D]`.
        queries: After norms and rotation, `[B, H, T, K]`.
        keys: After norms and rotation, `[B, G, T, K]`.
        values: `[B, G, T, V]`.
        attention: Computes the attention weights of the new queries, block by block. It costs about as much as the
            layer's attention itself.
        weights: The layer's weights for the score, a module; `None` for a score that needs none.
        state: Tensors that the score keeps in this layer from call to call, by the names in `Score.state_names`;
            `[B, ...]` each, and empty when a text begins.
        rotary: The rotation of the new tokens, or `None` for a layer without one.
    """

    seen: int
    delay: int
    padding: Padding | None
    hidden: torch.Tensor
    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    attention: Callable[[], Iterable[AttentionBlock]]
    weights: Any = None
    state: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    rotary: Rotary | None = None

    @property
    def first(self) -> int:
        """Index of the first token whose score is not final before this call."""
        return max(0, self.seen - self.delay)

    @functools.cached_property
    def indices(self) -> torch.Tensor:
        """Indices of the new tokens from each row's first real token, `[B or 1, T]` int64; below 0 for padding."""
        index = torch.arange(self.seen, self.seen + self.keys.size(2), device=self.keys.device)
        return index[None] if self.padding is None else index - self.padding.counts.to(index.device)[:, None]

    @functools.cached_property
    def pre_rope_keys(self) -> torch.Tensor:
        """Keys as they were before their rotation, `[B, G, T, K]` float32."""
        keys = self.keys.float()
        return keys if self.rotary is None else self.rotary.rotation.unrotate(keys, self.rotary.tables)


def unrotate_together(layers: Sequence[LayerTokens]) -> None:
    """Undoes the rotation of the keys of several layers by one set of operations where their tables are the same.

    Args:
        layers: The new tokens of each layer.
    """
    alike: dict[tuple[int, torch.Size], tuple[Rotary, list[LayerTokens]]] = {}
    for tokens in layers:
        if tokens.rotary is not None:
            key = id(tokens.rotary.tables[0]), tokens.keys.shape
            alike.setdefault(key, (tokens.rotary, []))[1].append(tokens)
    for (rotation, (cos, sin), *_), group in alike.values():
        keys = torch.cat([tokens.keys for tokens in group]).float()
        if cos.size(0) > 1:
            cos, sin = (table.repeat(len(group), 1, 1) for table in (cos, sin))
        for tokens, own in zip(group, rotation.unrotate(keys, (cos, sin)).chunk(len(group)), strict=True):
            tokens.pre_rope_keys = own


class Score:
    """What a layer scores tokens by; the best of them become anchors when they leave the window.

    A subclass sets `name`, defines `score` and, where it needs more, some of the rest. One object serves all layers and
    texts: what a layer keeps of a text is in `LayerTokens.state`.

    Attributes:
        name: The `anchor_score` that selects it.
        pooling: How the scores of neighbours are joined.
        pre_rope: Whether it needs keys as they were before their rotation, which not all models can give.
        accumulates: Whether what `score` returns is added to what it returned before for the same tokens.
        state_names: Names of the tensors that it keeps in each layer.
        weight_names: Names of its weights in a layer's state dict; none for a score that needs no weights.
    """

    name: str
    pooling: Pooling = Pooling()
    pre_rope: ClassVar[bool] = False
    accumulates: ClassVar[bool] = False
    state_names: ClassVar[tuple[str, ...]] = ()
    weight_names: ClassVar[tuple[str, ...]] = ()

    def score(self, tokens: LayerTokens) -> torch.Tensor:
        """Scores of consecutive tokens from `tokens.first` on, `[B or 1, N]`: the higher, the sooner they are kept.

        A score without delay gives those of the new tokens. With a delay it gives the scores of all tokens that become
        final in this call. If it accumulates, it gives a part for every token that is not final yet. No part may depend
        on where calls begin and end: only on the tokens themselves and the `delay` tokens that follow each.

        Args:
            tokens: The new tokens of a layer.

        Returns:
            Scores, or `[B, N, C, R]`: for each kind of fact, NaN where the layer does not score by it, and for each
            score that the pooling joins. Layers are averaged, then the best kind counts.
        """
        raise NotImplementedError

    def delay(self, window: int) -> int:
        """Tokens that must follow a token before its score is final, fewer than a window less the pooling's margins.

        Args:
            window: Tokens of the shortest window.
        """
        return 0

    def default_layers(self, layers: Sequence[int]) -> list[int]:
        """The layers that score where none are named.

        Args:
            layers: Indices of the layers that could, in order.
        """
        return list(layers)

    def build(
        self, tensors: Mapping[str, torch.Tensor], *, hidden_size: int, kv_heads: int, key_size: int
    ) -> nn.Module:
        """Empty weights of a layer, of the size of stored ones.

        Args:
            tensors: The stored weights, by `weight_names`; their shapes were not checked.
            hidden_size: Hidden size of the layer, D.
            kv_heads: Its key/value heads, G.
            key_size: Size of its keys, K.

        Raises:
            ShapeError: They claim more than they hold, or do not fit this layer.
        """
        raise NotImplementedError

    def disagreement(self, weights: Sequence[nn.Module]) -> str | None:
        """Why weights of several layers cannot score together, or `None` if they can.

        Args:
            weights: Weights of each layer.
        """
        return None

    def span(self, window: int) -> int:
        """Tokens that must follow a token before everything that its pooled score depends on is final.

        Args:
            window: Tokens of the shortest window.
        """
        return self.delay(window) + self.pooling.margins(window)[1]


def middle_layers(layers: Sequence[int]) -> list[int]:
    """The layers at three fifths and two thirds of the depth.

    Keys tell facts from filler in some layers only: of SmolLM2's 30 best in 18 and 20, which keep more facts of every
    kind than all layers together (docs/log.md). For other models these depths are a guess.

    Args:
        layers: Indices of the layers that could score, in order.
    """
    count = len(layers)
    return sorted({layers[3 * count // 5], layers[2 * count // 3]})
