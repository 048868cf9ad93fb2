"""The store of the Compressive Transformer: evicted tokens are pooled into slots, first in first out.

A baseline for the memories: it learns nothing, and its slots are read by the same softmax as sinks and window.
Legend of shapes: B batch, E evicted tokens, G key/value heads, K key size, V value size, N slots, M slots made in a
call, P evicted tokens that are pooled to one slot.

Slot g of a row is made of its evicted tokens P g .. P g + P - 1 and lies at place g mod N. Which tokens those are
follows from their index alone, so that nothing is counted and rows that begin at different tokens are no special case.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

from ahn.cache.store import Store
from ahn.memories import Memory
from ahn.tokens import NEVER, ExtraKV, Padding, Tokens

POOLED = 4
"""Evicted tokens that are pooled to one slot, P. Source: arXiv 2510.07318, its baseline in section 4."""

Pooling = Literal["max", "mean"]
POOLINGS: dict[str, Pooling] = {"ct_max": "max", "ct_mean": "mean"}
"""How the modes of a Compressive Transformer pool."""

STATE_NUMBER_BYTES = 4
"""Bytes of a number in a state, which is float32."""


class _Slots(NamedTuple):
    """Slots `[B, G, M, ...]` and their numbers, `[B or 1, M]`, below 0 where there is none."""

    keys: torch.Tensor
    values: torch.Tensor
    number: torch.Tensor


class PooledStore(Store):
    """The slots of one layer.

    Args:
        slots: Slots that there are, N.
        pooling: Whether keys and values are pooled to their maximum or to their mean.
        sinks: Sinks of each row, which are never evicted.
        window: Tokens of the window: token j leaves it when token j + window comes.
    """

    def __init__(self, slots: int, pooling: Pooling, sinks: int, window: int) -> None:
        super().__init__("slot_keys", "slot_values", "pending_keys", "pending_values")
        self.slots = slots
        self.pooling = pooling
        self.sinks = sinks
        self.window = window

    def append(self, evicted: Tokens, first: int, padding: Padding | None) -> ExtraKV | None:
        """Stores what was evicted; what the queries of the call may read, `None` while there is nothing.

        Args:
            evicted: The tokens that leave the window in this call, oldest first.
            first: Index of the first of them.
            padding: Padding at the left of the rows, or `None` where there is none.
        """
        new_slots = self._pool_evicted(evicted, first, padding)
        view = self._visible(new_slots, first, padding)
        if evicted.length:
            with torch.no_grad():
                self._store(evicted, new_slots, self._count(first + evicted.length, padding))
        return view

    def _visible(self, new_slots: _Slots | None, first: int, padding: Padding | None) -> ExtraKV | None:
        """The stored slots and those of this call, with the queries that read each."""
        slots = [part for part in (self._old(first, padding), new_slots) if part is not None]
        if not slots:
            return None
        keys, values = (torch.cat([part[name] for part in slots], dim=2) for name in (0, 1))
        number = torch.cat([part.number for part in slots], dim=1)
        last = self._begin(padding).to(number.device)[:, None] + number * POOLED + POOLED - 1
        none = number < 0
        visible_from = (last + self.window).masked_fill(none, NEVER)
        return ExtraKV(keys, values, visible_from, (visible_from + POOLED * self.slots).masked_fill(none, NEVER))

    def _count(self, index: int, padding: Padding | None) -> torch.Tensor:
        """Slots that each row has made of the tokens before an index, `[B or 1]`."""
        begin = self._begin(padding)
        return torch.div(index - begin, POOLED, rounding_mode="floor").clamp(min=0)

    def _begin(self, padding: Padding | None) -> torch.Tensor:
        """Index of the first token of each row that is ever evicted, `[B or 1]`."""
        return torch.tensor([self.sinks]) if padding is None else padding.counts + self.sinks

    def _old(self, first: int, padding: Padding | None) -> _Slots | None:
        """The stored slots: at each index the youngest, numbered below 0 where none was made yet."""
        if "slot_keys" not in self.stored:
            return None
        keys, values = self.stored["slot_keys"], self.stored["slot_values"]
        index, count = torch.arange(self.slots), self._count(first, padding).cpu()[:, None]
        number = index + torch.div(count - 1 - index, self.slots, rounding_mode="floor") * self.slots
        return _Slots(keys, values, number.to(keys.device))

    def _pool_evicted(self, evicted: Tokens, first: int, padding: Padding | None) -> _Slots | None:
        """The slots that this call makes of pending and newly evicted tokens; `None` if no row makes one."""
        start, stop = self._count(first, padding), self._count(first + evicted.length, padding)
        most = int((stop - start).max())
        if most == 0:
            return None
        number = start[:, None] + torch.arange(most, device=start.device)
        number = torch.where(number < stop[:, None], number, -1).to(evicted.keys.device)
        begin = self._begin(padding).to(number.device)[:, None]
        token = begin + number * POOLED - first + POOLED - 1  # in the line of pending and new tokens
        keys, values = (
            self._pooled(self._line(name, new), token)
            for name, new in (("keys", evicted.keys), ("values", evicted.values))
        )
        return _Slots(keys, values, number)

    def _line(self, name: str, new: torch.Tensor) -> torch.Tensor:
        """The last tokens that were evicted, perhaps in no slot yet, then the new ones, `[B, G, P - 1 + E, ...]`."""
        pending = self.stored.get(f"pending_{name}")
        return F.pad(new, (0, 0, POOLED - 1, 0)) if pending is None else torch.cat((pending, new), dim=2)

    def _pooled(self, line: torch.Tensor, token_BM: torch.Tensor) -> torch.Tensor:
        """Slots by the index of their first token in a line, `[B, G, M, ...]`."""
        index = token_BM[..., None] + torch.arange(POOLED, device=line.device)
        index = index.clamp(0, line.size(2) - 1).flatten(1)[:, None, :, None]
        tokens = line.gather(2, index.expand(line.size(0), line.size(1), -1, line.size(3)))
        groups: torch.Tensor = tokens.unflatten(2, (-1, POOLED))
        return groups.amax(3) if self.pooling == "max" else groups.mean(3)

    def _store(self, evicted: Tokens, new_slots: _Slots | None, count: torch.Tensor) -> None:
        """Stores new slots (each row has made `count` by now, `[B or 1]`) and tokens that may be in no slot yet."""
        for name, new in (("keys", evicted.keys), ("values", evicted.values)):
            line = self._line(name, new)
            slots = self.stored.setdefault(f"slot_{name}", new.new_zeros(*new.shape[:2], self.slots, new.size(3)))
            if new_slots is not None:
                number = new_slots.number
                stays = (number >= 0) & (number >= count.to(number.device)[:, None] - self.slots)
                index = torch.where(stays, number % self.slots, self.slots)[:, None, :, None]
                fresh = new_slots.keys if name == "keys" else new_slots.values
                with_spare = F.pad(slots, (0, 0, 0, 1)).to(fresh.dtype)  # one slot more, for what does not stay
                with_spare.scatter_(2, index.expand(slots.size(0), slots.size(1), -1, slots.size(3)), fresh)
                self.stored[f"slot_{name}"] = with_spare[:, :, :-1].contiguous()
            self.stored[f"pending_{name}"] = line[:, :, 1 - POOLED :].clone()


def state_slots(memory: Memory, number_bytes: int) -> int:
    """Slots of a layer that fill the bytes of its memory's state, which is float32.

    Args:
        memory: The memory.
        number_bytes: Bytes of a number in keys and values.
    """
    slot_bytes = memory.shape.kv_heads * (memory.shape.key_size + memory.shape.value_size) * number_bytes
    return STATE_NUMBER_BYTES * math.prod(memory.state_shape()) // slot_bytes
