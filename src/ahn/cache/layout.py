"""What a saved cache must hold: names, shapes and numbers that follow from the model, the settings and the tokens seen.

Legend of shapes: B batch, G key/value heads, K key size, V value size, F numbers of a record, L places of a ring,
N anchors, P places of a scoreboard, R scores of a token that its pooling joins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from transformers.cache_utils import DynamicLayer

from ahn.anchors.selection import Scoreboard
from ahn.attachment import Attachment, AttentionLayer
from ahn.cache.compressive import POOLED
from ahn.cache.layer import HippocampalLayer
from ahn.cache.storage import SavedCache
from ahn.errors import CacheError
from ahn.memories import MemoryShape

Size = int | range
Tensors = Mapping[str, torch.Tensor]


class Part(NamedTuple):
    """A tensor that a part of a cache holds.

    Attributes:
        shape: Its sizes; a range where several are right.
        needed: Whether it must be there.
        dtypes: What it may be stored in.
        most: Its numbers lie below it; `None` for numbers that must be finite.
        least: And not below this.
    """

    shape: tuple[Size, ...]
    needed: bool = True
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    least: float | None = None
    most: float | None = None


Layout = dict[str, Part]


def check_saved(
    where: str,
    saved: SavedCache,
    attachment: Attachment,
    layers: Sequence[HippocampalLayer | DynamicLayer],
    scoreboard: Scoreboard | None,
) -> None:
    """Checks that a file holds a cache of this model, down to the shape of every tensor.

    Args:
        where: The file, for messages.
        saved: What it holds.
        attachment: What the model has attached.
        layers: Empty layers of a cache with the saved settings.
        scoreboard: The empty scoreboard of that cache, if it has anchors.

    Raises:
        CacheError: It does not.
    """
    rows, most = saved.rows_of(saved.tensors), max(saved.seen)
    if any(
        seen != most
        for seen, attention_layer in zip(saved.seen, attachment.layers)
        if attention_layer.memory is not None
    ):
        raise CacheError(f"{where}: its layers have seen different numbers of tokens; save the cache again")
    unrotates = attachment.config.memory_positions == "none"
    layouts = {
        str(attention_layer.index): layer_layout(attention_layer, layer, unrotates, rows, seen)
        for attention_layer, layer, seen in zip(attachment.layers, layers, saved.seen, strict=True)
    }
    if scoreboard is not None:
        layouts["ballot"] = scoreboard_layout(scoreboard, saved.settings.sinks, rows, most)
    layout = {f"{part}.{name}": due for part, parts in layouts.items() for name, due in parts.items()}
    layout["padding"] = Part((rows,), False, (torch.int64,), 0, most + 1)
    check_layout(where, saved.tensors, layout)


def layer_layout(
    attention_layer: AttentionLayer, layer: HippocampalLayer | DynamicLayer, unrotates: bool, rows: int, seen: int
) -> Layout:
    """What a layer of a cache holds after `seen` tokens.

    Args:
        attention_layer: The layer of the model.
        layer: An empty layer of the cache.
        unrotates: Whether the memory takes keys as they were before their rotation.
        rows: Rows of the batch.
        seen: Tokens seen.
    """
    _, _, G, K, V = attention_layer.shape
    computed, exact = _computed(attention_layer), _exact(attention_layer)
    if isinstance(layer, HippocampalLayer) and layer.exact.dtype is not None:
        computed = (layer.exact.dtype,)
    if not isinstance(layer, HippocampalLayer):
        most = seen if attention_layer.sliding_window is None else min(seen, attention_layer.sliding_window)
        lengths = range(max(0, most - (attention_layer.sliding_window is not None)), most + 1)
        sizes = {"keys": K, "values": V}
        return {name: Part((rows, G, lengths, size), seen > 0, computed) for name, size in sizes.items()}
    span = layer.exact.sinks + layer.exact.window
    lengths, evicts = range(min(seen, span), span + 1), seen > span
    layout = {
        "keys": Part((rows, G, lengths, K), seen > 0, computed),
        "values": Part((rows, G, lengths, V), seen > 0, computed),
        "record": Part((rows, 1, lengths, _record_size(attention_layer, layer, unrotates)), seen > 0, exact),
    }
    if evicts and layer.settings.mode == "ahn" and attention_layer.memory is not None:
        layout["state"] = Part((rows, *attention_layer.memory.state_shape()), dtypes=exact)
    if evicts and layer.bank is not None:
        layout |= _keys_and_values("anchor", rows, layer.bank.anchors, attention_layer.shape, computed)
    if evicts and layer.pooled is not None:
        layout |= _keys_and_values("slot", rows, layer.pooled.slots, attention_layer.shape, computed)
        layout |= _keys_and_values("pending", rows, POOLED - 1, attention_layer.shape, computed)
    for name in layer.score_state.names:
        layout[name] = Part((rows, G, range(layer.exact.window + 1), K), seen > 0, exact)
    return layout


def scoreboard_layout(scoreboard: Scoreboard, sinks: int, rows: int, seen: int) -> Layout:
    """What the scoreboard of a cache holds after `seen` tokens."""
    shape = rows, scoreboard.length, scoreboard.score.pooling.scores
    layout = {"votes": Part(shape, least=-float("inf"), most=float("inf"))} if seen else {}
    for window in scoreboard.windows:
        if seen > sinks + window:
            anchors = rows, scoreboard.anchors
            layout[f"scores.{window}"] = Part(anchors, least=-float("inf"), most=float("inf"))
            layout[f"tokens.{window}"] = Part(anchors, dtypes=(torch.int64,), least=-1, most=seen)
    return layout


def check_layout(what: str, tensors: Tensors, layout: Layout) -> None:
    """Checks tensors by name.

    Args:
        what: What holds them, for messages.
        tensors: The tensors by name.
        layout: What they must be.

    Raises:
        CacheError: One is missing or surplus, or of another shape or dtype, or holds numbers that cannot be.
    """
    if missing := sorted(name for name, part in layout.items() if part.needed and name not in tensors):
        raise CacheError(f"{what} lacks {missing[0]}; save the cache again")
    for name, tensor in tensors.items():
        if name not in layout:
            raise CacheError(f"{what} holds {name}, which no such cache has; save it again")
        _check_part(f"{what}: {name}", tensor, layout[name])


def _check_part(what: str, tensor: torch.Tensor, part: Part) -> None:
    fits = tensor.dim() == len(part.shape) and all(
        size in due if isinstance(due, range) else size == due for size, due in zip(tensor.shape, part.shape)
    )
    if not fits:
        due = [f"{size.start} to {size.stop - 1}" if isinstance(size, range) else str(size) for size in part.shape]
        raise CacheError(f"{what} has the shape {list(tensor.shape)} instead of [{', '.join(due)}]")
    if tensor.dtype not in part.dtypes:
        raise CacheError(f"{what} is stored in {_name(tensor.dtype)}, but here it must be {_name(part.dtypes[0])}")
    if part.least is None or part.most is None:
        right = tensor.isfinite()
    else:
        right = (tensor >= part.least) & (tensor < part.most)
    if not bool(right.all()):
        raise CacheError(f"{what} holds numbers that cannot be")


def _record_size(attention_layer: AttentionLayer, layer: HippocampalLayer, unrotates: bool) -> Size:
    """Numbers of a record, F: the gates and, for a memory that takes keys before their rotation, the position."""
    if layer.settings.mode != "ahn" or attention_layer.memory is None:
        return 0
    gates = attention_layer.memory.gate_count * attention_layer.shape.query_heads
    if attention_layer.rotation is None or not unrotates:
        return gates
    return (
        range(gates + 2, gates + 2 * attention_layer.shape.key_size + 1)
        if attention_layer.rotation.changes_with_length
        else gates + 1
    )


def _keys_and_values(name: str, rows: int, count: int, shape: MemoryShape, dtypes: tuple[torch.dtype, ...]) -> Layout:
    _, _, G, K, V = shape
    return {
        f"{name}_keys": Part((rows, G, count, K), dtypes=dtypes),
        f"{name}_values": Part((rows, G, count, V), dtypes=dtypes),
    }


def _computed(layer: AttentionLayer) -> tuple[torch.dtype, ...]:
    """What keys and values may be stored in: what the layer computes in, inside autocast or outside."""
    return layer.dtype, torch.float32, torch.bfloat16, torch.float16


def _exact(layer: AttentionLayer) -> tuple[torch.dtype, ...]:
    """What states and records may be stored in."""
    return (torch.float32,) if layer.dtype != torch.float64 else (torch.float32, torch.float64)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
