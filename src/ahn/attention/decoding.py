"""One decoded token: what all layers do at once instead of one after the other.

Which token leaves the window is known before the next one is read, so the states of all layers are updated with it by one
set of operations at the start of the call; and gates matter only once their token leaves, so those of the new token are
computed for all layers at the end. In between a layer only reads its state. On a CPU a small operation costs more than
its arithmetic, and a token of a small model has thousands of them.

Legend of shapes: L layers, B batch, D hidden size, N gates per head, H query heads, G key/value heads, K key size,
V value size, F numbers of a record.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from ahn import ops
from ahn.anchors.scoring import Scorer, score_tokens
from ahn.anchors.selection import Selection
from ahn.cache import HippocampalCache, HippocampalLayer
from ahn.memories import Memory


@dataclasses.dataclass(eq=False)
class LayerGroup:
    """Layers of one shape, kind of memory, window and device.

    Attributes:
        indices: Their layer indices.
        memories: Their memories.
        stores: Their parts of the cache.
        states: The states of all of them, `[L, B, *state_shape()]`, of which each layer of the cache holds its part.
    """

    indices: list[int]
    memories: list[Memory]
    stores: list[HippocampalLayer]
    states: torch.Tensor | None = None

    def update(self) -> None:
        """Updates the states with the token that leaves."""
        leaving = [store.exact.leaving() for store in self.stores]
        k_LBGK, v_LBGV, record_LB1F = (torch.stack(tensors).squeeze(3) for tensors in zip(*leaving))
        gates_LBNH = record_LB1F.view(*record_LB1F.shape[:2], self.memories[0].gate_count, -1)
        type(self.memories[0]).update(self.memories, k_LBGK, v_LBGV, gates_LBNH, self._gathered())

    def write_gates(self, hidden: dict[int, torch.Tensor]) -> None:
        """Stores the gates of the new token, from what each attention layer read, `[B, 1, D]` by layer index."""
        x_LBD = torch.stack([hidden[index] for index in self.indices]).squeeze(2)
        record_LBF = type(self.memories[0]).gates_of_layers(self.memories, x_LBD).flatten(2)
        for store, record_BF in zip(self.stores, record_LBF):
            store.exact.write_record(record_BF)

    def leaves(self, sinks: int) -> bool:
        """Whether a token leaves the window when the next one comes."""
        return self.stores[0].exact.seen - self.stores[0].exact.window >= sinks

    def _gathered(self) -> torch.Tensor:
        """The states in one tensor: copied there once, and again where something has replaced one of them."""
        held = [store.state for store in self.stores if store.state is not None]
        if self.states is None or not all(map(_is_same, self.states, held)):
            self.states = torch.stack(held)
            for store, state in zip(self.stores, self.states):
                store.state = state
        return self.states


class DecodeStep:
    """The call that reads one token into a cache.

    Args:
        groups: The layers that work together.
        cache: The cache of the call.

    Attributes:
        hidden: What each attention layer has read so far in this call, `[B, 1, D]`, by layer index.
        scorers: What each layer has to vote by, by layer index; none where each votes for itself.
    """

    def __init__(self, groups: list[LayerGroup], cache: HippocampalCache) -> None:
        self.groups = groups
        self.hidden: dict[int, torch.Tensor] = {}
        self.scorers: dict[int, Scorer] = {}
        self._settings, self._padding, self._seen = cache.settings, cache.padding, cache.seen_tokens

    def close(self, selection: Selection | None) -> None:
        """Ends the call, in which every layer has read the token.

        Args:
            selection: The choice of anchors, where there are any.
        """
        for group in self.groups:
            if self._settings.mode == "ahn":
                group.write_gates(self.hidden)
            if selection is not None:
                selection.votes += self._votes(
                    [self.scorers[i] for i in group.indices if i in self.scorers], selection.scoreboard.delay
                )

    def _votes(self, scorers: list[Scorer], delay: int) -> list[torch.Tensor]:
        """Votes of layers of one shape, those with the same rotation at once."""
        alike: dict[int, list[Scorer]] = {}
        for scorer in scorers:
            alike.setdefault(id(scorer.rotary and scorer.rotary.tables[0]), []).append(scorer)
        score = self._settings.anchor_score
        return [vote for each in alike.values() for vote in score_tokens(each, score, self._seen, delay, self._padding)]


def begin_step(cache: HippocampalCache, new: int) -> DecodeStep | None:
    """Starts a call that can be read together; `None` for every other, which the layers read one by one.

    Args:
        cache: The cache of the call.
        new: Its number of new tokens.
    """
    settings = cache.settings
    if new != 1 or settings.mode not in ("ahn", "window") or torch.is_grad_enabled() or not ops.is_automatic():
        return None
    if cache.attachment.config.memory_positions == "none":
        return None
    groups = cache.groups = cache.groups or _groups(cache)
    begun = settings.sinks + (cache.padding.most if cache.padding else 0)
    if not all(_is_here(group) and group.stores[0].exact.seen >= max(1, begun) for group in groups):
        return None
    if settings.mode == "window":
        return DecodeStep(groups, cache)
    leaving = [group for group in groups if group.leaves(settings.sinks)]
    if not all(group.leaves(begun) and _has_states(group) for group in leaving):
        return None
    for group in leaving:
        group.update()
    return DecodeStep(groups, cache)


def _groups(cache: HippocampalCache) -> list[LayerGroup]:
    found: dict[tuple[object, ...], LayerGroup] = {}
    for site, store in zip(cache.attachment.sites, cache.layers, strict=True):
        if site.memory is not None and isinstance(store, HippocampalLayer):
            kind = (
                type(site.memory),
                site.shape,
                store.exact.window,
                site.memory.o_proj.dtype,
                site.memory.o_proj.device,
            )
            group = found.setdefault(kind, LayerGroup([], [], []))
            group.indices.append(site.index)
            group.memories.append(site.memory)
            group.stores.append(store)
    return list(found.values())


def _is_here(group: LayerGroup) -> bool:
    """Whether the weights can be used outside of their layer's forward pass: neither offloaded nor sharded."""
    weight = group.memories[0].o_proj
    return type(weight) is nn.Parameter and not weight.is_meta


def _has_states(group: LayerGroup) -> bool:
    return all(store.state is not None for store in group.stores)


def _is_same(mine: torch.Tensor, other: torch.Tensor) -> bool:
    return mine.data_ptr() == other.data_ptr() and mine.shape == other.shape
