"""Captures what every attention layer computes while a text is read with full attention.

Legend of shapes: T tokens, D hidden size, H query heads, G key/value heads, K key size, V value size.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import ahn
from ahn.attachment import AttentionLayer, attachment_of
from ahn.attention.recording import MakeReceiver, Receive, hand_over
from ahn.backbone import compat
from ahn.backbone.rotary import Tables
from ahn.backbone.survey import find_backbone
from ahn.quantization import QuantizedLinear

_LEAST = 1e-6
_OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj")


@dataclasses.dataclass(eq=False)
class LayerAttention:
    """What one layer computes for a text.

    Attributes:
        layer: The layer.
        hidden_TD: Its input, `[T, D]`.
        length_T: Norms of the residual stream before it, `[T]`.
        tables: The rotation of its queries and keys; `None` where it has none.
        query_HTK: Queries after rotation, `[H, T, K]`.
        key_GTK: Keys, `[G, T, K]`.
        value_GTV: Values, `[G, T, V]`.
        scaling: Factor on the products of queries and keys.
    """

    layer: AttentionLayer
    hidden_TD: torch.Tensor
    length_T: torch.Tensor
    tables: Tables | None
    query_HTK: torch.Tensor
    key_GTK: torch.Tensor
    value_GTV: torch.Tensor
    scaling: float

    def scores(self, heads: slice, first: int, stop: int | None = None) -> torch.Tensor:
        """Products of consecutive queries with the keys up to them, `[H, stop - first, stop]`; -inf for later keys.

        Args:
            heads: The query heads, H of them.
            first: Index of the first query.
            stop: Index behind the last query; the length of the text if left out.
        """
        groups = self.query_HTK.size(0) // self.key_GTK.size(0)
        index = torch.arange(self.query_HTK.size(0), device=self.query_HTK.device)[heads]
        query_HQK, key_HTK = self.query_HTK[heads, first:stop], self.key_GTK[index // groups, :stop]
        tokens = torch.arange(key_HTK.size(1), device=key_HTK.device)
        apart = tokens[first:, None] - tokens
        seen = apart >= 0
        if self.layer.sliding_window is not None:
            seen &= apart < self.layer.sliding_window
        products = (query_HQK @ key_HTK.mT).float() * self.scaling
        return products.masked_fill(~seen, float("-inf"))

    def unrotated(self, x_HTK: torch.Tensor, places: torch.Tensor | slice = slice(None)) -> torch.Tensor:
        """Queries or keys as they were before their rotation, `[H, T, K]` float32.

        Args:
            x_HTK: Those of some tokens, `[H, T, K]`, or `[G, T, K]` of keys.
            places: Which tokens they are of; all if left out.
        """
        rotation, x_1HTK = self.layer.rotation, x_HTK[None].float()
        if rotation is not None and self.tables is not None:
            cos, sin = self.tables
            x_1HTK = rotation.unrotate(x_1HTK, (cos[:, places], sin[:, places]))
        return x_1HTK[0]

    def moved(self) -> torch.Tensor:
        """Norm of a token's value after the output projection of each query head, `[H, T]`.

        The norm of the value itself where the output projection is not found.
        """
        heads, size = self.query_HTK.size(0), self.value_GTV.size(-1)
        value_HTV = self.value_GTV.repeat_interleave(heads // self.value_GTV.size(0), 0).float()
        for name in _OUTPUTS:
            output = getattr(self.layer.module, name, None)
            if isinstance(output, nn.Linear) and output.in_features == heads * size:
                weight = output.dequantize() if isinstance(output, QuantizedLinear) else output.weight
                parts: torch.Tensor = weight.float().view(-1, heads, size)
                return torch.stack([(value_HTV[head] @ parts[:, head].T).norm(dim=-1) for head in range(heads)])
        lengths: torch.Tensor = value_HTV.norm(dim=-1)
        return lengths


Look = Callable[[LayerAttention], None]


@torch.no_grad()
def watch(model: nn.Module, ids: torch.Tensor, look: Look) -> None:
    """Reads a text with full attention and hands over what each layer computes.

    Args:
        model: A model with a memory attached.
        ids: Token ids, `[T]`.
        look: Receives what each layer computes, in order.
    """
    layers, backbone = attachment_of(model).layers, find_backbone(model)
    names = {module: name for name, module in backbone.named_modules()}
    lengths: dict[int, torch.Tensor] = {}
    handles = []
    for layer in layers:
        around = backbone.get_submodule(names[layer.module].rpartition(".")[0])
        handles.append(around.register_forward_pre_hook(_note_length(layer.index, lengths), with_kwargs=True))
    receivers: dict[nn.Module, MakeReceiver] = {
        layer.module: functools.partial(_receiver, layer, lengths, look) for layer in layers
    }
    try:
        with ahn.mode(model, "full"), hand_over(backbone, receivers):
            backbone(input_ids=ids[None].to(compat.input_device(backbone)), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()


def _note_length(index: int, lengths: dict[int, torch.Tensor]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        lengths[index] = hidden[0].float().norm(dim=-1).clamp(min=_LEAST)

    return hook


def _receiver(
    layer: AttentionLayer,
    lengths: dict[int, torch.Tensor],
    look: Look,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Receive:
    """Joins what is known before a layer and what its attention gets, and hands both over."""
    hidden = args[0] if args else kwargs["hidden_states"]
    tables = kwargs.get("position_embeddings") if layer.rotation is not None else None

    def receive(output: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, more: Any) -> None:
        scaling = query.size(-1) ** -0.5 if more.get("scaling") is None else more["scaling"]
        look(LayerAttention(layer, hidden[0], lengths[layer.index], tables, query[0], key[0], value[0], scaling))

    return receive
