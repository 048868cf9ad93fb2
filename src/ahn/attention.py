"""The attention function of a model with a memory: local softmax plus what the memory reads, one path for everything.

Legend of shapes: B batch, T new tokens, E evicted tokens, D hidden size, H query heads, G key/value heads, K key size,
V value size, N gates per head.
"""

from __future__ import annotations

import dataclasses
import sys
from contextvars import ContextVar
from typing import Any, NoReturn

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ahn.attachment import Site, find_attachment
from ahn.cache.anchors import Choice
from ahn.cache.exact import Padding, Tokens, View
from ahn.cache.layer import HippocampalLayer
from ahn.decoding import Step
from ahn.errors import ModelError
from ahn.lookup import Lookup
from ahn.memories import Memory
from ahn.plan import Plan
from ahn.positions import Rotary
from ahn.softmax import Softmax, local_attention
from ahn.voting import Voter, cast_votes

IMPLEMENTATION = "ahn"
"""Name under which the attention and the mask function are registered with transformers."""

TRACE: ContextVar[set[int] | None] = ContextVar("ahn_trace", default=None)
"""Where the check after attaching collects the layers that a memory serves."""


@dataclasses.dataclass
class LayerCall:
    """What the attention function of one layer must know beside queries, keys and values.

    Attributes:
        site: The layer.
        memory: Its memory.
        plan: The call.
        store: The layer's cascade; a fresh one where no cache is kept.
        kept: Whether the store lives on after the call.
        hidden: Input of the attention layer, `[B, T, D]`.
        gates: The new tokens' gates, `[B, T, N, H]`; `None` where the memory is silent or layers decode together.
        rotary: Their rotation, where bounded sinks or the memory must undo it.
    """

    site: Site
    memory: Memory
    plan: Plan
    store: HippocampalLayer
    kept: bool
    hidden: torch.Tensor
    gates: torch.Tensor | None
    rotary: Rotary | None

    def side(self, key: torch.Tensor) -> torch.Tensor:
        """What is kept of each new token for the day it leaves, `[B, 1, T, F]`."""
        if self.gates is None:
            return key.new_zeros(key.size(0), 1, key.size(2), 0, dtype=torch.float32)
        side = self.gates.flatten(2)
        if self.rotary and self.rotary.unrotates:
            record = self.rotary.rotation.record(self.rotary.tables, self.rotary.positions, key.size(0))
            side = torch.cat((side, record.to(side.dtype)), dim=-1)
        return side[:, None]

    def sink_queries(self, query: torch.Tensor, seen: int) -> torch.Tensor | None:
        """Queries that see the sinks within the trained context, or `None` while that is where they are anyway."""
        near = seen <= self.plan.attachment.trained_context or self.store.exact.sinks == 0
        if near or self.plan.settings.sink_positions != "bounded" or self.rotary is None:
            return None
        rotation, tables, positions, _ = self.rotary
        turn = self.plan.shared("bounding", tables[0], lambda: rotation.bounding(tables, positions))
        return rotation.apply(query, turn)

    def lookup(self, query: torch.Tensor, view: View, seen: int) -> Lookup:
        """What the new tokens look up in this layer, once `seen` tokens have come."""
        return Lookup(query, self.sink_queries(query, seen), view, self.plan, self.store.exact.window, seen)

    def elect(self, key: torch.Tensor) -> Choice | None:
        """Hands in the layer's votes on the new tokens; which of those that leave become anchors, if there are any."""
        plan = self.plan
        if plan.election is None:
            return None
        if self.site.index in plan.election.ballot.voters:
            weights = self.site.votes_by(plan.settings.anchor_score)
            voter = Voter(self.store, key, self.hidden, weights, self.rotary)
            if plan.step is not None:
                plan.step.voters[self.site.index] = voter
            else:
                score, seen, delay = plan.settings.anchor_score, self.store.exact.seen, plan.election.ballot.delay
                plan.election.votes += cast_votes([voter], score, seen, delay, plan.padding)
        choice: Choice | None = plan.election.choices.get(self.store.exact.window)
        return choice

    def read_memory(self, query: torch.Tensor, view: View, seen: int) -> torch.Tensor:
        """Folds what left the window into the state; what the memory adds for the last E queries, `[B, E, H, V]`."""
        before = query.size(2) - view.evicted.length
        return self.memory.read_out(self.recall(query, view, seen), self.hidden[:, before:])

    def recall(self, query: torch.Tensor, view: View, seen: int) -> torch.Tensor:
        """Folds what left the window into the state; what the last E queries read, `[B, E, H, V]` float32, raw."""
        evicted = view.evicted
        before = query.size(2) - evicted.length
        query, keys, side = query[:, :, before:], evicted.keys, evicted.side[:, 0]
        width = self.memory.gate_count * self.site.shape.query_heads
        if self.rotary and self.rotary.unrotates:
            cos, sin = (table[:, before:] for table in self.rotary.tables)
            query = self.rotary.rotation.undo(query, (cos, sin))
            keys = self.rotary.rotation.undo_recorded(keys, side[..., width:])
        gates = side[..., :width].unflatten(-1, (self.memory.gate_count, -1))
        if self.plan.padding is not None:
            first = seen - self.store.exact.window - evicted.length
            gates = _without_padding(gates, first, self.store.exact.sinks, self.plan.padding)
        values = evicted.values.transpose(1, 2)
        read, state = self.memory.scan(query.transpose(1, 2), keys.transpose(1, 2), values, gates, self.store.state)
        if self.kept:
            self.store.state = state.detach()
        return read


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
        value: `[B, G, T, V]`, likewise.
        attention_mask: The plan of the call, or the base model's mask in full mode.
        scaling: Factor on the scores; 1 / sqrt(K) if left out.
        dropout: Share of the weights dropped in training.
        ahn: What the layer's hook found; `None` for layers that read as the base model does.
        **kwargs: Everything else that the model passes to its attention function.
    """
    if ahn is None:
        mask = attention_mask.base_mask if isinstance(attention_mask, Plan) else attention_mask
        base = _base_attention(module)
        output, weights = base(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)
        return output, weights
    if (trace := TRACE.get()) is not None:
        trace.add(ahn.site.index)
    scaling = query.size(-1) ** -0.5 if scaling is None else scaling
    softmax = Softmax(scaling, dropout, kwargs.get("softcap"), kwargs.get("s_aux"))
    store, padding = ahn.store, ahn.plan.padding
    if ahn.plan.step is not None:
        return _decode(ahn, ahn.plan.step, query, key, value, softmax), None
    new = Tokens(key, value, ahn.side(key))
    seen = store.exact.seen + new.length
    choice = ahn.elect(key)
    view = store.append(new, padding, choice) if ahn.kept else store.view(new, padding, choice)
    local = local_attention(ahn.lookup(query, view, seen), softmax)
    if ahn.gates is None or not view.evicted.length:
        return local, None
    return _added_to_last(local, ahn.read_memory(query, view, seen)), None


def _decode(
    call: LayerCall, step: Step, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, softmax: Softmax
) -> torch.Tensor:
    """Attention of the one token of a step, `[B, 1, H, V]`: what leaves the window is in the state already."""
    step.hidden[call.site.index] = call.hidden
    store = call.store
    view = store.append_key(key, value, call.elect(key))
    seen = store.exact.seen
    local = local_attention(call.lookup(query, view, seen), softmax)
    if store.state is None:
        return local
    return call.memory.add_answer(local, query.transpose(1, 2), call.hidden, store.state)


def _without_padding(gates_BENH: torch.Tensor, first: int, sinks: int, padding: Padding) -> torch.Tensor:
    """Gates with those of padding and of each row's sinks at zero, which leaves the state as it is."""
    if first >= padding.most + sinks:
        return gates_BENH
    evicted = torch.arange(first, first + gates_BENH.size(1), device=gates_BENH.device)
    real = evicted >= padding.counts.to(gates_BENH.device)[:, None] + sinks
    return gates_BENH * real[:, :, None, None]


def _added_to_last(local_BTHV: torch.Tensor, memory_BEHV: torch.Tensor) -> torch.Tensor:
    """The sum of both; the memory has something to say at the last E tokens only."""
    before = local_BTHV.size(1) - memory_BEHV.size(1)
    if before == 0:
        return local_BTHV + memory_BEHV.to(local_BTHV.dtype)
    summed = local_BTHV[:, before:] + memory_BEHV.to(local_BTHV.dtype)
    return torch.cat((local_BTHV[:, :before], summed), dim=1)


def _base_attention(module: nn.Module) -> Any:
    """The attention function that the model used before."""
    attachment = find_attachment(module)
    name = attachment.base_implementation if attachment else "eager"
    family = sys.modules[type(module).__module__]
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, getattr(family, "eager_attention_forward", _no_eager_attention))


def _no_eager_attention(module: nn.Module, *args: Any, **kwargs: Any) -> NoReturn:
    raise ModelError(f'{type(module).__name__} has no eager attention; load the model with attn_implementation="sdpa"')
