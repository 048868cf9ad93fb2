"""A decoder layer as the kernels take it: what they must be told of its weights, its cache and a token.

Legend of shapes: D hidden size, H query heads, G key/value heads, K size of keys and values, N anchors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from ahn import native
from ahn.attachment import MODULE, SCORE_WEIGHTS, AttentionLayer
from ahn.attention.call import Call, Softmax
from ahn.attention.decoder_parts import DecoderParts
from ahn.attention.decoding import LayerRun
from ahn.attention.function import score
from ahn.attention.hooks import layer_call
from ahn.backbone.rotary import Tables
from ahn.cache.layer import HippocampalLayer
from ahn.cache.window import SinkWindow
from ahn.errors import ShapeError
from ahn.memories import Memory
from ahn.native.layer import DescribedLayer, Token, run_layers
from ahn.native.segments import KINDS
from ahn.tokens import ExtraKV, Tokens

TOLERANCE = 1e-5
"""Of what a layer adds to its input: difference up to which the kernel gives what the layer gives."""


class LayerInput(NamedTuple):
    """What the model gives a decoder layer for one token.

    Attributes:
        hidden: Its input, `[1, 1, D]`.
        tables: Its rotary tables, `[1, 1, K]` each.
        positions: Positions of its tokens, or `None` where it is not told.
    """

    hidden: torch.Tensor
    tables: Tables
    positions: torch.Tensor | None


class FastPath:
    """A decoder layer as the kernel takes it.

    Args:
        layer: The decoder layer.
        attention: Its attention module.
        call: A call that reads one token.

    Attributes:
        described: What the kernel is told of it; `None` where it cannot take it.
    """

    def __init__(self, layer: Any, attention: Any, call: Call) -> None:
        self._attention_layer: AttentionLayer = call.attachment.layers[attention.layer_idx]
        self._memory, self._attention = self._attention_layer.memory, attention
        self._layer, self._parts = layer, _parts(layer, attention, self._memory)
        self._attachment, self._cache = call.attachment, id(call.cache)
        self._verified: set[tuple[Any, ...]] = set()  # circumstances in which it was seen to be right
        self._buffer: Tokens | None = None  # that the kernel can work on
        self.described: DescribedLayer | None = None
        if self._parts is not None:
            self.described = describe(self._attention_layer, attention, self._parts)

    @property
    def index(self) -> int:
        """Index of the attention layer."""
        return self._attention_layer.index

    def is_of(self, call: Call) -> bool:
        """Whether the layer still has its parts and the memory that it had."""
        same = self._attachment is call.attachment and self._attention_layer.memory is self._memory
        # A layer that was built otherwise is looked at again with every new cache: an adapter may be gone.
        return same and (self._parts.state.is_same() if self._parts is not None else self._cache == id(call.cache))

    def can_take(self, call: Call) -> bool:
        """Whether the kernel can take the token of a call through the layer."""
        if self.described is None or call.step is None or not call.step.takes_kernels or self._layer.training:
            return False
        if self._parts is None or not self._parts.state.is_free():
            return False
        buffer = self._store(call).exact.buffer
        if buffer is not self._buffer:
            if buffer is None or buffer.keys.shape[:2] != (1, self._attention_layer.shape[2]):
                return False
            if not _is_readable(buffer):
                return False
            self._buffer = buffer
        return True

    def can_read(self, inputs: LayerInput, call: Call) -> bool:
        """Whether the kernel can read what the layer is given."""
        D, _, _, K, _ = self._attention_layer.shape
        hidden, tables, positions = inputs
        if hidden.shape != (1, 1, D) or not hidden.is_contiguous() or not native.ready(hidden):
            return False
        asks_positions = call.selection is not None or call.turns_sinks(self._store(call).exact.seen + 1)
        if asks_positions and positions is None and self._attention_layer.rotation is not None:
            return False
        return call.shared("tables of kernels", tables[0], lambda: _are_whole(tables, K))

    def is_verified(self, call: Call) -> bool:
        """Whether the kernel was seen to give what the layer gives, in circumstances like those of a call."""
        return self._circumstances(call) in self._verified

    def _circumstances(self, call: Call) -> tuple[Any, ...]:
        """What makes layers compute otherwise: how far the text has come, to a factor of two, and what is read."""
        exact = self._store(call).exact
        seen, kind = exact.seen, None if self._buffer is None else self._buffer.keys.dtype
        return kind, seen.bit_length(), seen >= exact.sinks + exact.window, call.turns_sinks(seen + 1)

    def verify(self, inputs: LayerInput, call: Call, own: Callable[[], Any]) -> Any:
        """Compares what the kernel gives with what the layer gives, which is what the cache then holds.

        Args:
            inputs: What the layer is given.
            call: The call.
            own: The layer's own forward.

        Returns:
            The output to go on with: the kernel's where it is right, so that a text gives the same bits the first time
            and later.
        """
        circumstances = self._circumstances(call)
        run, exact, step = run_paths([self], inputs, call)[0], self._store(call).exact, call.step
        stored, read = exact.last().map(torch.clone), None if step is None else step.hidden[self.index]
        if call.cache is not None:
            call.cache.take_back(self.index)
        expected = own()
        if not is_same(run.output, expected, inputs.hidden):
            self.described = None
            return expected
        self._verified.add(circumstances)
        for tensor, new in zip(exact.last(), stored, strict=True):
            tensor.copy_(new)
        if step is not None and read is not None:
            step.hidden[self.index] = read
        return run.output

    def begin(self, inputs: LayerInput, output: torch.Tensor, call: Call) -> _Begun:
        """Takes the token into the layer's part of the cache, and describes it to the kernel.

        Args:
            inputs: What the first layer of a run is given.
            output: Where the kernel puts what the layer gives.
            call: The call.
        """
        store, token, step = self._store(call), Token(), call.step
        exact, contents = store.exact, None if step is None else step.contents(self.index)
        slot = exact.begin_key(contents)
        extra = self._extra(call, store, contents)
        normed = inputs.hidden if step is None else step.row(self.index, inputs.hidden)
        state = None if store.state is None else store.state.contiguous()
        turned, buffer = self._sink_tables(call, inputs, exact.seen), exact.ring
        token.out, token.normed = output.data_ptr(), normed.data_ptr()
        token.cos, token.sin = (table.data_ptr() for table in inputs.tables)
        token.sink_cos, token.sink_sin = (None, None) if turned is None else (each.data_ptr() for each in turned)
        token.keys, token.values = buffer.keys.data_ptr(), buffer.values.data_ptr()
        token.kind = KINDS[buffer.keys.dtype]
        token.capacity, token.slot, token.sinks = buffer.length, slot, exact.sinks
        token.used, token.seen = min(exact.seen, exact.sinks + exact.window), exact.seen - 1
        token.state = None if state is None else state.data_ptr()
        begun = _Begun(self, token, output, normed, (state, buffer, turned))
        if extra is not None:
            begun.add_anchors(extra)
        selection = call.selection
        if selection is not None and self.index in selection.scoreboard.layers:
            begun.add_projected(self._attention_layer)
        return begun

    def finish(self, begun: _Begun, inputs: LayerInput, call: Call) -> None:
        """Scores the token, whose queries, keys and values the kernel has noted."""
        projected = begun.projected
        if projected is None:
            return
        _, H, G, _, _ = self._attention_layer.shape
        known = {"position_embeddings": inputs.tables, "position_ids": inputs.positions}
        layer = layer_call(self._attention, call, (begun.normed,), known)
        if layer is not None:
            store, heads = self._store(call), projected[None, :, None]
            view = store.exact.as_it_lies()._replace(extra=begun.extra)
            split = heads[:, :H], heads[:, H : H + G], heads[:, H + G :]
            score(layer, store, split, view, Softmax(self._attention.scaling))

    def _extra(self, call: Call, store: HippocampalLayer, contents: Callable[[], Tokens] | None) -> ExtraKV | None:
        selected = call.selected(store)
        if selected is None or store.bank is None:
            return None
        extra = store.bank.unchanged(selected)
        return store.bank.append(_evicted(store.exact, contents), selected) if extra is None else extra

    def _sink_tables(self, call: Call, inputs: LayerInput, seen: int) -> Tables | None:
        """Tables that turn queries once more for sinks and anchors; `None` where these read as the window does."""
        rotation, (_, tables, positions) = self._attention_layer.rotation, inputs
        if rotation is None or positions is None or not call.turns_sinks(seen):
            return None
        turned: Tables = call.shared("turn of sinks", tables[0], lambda: _dense(rotation.clamped(tables, positions)))
        return turned

    def _store(self, call: Call) -> HippocampalLayer:
        cache: Any = call.cache
        store: HippocampalLayer = cache.layers[self._attention_layer.index]
        return store


@dataclasses.dataclass(eq=False)
class _Begun:
    """A token that a layer has taken into its cache, and that the kernel has not seen yet.

    Attributes:
        path: The layer.
        token: The token as the kernel takes it.
        output: What the layer will give, `[1, 1, D]`.
        normed: What its attention will read, `[1, 1, D]`.
        tensors: Tensors whose addresses the token has.
        extra: The anchors that it reads, or `None`.
        projected: Its queries, keys and values, `[H + 2 G, K]`, in a layer that scores; else `None`.
    """

    path: FastPath
    token: Token
    output: torch.Tensor
    normed: torch.Tensor
    tensors: tuple[object, ...]
    extra: ExtraKV | None = None
    projected: torch.Tensor | None = None

    def add_anchors(self, extra: ExtraKV) -> None:
        """Lets the token read anchors."""
        self.extra = dense = ExtraKV(*(each.contiguous() for each in extra))
        self.token.anchors = dense.keys.size(2)
        self.token.anchor_keys, self.token.anchor_values = dense.keys.data_ptr(), dense.values.data_ptr()
        self.token.visible_from = dense.visible_from.data_ptr()
        self.token.visible_until = dense.visible_until.data_ptr()

    def add_projected(self, layer: AttentionLayer) -> None:
        """Lets the kernel note what the layer's score may look at."""
        _, H, G, K, _ = layer.shape
        self.projected = self.output.new_empty(H + 2 * G, K)
        self.token.projected = self.projected.data_ptr()


def describe(layer: AttentionLayer, attention: Any, parts: DecoderParts) -> DescribedLayer | None:
    """A decoder layer for the kernel; `None` where it cannot take it.

    Args:
        layer: Its attention layer.
        attention: Its attention module.
        parts: Its parts.
    """
    memory, scaling = layer.memory, getattr(attention, "scaling", None)
    _, H, G, K, V = layer.shape
    rope = getattr(getattr(attention, "config", None), "rope_parameters", None) or {}
    grows = bool(rope.get("llama_4_scaling_beta"))  # queries with their position, far into a text
    if memory is None or K != V or not isinstance(scaling, float) or grows:
        return None
    weights = memory.output_weights()
    tensors = [each.detach() for each in weights or () if isinstance(each, torch.Tensor)]
    if weights is None or not native.ready(*tensors) or not all(each.is_contiguous() for each in tensors):
        return None
    try:
        return DescribedLayer(parts.weights, weights, H, G, K, scaling)
    except ShapeError:
        return None


def is_same(output: torch.Tensor, expected: torch.Tensor, hidden: torch.Tensor) -> bool:
    """Whether the kernel gives what a layer gives.

    Args:
        output: What the kernel gives.
        expected: What the layer gives, of the same shape.
        hidden: What both were given.
    """
    added = (expected - hidden).abs().max()
    return bool((output - expected).abs().max() <= TOLERANCE * (added + expected.abs().max() / 10))


def run_paths(paths: list[FastPath], inputs: LayerInput, call: Call) -> list[LayerRun]:
    """Takes the token of a call through layers of which each reads what the one before gives.

    Args:
        paths: The layers.
        inputs: What the first is given.
        call: The call.
    """
    with torch.inference_mode(False):  # outputs keep count of changes
        outputs = torch.empty((len(paths), *inputs.hidden.shape), dtype=inputs.hidden.dtype).unbind(0)
    begun = [path.begin(inputs, output, call) for path, output in zip(paths, outputs, strict=True)]
    for each, x in zip(begun, (inputs.hidden, *outputs), strict=False):
        each.token.x = x.data_ptr()
    described = [layer for path in paths if (layer := path.described) is not None]
    run_layers(described, [each.token for each in begun])
    return [
        LayerRun(
            each.path.index,
            each.output,
            None if each.projected is None else partial(each.path.finish, each, inputs, call),
        )
        for each in begun
    ]


def _parts(layer: nn.Module, attention: nn.Module, memory: Memory | None) -> DecoderParts | None:
    try:
        return DecoderParts(layer, attention, (MODULE, SCORE_WEIGHTS), memory)
    except LookupError:
        return None


def _is_readable(buffer: Tokens) -> bool:
    """Whether the kernel can read and write a ring."""
    kinds = buffer.keys.dtype is buffer.values.dtype and buffer.keys.dtype in KINDS
    return kinds and all(each.is_cpu and each.is_contiguous() and type(each) is torch.Tensor for each in buffer)


def _are_whole(tables: Tables, size: int) -> bool:
    """Whether tables rotate whole heads of one token, and the kernel can read them."""
    return all(table.shape == (1, 1, size) and table.is_contiguous() for table in tables) and native.ready(*tables)


def _evicted(exact: SinkWindow, contents: Callable[[], Tokens] | None) -> Tokens:
    """The token that leaves the window, or none."""
    if contents is None:
        return exact.leaving().span(0, 0)
    return contents()


def _dense(tables: Tables) -> Tables:
    return tables[0].contiguous(), tables[1].contiguous()
