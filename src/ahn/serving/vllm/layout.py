"""A request's block: which tensors a layer keeps in it, and a cache of `ahn` whose tensors are views of them.

Legend of shapes: B blocks, G key/value heads, K key size, N places of a store.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch

from ahn.attachment import Attachment
from ahn.cache.cache import HippocampalCache
from ahn.cache.layer import HippocampalLayer
from ahn.cache.layout import Layout, Part, layer_layout, scoreboard_layout
from ahn.config import RunSettings
from ahn.tokens import Tokens

_FULL = 2**40
"""Tokens after which every store is full."""
BOARD = "board."
"""How the names of what all layers share begin."""

Views = Mapping[str, torch.Tensor]
"""Tensors of a block, `[1, ...]` each, by name."""


class BlockTensor(NamedTuple):
    """A tensor of a block.

    Attributes:
        name: Its name.
        shape: Its sizes without the axis of blocks.
        dtype: Its type.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def empty_cache(attachment: Attachment, settings: RunSettings) -> HippocampalCache:
    """A cache that holds nothing."""
    cache = HippocampalCache.__new__(HippocampalCache)
    cache.begin(attachment, settings)
    return cache


def memory_layer(cache: HippocampalCache, index: int) -> HippocampalLayer:
    """A layer of a cache in which all layers have a memory."""
    layer = cache.layers[index]
    if not isinstance(layer, HippocampalLayer):
        raise TypeError(f"layer {index} has no memory")
    return layer


def block_tensors(cache: HippocampalCache, index: int) -> list[BlockTensor]:
    """The tensors of a layer's block: the widest numbers first, so that each lies at a multiple of its size.

    Room for what all layers share is in every block, though only that of the first layer is used: then what layers with
    one kind of memory have lies at the same place in the blocks of all of them.

    Args:
        cache: An empty cache.
        index: The layer.
    """
    attachment = cache.attachment
    unrotates = attachment.config.memory_positions == "none"
    layout: Layout = layer_layout(attachment.layers[index], memory_layer(cache, index), unrotates, 1, _FULL)
    if cache.scoreboard is not None:
        board = scoreboard_layout(cache.scoreboard, cache.settings.sinks, 1, _FULL)
        layout |= {BOARD + name: part for name, part in board.items()}
        layout = {name: _sized(name, part, cache.scoreboard.delay) for name, part in layout.items()}
    own = memory_layer(cache, index).score_state.names
    tensors = [BlockTensor(name, _sizes(part)[1:], part.dtypes[0]) for name, part in layout.items()]
    return sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name in own))


def block_bytes(tensors: list[BlockTensor]) -> int:
    """Bytes of a block, a multiple of 64."""
    return -(-sum(tensor.nbytes for tensor in tensors) // 64) * 64


def _sizes(part: Part) -> tuple[int, ...]:
    return tuple(size.stop - 1 if isinstance(size, range) else size for size in part.shape)


def _sized(name: str, part: Part, delay: int) -> Part:
    """The part of a score's own tensors, whose lengths a saved cache leaves open: a sum, and the last tokens."""
    sizes = {"key_total": 1, "key_recent": delay}
    return part._replace(shape=(*part.shape[:2], sizes[name], *part.shape[3:])) if name in sizes else part


def open_layer(layer: HippocampalLayer, views: Views, seen: int, delay: int) -> None:
    """Lets a layer of a cache read and write a block.

    Args:
        layer: An empty layer.
        views: The block.
        seen: Tokens that it has read.
        delay: Tokens before a score is final.
    """
    evicted = seen > layer.exact.sinks + layer.exact.window
    tensors = {name: view for name, view in views.items() if name in Tokens._fields}
    if evicted:
        tensors |= {name: views[name] for name in ("state", "anchor_keys", "anchor_values") if name in views}
    if seen:
        tensors |= {
            name: views[name][:, :, -min(seen, delay) :] if name == "key_recent" else views[name]
            for name in layer.score_state.names
        }
    layer.set_tensors(tensors, seen)


def close_layer(layer: HippocampalLayer, views: Views) -> None:
    """Writes to a block what a layer of a cache does not write itself: all but its ring."""
    layer.reserve()
    layer.commit()
    for name, tensor in layer.tensors().items():
        if name not in Tokens._fields:
            view = views[name]
            if name == "key_recent":
                view = view[:, :, view.size(2) - tensor.size(2) :]
            if view.data_ptr() != tensor.data_ptr():
                view.copy_(tensor)


def open_board(cache: HippocampalCache, views: Views, seen: int) -> None:
    """Lets a cache read its scoreboard from a block."""
    board = cache.scoreboard
    if board is None or not seen:
        return
    board.stored = {"votes": views[BOARD + "votes"]}
    for window in board.windows:
        if seen > board.sinks + window:
            board.stored |= {name: views[BOARD + name] for name in (f"scores.{window}", f"tokens.{window}")}


def close_board(cache: HippocampalCache, views: Views) -> None:
    """Writes the scoreboard of a cache to a block."""
    if cache.scoreboard is not None:
        for name, tensor in cache.scoreboard.stored.items():
            if tensor.data_ptr() != views[BOARD + name].data_ptr():
                views[BOARD + name].copy_(tensor)
