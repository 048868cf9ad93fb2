"""The attention function of a model with a memory: local softmax plus what the memory reads, one path for everything.

Legend of shapes: B batch, T new tokens, E evicted tokens, D hidden size, H query heads, G key/value heads, K key size,
V value size, N gates per head.
"""

from __future__ import annotations

import dataclasses
import sys
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ahn.attachment import Site, find_attachment
from ahn.cache.exact import Padding, Tokens, View
from ahn.cache.layer import HippocampalLayer
from ahn.plan import Plan
from ahn.positions import Tables
from ahn.softmax import Softmax, local_attention

IMPLEMENTATION = "ahn"
"""Name under which the attention and the mask function are registered with transformers."""

TRACE: ContextVar[set[int] | None] = ContextVar("ahn_trace", default=None)
"""Where the check after attaching collects the layers that a memory serves."""


@dataclasses.dataclass
class LayerCall:
    """What the attention function of one layer must know beside queries, keys and values.

    Attributes:
        site: The layer.
        plan: The call.
        store: The layer's cascade; a fresh one where no cache is kept.
        kept: Whether the store lives on after the call.
        hidden: Input of the attention layer, `[B, T, D]`.
        gates: The new tokens' gates, `[B, T, N, H]`, or `None` where the memory is silent.
        tables: Rotary tables of the new tokens, or `None`.
        positions: Their positions, `[B or 1, T]`, or `None`.
    """

    site: Site
    plan: Plan
    store: HippocampalLayer
    kept: bool
    hidden: torch.Tensor
    gates: torch.Tensor | None
    tables: Tables | None
    positions: torch.Tensor | None

    @property
    def unrotates(self) -> bool:
        """Whether the memory takes queries and keys as they were before their rotation."""
        return self.site.rotation is not None and self.plan.attachment.config.memory_positions == "none"

    def side(self, key: torch.Tensor) -> torch.Tensor:
        """What is kept of each new token for the day it leaves, `[B, 1, T, F]`."""
        if self.gates is None:
            return key.new_zeros(key.size(0), 1, key.size(2), 0, dtype=torch.float32)
        side = self.gates.flatten(2)
        if self.unrotates:
            rotation, tables, positions = self._rotary()
            side = torch.cat((side, rotation.record(tables, positions, key.size(0)).to(side.dtype)), dim=-1)
        return side[:, None]

    def sink_queries(self, query: torch.Tensor, seen: int) -> torch.Tensor | None:
        """Queries that see the sinks within the trained context, or `None` while that is where they are anyway."""
        bounded = self.plan.settings.sink_positions == "bounded" and self.site.rotation is not None
        if not bounded or seen <= self.plan.attachment.trained_context or self.store.exact.sinks == 0:
            return None
        rotation, tables, positions = self._rotary()
        return rotation.bounded(query, tables, positions)

    def memory_view(self, query: torch.Tensor, evicted: Tokens) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries that read, evicted keys, and evicted gates, as the memory takes them: `[B, E, ...]`."""
        query = query[:, :, query.size(2) - evicted.count :]
        keys, gates = evicted.keys, evicted.side[:, 0]
        assert self.gates is not None, "internal: only a listening memory is read"
        if self.unrotates:
            rotation, tables, _ = self._rotary()
            width = self.gates[0, 0].numel()
            gates, record = gates[..., :width], gates[..., width:]
            cos, sin = (table[:, table.size(1) - evicted.count :] for table in tables)
            query, keys = rotation.undo(query, (cos, sin)), rotation.undo_recorded(keys, record)
        return query.transpose(1, 2), keys.transpose(1, 2), gates.unflatten(-1, self.gates.shape[2:])

    def _rotary(self) -> tuple[Any, Tables, torch.Tensor]:
        assert self.site.rotation is not None, "internal: a rotation was checked when the memory was attached"
        assert self.tables is not None and self.positions is not None, "internal: the attach check saw tables"
        return self.site.rotation, self.tables, self.positions


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
        implementation = _base_attention(module)
        return cast(
            "tuple[torch.Tensor, torch.Tensor | None]",
            implementation(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs),
        )
    if (trace := TRACE.get()) is not None:
        trace.add(ahn.site.index)
    scaling = query.size(-1) ** -0.5 if scaling is None else scaling
    softmax = Softmax(scaling, dropout, kwargs.get("softcap"), kwargs.get("s_aux"))
    store, padding = ahn.store, ahn.plan.padding
    new = Tokens(key, value, ahn.side(key))
    seen = store.exact.seen + new.count
    view = store.append(new, padding) if ahn.kept else store.exact.view(new, padding)
    sink_queries = ahn.sink_queries(query, seen)
    local = local_attention(query, sink_queries, view, ahn.plan, store.exact.window, seen, softmax)
    if ahn.gates is None or not view.evicted.count:
        return local, None
    return _added_to_last(local, _read_memory(ahn, query, view, seen)), None


def _read_memory(ahn: LayerCall, query: torch.Tensor, view: View, seen: int) -> torch.Tensor:
    """Folds what left the window into the state; what the last E queries read from it, `[B, E, H, V]`."""
    memory, store, evicted = ahn.site.memory, ahn.store, view.evicted
    assert memory is not None, "internal: a memory has gates"
    queries, keys, gates = ahn.memory_view(query, evicted)
    if ahn.plan.padding is not None:
        first = seen - store.exact.window - evicted.count
        gates = _without_padding(gates, first, store.exact.sinks, ahn.plan.padding)
    read, state = memory.scan(queries, keys, evicted.values.transpose(1, 2), gates, store.state)
    if ahn.kept:
        store.state = state.detach()
    return memory.read_out(read, ahn.hidden[:, ahn.hidden.size(1) - evicted.count :])


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
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, getattr(family, "eager_attention_forward", None))
