"""Rows of one cache that decode together although they have read texts of different length.

A cache counts tokens for all of its rows at once. A row that has read fewer is held as if padding stood before its
text, and where a token lies follows from that: its slot in the ring, its place on the scoreboard, its index as an
anchor. So a row that joins is copied with its ring turned, and turned back when it leaves. Nothing is computed anew.

The count starts so high that no text is longer; nothing has that size, because padding is only counted.

Legend of shapes: B rows, G key/value heads, S sinks, W window, K key size.
"""

from __future__ import annotations

import torch
from torch import nn

from ahn.attachment import Attachment, attachment_of
from ahn.cache.cache import HippocampalCache
from ahn.cache.layer import HippocampalLayer
from ahn.errors import CacheError
from ahn.tokens import Padding, Tokens

_START = 2**40
"""Tokens that the rows together are said to have read before the first joins, padding for the most part."""

Row = dict[str, torch.Tensor]


class SlotCache:
    """A fixed number of slots for caches of one row each, which join and leave between calls.

    Rings of keys and values lie in tensors that are made once. Rows that are in use come first in them, so that a call
    with `cache` reads exactly those. Such a call must name the tokens' positions, see `positions`.

    Args:
        like: A cache whose settings the rows share.
        slots: Number of slots.

    Attributes:
        cache: The rows in use, as one cache.
        slots: Number of slots.
        lengths: Tokens that each row in use has read.

    Raises:
        CacheError: The model's caches cannot share a batch, see `can_share`.
    """

    def __init__(self, like: HippocampalCache, slots: int) -> None:
        if not can_share(like.attachment):
            raise CacheError("caches of this model cannot share a batch; decode them one by one")
        self.slots = slots
        self.cache = _empty_like(like)
        self._rings: list[Tokens] = []
        self._counts = torch.zeros(0, dtype=torch.int64)

    @property
    def used(self) -> int:
        """Number of rows in use."""
        return self._counts.numel()

    @property
    def lengths(self) -> list[int]:
        """See the class."""
        return [] if self.used == 0 else (self.cache.seen_tokens - self._counts).tolist()

    def positions(self, device: torch.device) -> torch.Tensor:
        """Positions of the next token of each row, `[B, 1]`."""
        return (self.cache.seen_tokens - self._counts)[:, None].to(device)

    def join(self, cache: HippocampalCache) -> int:
        """Takes in a cache of one row, which stays as it is; returns the row's number.

        Raises:
            CacheError: There is no slot, or the cache has another number of rows than one, padding, other settings, or
                fewer tokens than there are sinks.
        """
        self.cache.settle()
        cache.settle()
        self._check(cache)
        number, seen = self.used, self.cache.seen_tokens if self.used else _START
        padding = seen - cache.seen_tokens
        if not self._rings:
            self._rings = [_ring_like(layer, self.slots) for layer in _layers(cache)]
        for index, (mine, other) in enumerate(zip(_layers(self.cache), _layers(cache), strict=True)):
            _copy_ring(self._rings[index].map(lambda tensor: tensor[number : number + 1]), other, padding)
            row = _aligned(other, cache)
            stores = {name: torch.cat((mine.tensors()[name], row[name])) if number else row[name] for name in row}
            self._put(index, number + 1, stores, seen)
        if self.cache.scoreboard is not None:
            board = _turned_board(cache, padding)
            tensors = self.cache.scoreboard.stored
            self.cache.scoreboard.stored = {n: torch.cat((tensors[n], board[n])) if number else board[n] for n in board}
        self._count(torch.cat((self._counts, torch.tensor([padding]))))
        return number

    def leave(self, row: int, keep: bool = True) -> HippocampalCache | None:
        """Frees a row; the last one moves to its place.

        Args:
            row: Its number.
            keep: Whether its cache is wanted.

        Returns:
            The cache of the row, as if it had read its text alone.
        """
        self.cache.settle()
        left = self.copy(row) if keep else None
        last = self.used - 1
        order = [last if number == row else number for number in range(last)]
        for index, layer in enumerate(_layers(self.cache)):
            if row != last:
                for tensor in self._rings[index]:
                    tensor[row].copy_(tensor[last])
            stores = {name: tensor[order] for name, tensor in layer.tensors().items() if name not in Tokens._fields}
            self._put(index, last, stores, layer.exact.seen)
        if self.cache.scoreboard is not None:
            self.cache.scoreboard.stored = {n: tensor[order] for n, tensor in self.cache.scoreboard.stored.items()}
        self._count(self._counts[order])
        return left

    def copy(self, row: int) -> HippocampalCache:
        """The cache of a row, as if it had read its text alone; the row stays."""
        self.cache.settle()
        padding = int(self._counts[row])
        seen = self.cache.seen_tokens - padding
        single = _empty_like(self.cache)
        for mine, other in zip(_layers(self.cache), _layers(single), strict=True):
            sinks, window = mine.exact.sinks, mine.exact.window
            tensors = {name: tensor[row : row + 1].clone() for name, tensor in mine.tensors().items()}
            for name in Tokens._fields:
                tensors[name][:, :, sinks:] = tensors[name][:, :, sinks:].roll(-(padding % window), dims=2)
            if seen <= sinks + window:
                tensors = {n: t for n, t in tensors.items() if n in Tokens._fields or n in mine.score_state.names}
            if "key_recent" in tensors:
                tensors["key_recent"] = tensors["key_recent"][:, :, -seen:]
            other.set_tensors(tensors, seen)
        if self.cache.scoreboard is not None and single.scoreboard is not None:
            single.scoreboard.stored = _alone(self.cache, row, padding, seen)
        return single

    def _put(self, index: int, rows: int, stores: Row, seen: int) -> None:
        """Lets a layer of the cache hold this number of rows."""
        ring = self._rings[index].map(lambda tensor: tensor[:rows])
        layer = _layers(self.cache)[index]
        layer.set_tensors({**ring._asdict(), **stores}, seen)

    def _count(self, counts: torch.Tensor) -> None:
        self._counts = counts
        self.cache.padding = Padding(counts, int(counts.max())) if counts.numel() else None
        if not counts.numel():
            self.cache.reset()

    def _check(self, cache: HippocampalCache) -> None:
        if self.used == self.slots:
            raise CacheError(f"all {self.slots} slots are in use; wait until one is free")
        if cache.rows != 1 or cache.padding is not None:
            raise CacheError(f"a slot holds the cache of one row without padding, not of {cache.rows}")
        if cache.attachment is not self.cache.attachment or cache.settings != self.cache.settings:
            raise CacheError("the caches that share slots must be of one model and have the same settings")
        if cache.seen_tokens < max(1, cache.settings.sinks):
            raise CacheError(f"a cache joins once it has read its {cache.settings.sinks} sinks")


def can_share(attachment: Attachment) -> bool:
    """Whether rows of different length can decode together.

    Layers that keep the base model's own cache, positions from a table, and rotations that change with the length are
    counted for all rows at once.
    """
    layers = attachment.layers
    changes = any(layer.rotation is not None and layer.rotation.changes_with_length for layer in layers)
    return attachment.position_limit is None and not changes and all(layer.memory is not None for layer in layers)


def can_share_slots(model: nn.Module) -> bool:
    """The same for a model with a memory attached."""
    return can_share(attachment_of(model))


def _layers(cache: HippocampalCache) -> list[HippocampalLayer]:
    return [layer for layer in cache.layers if isinstance(layer, HippocampalLayer)]


def _empty_like(cache: HippocampalCache) -> HippocampalCache:
    twin = HippocampalCache.__new__(HippocampalCache)
    twin.begin(cache.attachment, cache.settings, cache.scoreboard.score if cache.scoreboard else None)
    return twin


def _ring_like(layer: HippocampalLayer, rows: int) -> Tokens:
    """An empty ring of full size for this number of rows."""
    room = layer.exact.sinks + layer.exact.window

    def make(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.new_zeros(rows, tensor.size(1), room, tensor.size(3))

    return _exact_tokens(layer).map(make)


def _exact_tokens(layer: HippocampalLayer) -> Tokens:
    if layer.exact.buffer is None:
        raise CacheError("a cache joins once it has read something")
    return layer.exact.buffer


def _copy_ring(slot: Tokens, layer: HippocampalLayer, padding: int) -> None:
    """Copies a ring into a slot as if its text began `padding` tokens later."""
    tensors, sinks, window = _exact_tokens(layer), layer.exact.sinks, layer.exact.window
    count = min(layer.exact.seen, sinks + window) - sinks
    turn = padding % window
    before_end = min(count, window - turn)
    for mine, theirs in zip(slot, tensors, strict=True):
        if count < window:
            mine.zero_()
        mine[:, :, :sinks] = theirs[:, :, :sinks]
        mine[:, :, sinks + turn : sinks + turn + before_end] = theirs[:, :, sinks : sinks + before_end]
        mine[:, :, sinks : sinks + count - before_end] = theirs[:, :, sinks + before_end : sinks + count]


def _aligned(layer: HippocampalLayer, cache: HippocampalCache) -> Row:
    """What a layer keeps behind its window, with zeros where nothing has left it yet."""
    row = {name: tensor for name, tensor in layer.tensors().items() if name not in Tokens._fields}
    keys, values, _ = _exact_tokens(layer)
    if layer.settings.mode == "ahn" and layer.state is None:
        attention_layer = cache.attachment.layers[_layers(cache).index(layer)]
        if attention_layer.memory is not None:
            row["state"] = attention_layer.memory.empty_state(1, keys.device)
    if layer.bank is not None:
        for name, like in (("anchor_keys", keys), ("anchor_values", values)):
            row.setdefault(name, like.new_zeros(*like.shape[:2], layer.bank.anchors, like.size(3)))
    if "key_recent" in row and cache.scoreboard is not None:
        recent = row["key_recent"]
        missing = cache.scoreboard.delay - recent.size(2)
        row["key_recent"] = torch.cat((recent.new_zeros(*recent.shape[:2], missing, recent.size(3)), recent), dim=2)
    return row


def _turned_board(cache: HippocampalCache, padding: int) -> Row:
    """The scoreboard of a cache of one row as if its text began `padding` tokens later."""
    board = cache.scoreboard
    if board is None:
        return {}
    score_board = board.stored["votes"]
    turned = {"votes": score_board.roll(padding % board.length, dims=1)}
    for window in board.windows:
        scores, tokens = f"scores.{window}", f"tokens.{window}"
        nothing = score_board.new_full((1, board.anchors), float("-inf"))
        turned[scores] = board.stored.get(scores, nothing)
        turned[tokens] = _moved(board.stored.get(tokens, torch.full_like(nothing, -1, dtype=torch.int64)), padding)
    return turned


def _alone(cache: HippocampalCache, row: int, padding: int, seen: int) -> Row:
    """The scoreboard of a row as if it had read its text alone."""
    board = cache.scoreboard
    if board is None:
        return {}
    tensors = {name: tensor[row : row + 1].clone() for name, tensor in board.stored.items()}
    tensors["votes"] = tensors["votes"].roll(-(padding % board.length), dims=1)
    for window in board.windows:
        scores, tokens = tensors.pop(f"scores.{window}"), tensors.pop(f"tokens.{window}")
        if seen > board.sinks + window:
            tensors |= {f"scores.{window}": scores, f"tokens.{window}": _moved(tokens, -padding)}
    return tensors


def _moved(tokens: torch.Tensor, distance: int) -> torch.Tensor:
    """Indices of tokens, moved; -1 stays where there is none."""
    return torch.where(tokens >= 0, tokens + distance, tokens)
