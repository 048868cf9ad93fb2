"""The attention function of a model with a memory, for every call: local softmax plus what the memory reads.

Legend of shapes: B batch, T new tokens, E evicted tokens, D hidden size, H query heads, G key/value heads, K key size,
V value size, N gates per head.
"""

from __future__ import annotations

import sys
from typing import Any, NoReturn

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ahn import ops
from ahn.anchors.base import LayerTokens
from ahn.attachment import find_attachment
from ahn.attention import softmax as in_torch
from ahn.attention import softmax_native as in_c
from ahn.attention import softmax_training as with_gradients
from ahn.attention.call import LayerCall, Softmax
from ahn.attention.masks import CallMask
from ahn.attention.weights import attention_blocks
from ahn.backbone import compat
from ahn.cache.layer import HippocampalLayer
from ahn.cache.record import TokenRecord
from ahn.errors import CacheError, ModelError
from ahn.tokens import Attended, ExtraKV, Padding, Tokens, VisibleKV

IMPLEMENTATION = "ahn"
"""Name under which the attention and the mask function are registered with transformers."""


def attention_function(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    ahn: LayerCall | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention as transformers calls it, `[B, T, H, V]` and no weights.

    Args:
        module: The attention layer.
        query: `[B, H, T, K]`, after norms and rotation.
        key: `[B, G, T, K]`; all keys of the sequence for a layer that kept the base model's attention.
        value: `[B, G, T, V]`; all values, accordingly.
        attention_mask: The mask that holds the call, or the base model's mask in full mode.
        scaling: Factor on the scores; 1 / sqrt(K) if left out.
        dropout: Share of the weights dropped in training.
        ahn: What the layer's hook found; `None` for layers that read as the base model does.
        **kwargs: Everything else that the model passes to its attention function.
    """
    if ahn is None:
        mask = attention_mask.base if isinstance(attention_mask, CallMask) else attention_mask
        base = _base_attention(module)
        output, weights = base(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)
        return output, weights
    if kwargs.get("is_causal") is False or not getattr(module, "is_causal", True):
        raise CacheError('attention in both directions (is_causal=False): read inside ahn.mode(model, "full")')
    softmax = softmax_of(query, scaling, dropout, kwargs)
    if ahn.call.step is not None:
        return _decode(ahn, query, key, value, softmax), None
    store, is_first = ahn.call.open_layer(ahn.layer, ahn.memory)
    view = store.append(Tokens(key, value, ahn.record(key)), ahn.call.padding, ahn.call.selected(store))
    view = _computed(view, ahn, query)
    if is_first:
        score(ahn, store, (query, key, value), view, softmax)
    local = attend_local(ahn, query, view, softmax)
    if ahn.gates is None or not view.evicted.length:
        return local.output, None
    return _added_to_last(local.output, read_memory(ahn, store, query, view, local)), None


def softmax_of(query: torch.Tensor, scaling: float | None, dropout: float, kwargs: dict[str, Any]) -> Softmax:
    """What a layer's softmax does, from the arguments of its attention function."""
    scaling = query.size(-1) ** -0.5 if scaling is None else scaling
    return Softmax(scaling, dropout, kwargs.get("softcap"), kwargs.get("s_aux"))


def attend_local(layer: LayerCall, query: torch.Tensor, view: VisibleKV, softmax: Softmax) -> Attended:
    """Attention of new tokens over sinks, extra keys and window; with its log-sum where the layer's memory reads that.

    Args:
        layer: The layer in this call.
        query: Queries of the new tokens, `[B, H, T, K]`.
        view: What they may read.
        softmax: The layer's softmax.
    """
    dtype = view.local.keys.dtype
    alike = query.dtype == dtype and (view.extra is None or view.extra.keys.dtype == dtype)
    rounded = layer.call.settings.cache_dtype is not None
    if view.ordered or rounded or (alike and not ops.in_autocast(query)):
        return _attend(layer, query, view, softmax)
    # What is held may be of another dtype than the token: one of them came inside autocast, the other did not.
    with ops.full_precision(query):
        extra = None if view.extra is None else view.extra.to(dtype)
        attended = _attend(layer, query.to(dtype), view._replace(extra=extra), softmax)
        return attended._replace(output=attended.output.to(query.dtype))


def _attend(layer: LayerCall, query: torch.Tensor, view: VisibleKV, softmax: Softmax) -> Attended:
    """The same by the first backend that can."""
    local = layer.read(query, view, softmax)
    if layer.call.settings.cache_dtype is not None and not in_c.can_attend_halves(local):
        local = local._replace(view=_computed(view, layer, query))
    for backend in (in_c, with_gradients):
        if backend.can_attend(local):
            attended: Attended = backend.attend(local)
            return attended
    return in_torch.attend(local)


def read_memory(
    layer: LayerCall, store: HippocampalLayer, query: torch.Tensor, view: VisibleKV, local: Attended
) -> torch.Tensor:
    """Updates the state with what left the window; what the memory adds for the last E queries, `[B, E, H, V]`."""
    silent_tokens = query.size(2) - view.evicted.length
    read, last = recall(layer, store, query, view), local.of_last(view.evicted.length)
    with compat.loaded(layer.memory):
        return layer.memory.project_out(read, layer.hidden[:, silent_tokens:], last)


def recall(layer: LayerCall, store: HippocampalLayer, query: torch.Tensor, view: VisibleKV) -> torch.Tensor:
    """Updates the state with what left the window; what the last E queries read, `[B, E, H, V]` float32, raw."""
    evicted, call = view.evicted, layer.call
    if call.settings.cache_dtype is not None:
        evicted = evicted.to(query.dtype)
    silent_tokens = query.size(2) - evicted.length
    query, keys = query[:, :, silent_tokens:], evicted.keys
    shape = layer.memory.shape
    gates, position = TokenRecord.unpack(evicted.record[:, 0], layer.memory.gate_count, shape.query_heads)
    if layer.rotary and position is not None:
        cos, sin = (table[:, silent_tokens:] for table in layer.rotary.tables)
        query = layer.rotary.rotation.unrotate(query, (cos, sin))
        keys = layer.rotary.rotation.unrotate_recorded(keys, position)
    if call.padding is not None:
        first = view.seen - view.window - evicted.length
        gates = _without_padding(gates, first, call.settings.sinks, call.padding)
    values, selected = evicted.values, call.selected(store)
    leaves_out = layer.memory.leaves_anchors_out and position is None
    if leaves_out and selected is not None and view.extra is not None and selected.entering.numel():
        begin, count = view.seen - evicted.length, evicted.length
        places_BE = call.shared("written tokens", selected, lambda: selected.written(begin, count))
        keys, values = _written(view.extra, keys, values, places_BE)
        gates = gates * (places_BE >= 0)[..., None, None].to(gates.device)
    k_BEGK, v_BEGV = keys.transpose(1, 2), values.transpose(1, 2)
    read, store.state = layer.memory.scan(query.transpose(1, 2), k_BEGK, v_BEGV, gates, store.state)
    return read


def _written(
    anchors: ExtraKV, keys: torch.Tensor, values: torch.Tensor, places_BE: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values that are written where anchors are left out, `[B, G, E, K or V]`; see `Selected.written`."""
    index = places_BE.clamp(min=0)[:, None, :, None].to(keys.device)
    pairs = (anchors.keys, keys), (anchors.values, values)
    keys, values = (
        torch.cat((anchor.to(own.dtype), own), dim=2).gather(2, index.expand(*own.shape[:3], own.size(3)))
        for anchor, own in pairs
    )
    return keys, values


def _decode(
    layer: LayerCall, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, softmax: Softmax
) -> torch.Tensor:
    """Attention of the one token of a step, `[B, 1, H, V]`: what leaves the window is in the state already."""
    store, _ = layer.call.open_layer(layer.layer, layer.memory)
    if layer.call.step is not None:
        layer.call.step.hidden[layer.layer.index] = layer.hidden
    view = store.append_key(key, value, layer.call.selected(store))
    score(layer, store, (query, key, value), view, softmax)
    local = attend_local(layer, query, view, softmax)
    if store.state is None:
        return local.output
    return layer.memory.decode_add(local, query.transpose(1, 2), layer.hidden, store.state)


def score(
    layer: LayerCall,
    store: HippocampalLayer,
    projected: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    view: VisibleKV,
    softmax: Softmax,
) -> None:
    """Scores the new tokens where the layer takes part in the choice of anchors.

    Args:
        layer: The layer in this call.
        store: Its part of the cache.
        projected: Queries, keys and values of the new tokens, `[B, H or G, T, K or V]`.
        view: What the queries read.
        softmax: The layer's softmax.
    """
    selection, call = layer.call.selection, layer.call
    if selection is None or layer.layer.index not in selection.scoreboard.layers:
        return
    query = projected[0]
    tokens = LayerTokens(
        selection.seen,
        selection.scoreboard.delay,
        call.padding,
        layer.hidden,
        *projected,
        attention=lambda: attention_blocks(layer.read(query, _computed(view, layer, query), softmax)),
        weights=layer.layer.score_weights(selection.scoreboard.score.name),
        state=store.score_state.stored,
        rotary=layer.rotary,
    )
    selection.add(tokens, later=call.step is not None)


def _computed(view: VisibleKV, layer: LayerCall, query: torch.Tensor) -> VisibleKV:
    """What queries may read, in their dtype, where it is stored in another one."""
    return view if layer.call.settings.cache_dtype is None else view.to(query.dtype)


def _without_padding(gates_BENH: torch.Tensor, first: int, sinks: int, padding: Padding) -> torch.Tensor:
    """Gates with those of padding and of each row's sinks at zero, which leaves the state as it is."""
    if first >= padding.most + sinks:
        return gates_BENH
    evicted = torch.arange(first, first + gates_BENH.size(1), device=gates_BENH.device)
    real = evicted >= padding.counts.to(gates_BENH.device)[:, None] + sinks
    return gates_BENH * real[:, :, None, None]


def _added_to_last(local_BTHV: torch.Tensor, memory_BEHV: torch.Tensor) -> torch.Tensor:
    """The sum of both; the memory has something to say at the last E tokens only."""
    silent_tokens = local_BTHV.size(1) - memory_BEHV.size(1)
    if silent_tokens == 0:
        return local_BTHV + memory_BEHV.to(local_BTHV.dtype)
    summed = local_BTHV[:, silent_tokens:] + memory_BEHV.to(local_BTHV.dtype)
    return torch.cat((local_BTHV[:, :silent_tokens], summed), dim=1)


def _base_attention(module: nn.Module) -> Any:
    """The attention function that the model used before."""
    attachment = find_attachment(module)
    name = attachment.base_implementation if attachment else "eager"
    family = sys.modules[type(module).__module__]
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, getattr(family, "eager_attention_forward", _no_eager_attention))


def _no_eager_attention(module: nn.Module, *args: Any, **kwargs: Any) -> NoReturn:
    raise ModelError(f'{type(module).__name__} has no eager attention; load the model with attn_implementation="sdpa"')
