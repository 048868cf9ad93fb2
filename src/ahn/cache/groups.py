"""Layers that decode together: layers of one kind, whose states lie in one tensor.

Legend of shapes: L layers, B batch, D hidden size, N gates per head, H query heads, G key/value heads, K key size,
V value size, F numbers per record.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from ahn import native
from ahn.anchors.selection import Selected
from ahn.attachment import AttentionLayer
from ahn.cache.layer import HippocampalLayer
from ahn.cache.record import TokenRecord
from ahn.memories import Memory
from ahn.native.slots import Rings
from ahn.tokens import Padding, Tokens


class SlotContents(NamedTuple):
    """What one slot holds in every layer of a group.

    Attributes:
        keys_LBGK: Keys.
        values_LBGV: Values.
        record_LB1F: Records.
    """

    keys_LBGK: torch.Tensor
    values_LBGV: torch.Tensor
    record_LB1F: torch.Tensor

    def of_layer(self, number: int) -> Tokens:
        """The token of one layer, by its number in the group."""
        return Tokens(*(part[number].unsqueeze(2) for part in self))


@dataclasses.dataclass(eq=False)
class LayerGroup:
    """Layers of one shape, kind of memory, window and device.

    Attributes:
        layers: The layers.
        stores: Their parts of the cache.
        states: The states of all of them, `[L, B, *state_shape()]`. Each layer of the cache holds its part.
        leaving: What the slot of the token that is read now held; `None` where no token leaves.
        memories: Their memories, which other libraries may wrap at any time, as `is_plain` found them last.
    """

    layers: list[AttentionLayer]
    stores: list[HippocampalLayer]
    states: torch.Tensor | None = None
    leaving: SlotContents | None = None
    memories: list[Memory] = dataclasses.field(default_factory=list)
    _rings: tuple[Rings, Rings, Rings] | None = None

    @property
    def indices(self) -> list[int]:
        """Their layer indices."""
        return [layer.index for layer in self.layers]

    def begin(self, sinks: int) -> None:
        """Makes room for the next token in every layer, and copies the one that leaves."""
        slots = [store.exact.next_slot() for store in self.stores]
        self.leaving = self._contents(slots[0]) if self.leaves(sinks) else None

    @property
    def window(self) -> int:
        """Tokens of their window."""
        return self.stores[0].exact.window

    def update(self, padding: Padding | None = None, selected: Selected | None = None) -> None:
        """Updates the states with the token that leaves. The former ones stay as they are, should the call fail.

        Args:
            padding: Padding at the left of the rows, which leaves the states as they are, or `None`.
            selected: Whether the token becomes an anchor; `None` where there are none.
        """
        if self.leaving is None:
            return
        k_LBGK, v_LBGV, record_LB1F = self.leaving
        memory = self.memories[0]
        gates_LB1NH = TokenRecord.unpack(record_LB1F, memory.gate_count, memory.shape.query_heads).gates
        gates_LBNH = gates_LB1NH.squeeze(2)
        exact = self.stores[0].exact
        if padding is not None and (token := exact.seen - exact.window) < padding.most + exact.sinks:
            real_B = token >= padding.counts.to(gates_LBNH.device) + exact.sinks
            gates_LBNH = gates_LBNH * real_B[:, None, None]
        if selected is not None and memory.leaves_anchors_out and selected.entering.numel():
            k_LBGK, v_LBGV, is_written_B = self._displaced(self.leaving, selected)
            gates_LBNH = gates_LBNH * is_written_B[:, None, None]
        former = self._joined()
        states = torch.empty_like(former)
        type(memory).update(self.memories, k_LBGK, v_LBGV, gates_LBNH, states, former_LB=former)
        self.states = states
        for store, state in zip(self.stores, states):
            store.state = state

    def _displaced(self, leaving: SlotContents, selected: Selected) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys and values that are written in place of a token that becomes an anchor, and in which rows any are."""
        banks = [store.bank.stored for store in self.stores if store.bank is not None]

        def find(name: str, rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
            return torch.stack([bank[name][rows, :, places] for bank in banks])

        return displaced(selected, self.stores[0].exact.seen, leaving[:2], find)

    def write_gates(self, hidden: dict[int, torch.Tensor]) -> None:
        """Stores the gates of the new token, from what each attention layer read, `[B, 1, D]` by layer index."""
        x_LBD = torch.stack([hidden[layer.index] for layer in self.layers]).squeeze(2)
        gates_LBNH = type(self.memories[0]).gates_of_layers(self.memories, x_LBD)
        record_LBF = TokenRecord(gates_LBNH, None).pack()
        if (rings := self._find_rings()) is not None and native.ready(record_LBF):
            rings[2].put(self.stores[0].exact.last_slot(), record_LBF[:, :, None])
            return
        for store, record_BF in zip(self.stores, record_LBF):
            store.exact.write_record(record_BF)

    def _contents(self, slot: int) -> SlotContents:
        """What a slot holds in every layer."""
        if (rings := self._find_rings()) is not None:
            return SlotContents(*(each.take(slot) for each in rings))
        tokens = [store.exact.leaving() for store in self.stores]
        return SlotContents(*(torch.stack(tensors).squeeze(3) for tensors in zip(*tokens)))

    def _find_rings(self) -> tuple[Rings, Rings, Rings] | None:
        """Keys, values and records of all layers as the kernels take them, or `None` where they cannot."""
        buffers = [store.exact.buffer for store in self.stores]
        parts = [[buffer[index] for buffer in buffers if buffer is not None] for index in range(3)]
        if self._rings is None or not all(rings.are(part) for rings, part in zip(self._rings, parts)):
            able = all(map(Rings.can_hold, parts))
            self._rings = (Rings(parts[0]), Rings(parts[1]), Rings(parts[2])) if able else None
        return self._rings if native.ready() else None

    def leaves(self, sinks: int) -> bool:
        """Whether a token leaves the window when the next one comes."""
        return self.stores[0].exact.seen - self.stores[0].exact.window >= sinks

    def is_plain(self) -> bool:
        """Whether the memories can be used without calling their parts."""
        self.memories = [memory for layer in self.layers if (memory := layer.memory) is not None]
        return all(memory.is_plain() for memory in self.memories)

    def has_states(self) -> bool:
        """Whether every layer has a state."""
        return all(store.state is not None for store in self.stores)

    def _joined(self) -> torch.Tensor:
        """The states in one tensor: where they lie together, or a copy of them from wherever each of them lies."""
        states = [store.state for store in self.stores if store.state is not None]
        if self.states is None or not all(map(_is_same, self.states, states)):
            return torch.stack(states)
        return self.states


def displaced(
    selected: Selected,
    index: int,
    leaving_LBGK: tuple[torch.Tensor, torch.Tensor],
    find: Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a step of one token writes into the states of several layers that leave anchors out.

    Args:
        selected: Which rows make an anchor of the token that leaves.
        index: Index of the token that is read.
        leaving_LBGK: Keys and values of the one that leaves.
        find: Gives "anchor_keys" or "anchor_values" in some rows at a place each, `[L, rows, G, K]`.

    Returns:
        Keys and values, `[L, B, G, K]` each, and in which rows they are written, `[B]`.
    """
    places_B = selected.written(index, 1)[:, 0].to(leaving_LBGK[0].device).expand(leaving_LBGK[0].size(1))
    rows = ((places_B >= 0) & (places_B < selected.held)).nonzero().flatten()
    keys, values = leaving_LBGK
    if rows.numel():
        keys, values = keys.clone(), values.clone()
        keys[:, rows] = find("anchor_keys", rows, places_B[rows])
        values[:, rows] = find("anchor_values", rows, places_B[rows])
    return keys, values, places_B >= 0


def group_layers(layers: Iterable[AttentionLayer], stores: Iterable[object]) -> list[LayerGroup]:
    """Those layers of a cache that decode together.

    Args:
        layers: The attention layers of the model.
        stores: Their parts of the cache.
    """
    groups: dict[tuple[object, ...], LayerGroup] = {}
    for layer, store in zip(layers, stores, strict=True):
        if layer.memory is not None and isinstance(store, HippocampalLayer):
            weight = layer.memory.o_proj
            kind = type(layer.memory), layer.shape, store.exact.window, weight.dtype, weight.device
            group = groups.setdefault(kind, LayerGroup([], []))
            group.layers.append(layer)
            group.stores.append(store)
    return list(groups.values())


def _is_same(mine: torch.Tensor, other: torch.Tensor) -> bool:
    return mine.data_ptr() == other.data_ptr() and mine.shape == other.shape
