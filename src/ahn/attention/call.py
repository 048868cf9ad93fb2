"""One forward call: its settings and padding, and everything that its layers share.

A call travels through the model as its attention mask, so that it reaches every layer also when activation
checkpointing runs a layer again. Legend of shapes: B batch, T new tokens, D hidden size, N gates per head,
H query heads, K key size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextvars import ContextVar, Token
from typing import Any, Literal, NamedTuple, TypeVar, cast

import torch

from ahn.anchors.selection import Selected, Selection
from ahn.attachment import Attachment, AttentionLayer
from ahn.attention.decoding import DecodeStep
from ahn.backbone.rotary import Rotary, Tables
from ahn.cache.cache import HippocampalCache
from ahn.cache.layer import HippocampalLayer
from ahn.cache.layer_kinds import new_memory_layer
from ahn.cache.record import TokenRecord
from ahn.config import RunSettings
from ahn.errors import CacheError
from ahn.memories import Memory
from ahn.tokens import Padding, VisibleKV

Made = TypeVar("Made")
CacheUse = Literal["given", "returned", "hidden"]

CURRENT: ContextVar[Call | None] = ContextVar("ahn_call", default=None)
"""The call that the model reads now; `None` between calls."""


@dataclasses.dataclass(eq=False)
class Call:
    """One forward call, or one chunk of a long one.

    Attributes:
        attachment: What is attached to the model.
        settings: Mode, window and sinks of the call; a cache brings its own.
        padding: Padding at the left of the rows, or `None`.
        cache: The cache that the layers read and write, or `None`.
        cache_use: Whether the caller gave the cache, gets a new one back, or knows of none.
        selection: The choice of anchors in this call; `None` where there are none.
        step: What all layers do at once, in a call of one token; `None` in others.
        is_chunk: Whether it is a chunk of a long call but the last, which is the call itself.
        chunk_outputs: Outputs of the other chunks of a long call.
        documents: Outputs of the documents of packed rows but the last, which is the call itself.
        returns_tuple: Whether the caller of a long call wants its output as a tuple.
        snapshots: The layers of the cache as they were when the call began.
        served: Indices of the layers that have read it.
        has_gradients: Whether gradients are computed.
        memo: What `shared` has made so far.
        token: What ends the call.
    """

    attachment: Attachment
    settings: RunSettings
    padding: Padding | None
    cache: HippocampalCache | None = None
    cache_use: CacheUse = "given"
    selection: Selection | None = None
    step: DecodeStep | None = None
    is_chunk: bool = False
    returns_tuple: bool = False
    chunk_outputs: list[Any] = dataclasses.field(default_factory=list)
    documents: list[Any] = dataclasses.field(default_factory=list)
    snapshots: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    served: set[int] = dataclasses.field(default_factory=set)
    has_gradients: bool = dataclasses.field(default_factory=torch.is_grad_enabled)
    memo: dict[tuple[object, ...], tuple[object, object]] = dataclasses.field(default_factory=dict)
    token: Token[Call | None] | None = None

    def chunk(self) -> Call:
        """A call of its own for a chunk of this one."""
        return Call(self.attachment, self.settings, self.padding, self.cache, self.cache_use, is_chunk=True)

    def selected(self, store: HippocampalLayer) -> Selected | None:
        """Which of the tokens that leave a layer's window become anchors; `None` where there are no anchors."""
        return None if self.selection is None else self.selection.selected.get(store.exact.window)

    def turns_sinks(self, seen: int) -> bool:
        """Whether queries are turned once more before they read sinks and anchors, in layers that rotate.

        Args:
            seen: Tokens seen, the new ones included.
        """
        beyond = seen > self.attachment.trained_context and self.settings.sinks > 0
        return beyond and self.settings.sink_positions == "bounded"

    def shared(self, name: str, source: object, make: Callable[[], Made]) -> Made:
        """What is made of one thing, once for all layers of the call.

        Args:
            name: What it is.
            source: What it is made of.
            make: Makes it.
        """
        key = name, id(source)
        if key not in self.memo:
            self.memo[key] = source, make()  # the source too, so that nothing else gets its id
        return cast("Made", self.memo[key][1])

    def open_layer(self, attention_layer: AttentionLayer, memory: Memory) -> tuple[HippocampalLayer, bool]:
        """The layer's part of the cache, a new one where none is kept; and whether the layer reads the call anew.

        Activation checkpointing runs a layer a second time, when the cache has moved on. It then gets one of its own
        that is as it was the first time.

        Raises:
            CacheError: Gradients would not flow from one chunk of the call to the next.
        """
        layer = None if self.cache is None else self.cache.layers[attention_layer.index]
        if not isinstance(layer, HippocampalLayer):
            return new_memory_layer(attention_layer, memory, self.settings), True
        is_long = self.is_chunk or bool(self.chunk_outputs)
        if is_long and self.has_gradients and not torch.is_grad_enabled():
            raise CacheError(
                "a long call with anchors is read in chunks, between which activation checkpointing with "
                "use_reentrant=True loses gradients; pass use_reentrant=False, or read without anchors"
            )
        if attention_layer.index not in self.served:
            self.served.add(attention_layer.index)
            return layer, True
        again = new_memory_layer(attention_layer, memory, self.settings, kind=type(layer))
        again.restore(self.snapshots[attention_layer.index])
        return again, False


@dataclasses.dataclass(frozen=True)
class Softmax:
    """What a layer's softmax does beside the plain one.

    Attributes:
        scaling: Factor on the products of queries and keys.
        dropout: Share of the weights dropped in training.
        softcap: Bound of the scores, tanh(score / softcap) * softcap (Gemma 2), or `None`.
        s_aux: One more score per query head that takes weight and gives no value (gpt-oss), `[H]`, or `None`.
    """

    scaling: float
    dropout: float = 0.0
    softcap: float | None = None
    s_aux: torch.Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Whether it only scales."""
        return not self.dropout and self.softcap is None and self.s_aux is None


class LocalRead(NamedTuple):
    """What new tokens read of sinks, extra keys and window: all that a backend of the softmax must know.

    Attributes:
        call: The call, for its masks and padding.
        view: What the queries may read.
        query: Queries of the new tokens, `[B, H, T, K]`.
        sink_query: Queries for sinks and extra keys where these differ (bounded positions), or `None`.
        softmax: The layer's softmax.
        wants_log_sum: Whether the log-sum of the scores is wanted beside the output.
    """

    call: Call
    view: VisibleKV
    query: torch.Tensor
    sink_query: torch.Tensor | None
    softmax: Softmax
    wants_log_sum: bool = False

    @property
    def first(self) -> int:
        """Index of the first new token."""
        return self.view.seen - self.query.size(2)


@dataclasses.dataclass(frozen=True, eq=False)
class LayerCall:
    """One layer in one call: what its attention function must know beside queries, keys and values.

    Attributes:
        layer: The layer.
        memory: Its memory.
        call: The call.
        hidden: Input of the attention layer, `[B, T, D]`.
        gates: The new tokens' gates, `[B, T, N, H]`; `None` where the memory is silent or layers decode together.
        rotary: Their rotation, where bounded sinks or the memory must undo it.
    """

    layer: AttentionLayer
    memory: Memory
    call: Call
    hidden: torch.Tensor
    gates: torch.Tensor | None
    rotary: Rotary | None

    def record(self, key: torch.Tensor) -> torch.Tensor:
        """What is stored of each new token until it is evicted, `[B, 1, T, F]`."""
        if self.gates is None:
            return key.new_zeros(key.size(0), 1, key.size(2), 0, dtype=torch.float32)
        position = None
        if self.rotary and self.rotary.unrotates:
            position = self.rotary.rotation.position_record(self.rotary.tables, self.rotary.positions, key.size(0))
        return TokenRecord(self.gates, position).pack()[:, None]

    def read(self, query: torch.Tensor, view: VisibleKV, softmax: Softmax) -> LocalRead:
        """What these new tokens read of sinks, extra keys and window."""
        wants_log_sum = self.memory.reads_log_sum and self.call.settings.mode == "ahn"
        return LocalRead(self.call, view, query, self.sink_queries(query, view.seen), softmax, wants_log_sum)

    def sink_queries(self, query: torch.Tensor, seen: int) -> torch.Tensor | None:
        """Queries that see the sinks within the trained context; `None` where they are the others.

        Args:
            query: Queries of the new tokens, `[B, H, T, K]`.
            seen: Tokens seen, the new ones included.
        """
        turn = self.sink_turn(seen)
        return None if turn is None or self.rotary is None else self.rotary.rotation.apply(query, turn)

    def sink_turn(self, seen: int) -> Tables | None:
        """Rotary tables that turn queries once more for sinks; `None` where sinks are read by the same queries.

        Args:
            seen: Tokens seen, the new ones included.
        """
        if not self.call.turns_sinks(seen) or self.rotary is None:
            return None
        rotation, tables, positions, _ = self.rotary
        return self.call.shared("clamped", tables[0], lambda: rotation.clamped(tables, positions))
