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

from ahn.anchors.scoring import Scorer, score_tokens
from ahn.anchors.selection import Selected
from ahn.attachment import Site, find_attachment
from ahn.attention.call import Plan
from ahn.attention.decoding import DecodeStep
from ahn.attention.lookup import Lookup
from ahn.attention.softmax import Softmax, local_attention
from ahn.backbone.rotary import Rotary
from ahn.cache.layer import HippocampalLayer
from ahn.errors import ModelError
from ahn.memories import Memory
from ahn.tokens import Padding, Tokens, View

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
        store: The layer's part of the cache; a fresh one where no cache is kept.
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

    def record(self, key: torch.Tensor) -> torch.Tensor:
        """What is kept of each new token for the day it leaves, `[B, 1, T, F]`."""
        if self.gates is None:
            return key.new_zeros(key.size(0), 1, key.size(2), 0, dtype=torch.float32)
        record = self.gates.flatten(2)
        if self.rotary and self.rotary.unrotates:
            position = self.rotary.rotation.position_record(self.rotary.tables, self.rotary.positions, key.size(0))
            record = torch.cat((record, position.to(record.dtype)), dim=-1)
        return record[:, None]

    def sink_queries(self, query: torch.Tensor, seen: int) -> torch.Tensor | None:
        """Queries that see the sinks within the trained context, or `None` while that is where they are anyway."""
        near = seen <= self.plan.attachment.trained_context or self.store.exact.sinks == 0
        if near or self.plan.settings.sink_positions != "bounded" or self.rotary is None:
            return None
        rotation, tables, positions, _ = self.rotary
        turn = self.plan.shared("clamped", tables[0], lambda: rotation.clamped(tables, positions))
        return rotation.apply(query, turn)

    def lookup(self, query: torch.Tensor, view: View, seen: int) -> Lookup:
        """What the new tokens look up in this layer, once `seen` tokens have come."""
        return Lookup(query, self.sink_queries(query, seen), view, self.plan, self.store.exact.window, seen)

    def select(self, key: torch.Tensor) -> Selected | None:
        """Hands in the layer's votes on the new tokens; which of those that leave become anchors, if there are any."""
        plan = self.plan
        if plan.selection is None:
            return None
        if self.site.index in plan.selection.scoreboard.layers:
            weights = self.site.score_weights(plan.settings.anchor_score)
            scorer = Scorer(self.store, key, self.hidden, weights, self.rotary)
            if plan.step is not None:
                plan.step.scorers[self.site.index] = scorer
            else:
                score, seen, delay = plan.settings.anchor_score, self.store.exact.seen, plan.selection.scoreboard.delay
                plan.selection.votes += score_tokens([scorer], score, seen, delay, plan.padding)
        selected: Selected | None = plan.selection.selected.get(self.store.exact.window)
        return selected

    def read_memory(self, query: torch.Tensor, view: View, seen: int) -> torch.Tensor:
        """Updates the state with what left the window; what the memory adds for the last E queries, `[B, E, H, V]`."""
        before = query.size(2) - view.evicted.length
        return self.memory.project_out(self.recall(query, view, seen), self.hidden[:, before:])

    def recall(self, query: torch.Tensor, view: View, seen: int) -> torch.Tensor:
        """Updates the state with what left the window; what the last E queries read, `[B, E, H, V]` float32, raw."""
        evicted = view.evicted
        before = query.size(2) - evicted.length
        query, keys, record = query[:, :, before:], evicted.keys, evicted.record[:, 0]
        width = self.memory.gate_count * self.site.shape.query_heads
        if self.rotary and self.rotary.unrotates:
            cos, sin = (table[:, before:] for table in self.rotary.tables)
            query = self.rotary.rotation.unrotate(query, (cos, sin))
            keys = self.rotary.rotation.unrotate_recorded(keys, record[..., width:])
        gates = record[..., :width].unflatten(-1, (self.memory.gate_count, -1))
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
    new = Tokens(key, value, ahn.record(key))
    seen = store.exact.seen + new.length
    selected = ahn.select(key)
    view = store.append(new, padding, selected) if ahn.kept else store.view(new, padding)
    local = local_attention(ahn.lookup(query, view, seen), softmax)
    if ahn.gates is None or not view.evicted.length:
        return local, None
    return _added_to_last(local, ahn.read_memory(query, view, seen)), None


def _decode(
    call: LayerCall, step: DecodeStep, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, softmax: Softmax
) -> torch.Tensor:
    """Attention of the one token of a step, `[B, 1, H, V]`: what leaves the window is in the state already."""
    step.hidden[call.site.index] = call.hidden
    store = call.store
    view = store.append_key(key, value, call.select(key))
    seen = store.exact.seen
    local = local_attention(call.lookup(query, view, seen), softmax)
    if store.state is None:
        return local
    return call.memory.decode_add(local, query.transpose(1, 2), call.hidden, store.state)


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
