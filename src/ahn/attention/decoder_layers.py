"""One decoded token through a decoder layer in one call of the kernels, where the layer is of the usual build.

A layer's own forward is the reference. The first token that the kernel could take goes both ways, and the kernel is
used from then on if it gives the same. Whatever it does not take goes through the layer's own forward: hooks and
adapters on parts of the layer, padding, autocast, layers that score anchors, other dtypes, several rows.

Legend of shapes: D hidden size, G key/value heads, K size of keys and values, N anchors.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ahn import native
from ahn.attachment import MODULE, SCORE_WEIGHTS, Attachment, AttentionLayer
from ahn.attention.call import Call
from ahn.attention.masks import CallMask
from ahn.backbone.decoder import DecoderParts, decoder_layers
from ahn.cache.layer import HippocampalLayer
from ahn.cache.window import SinkWindow
from ahn.errors import ShapeError
from ahn.native.layer import DescribedLayer, Token
from ahn.native.segments import KINDS
from ahn.tokens import ExtraKV, Tokens

TOLERANCE = 1e-5
"""Of what a layer adds to its input: difference up to which the kernel gives what the layer gives."""

_Tables = tuple[torch.Tensor, torch.Tensor]


def speed_up(backbone: nn.Module, attachment: Attachment) -> None:
    """Lets decoder layers with a memory look for the kernel first. Those that something else has changed stay so."""
    served = [layer.module for layer in attachment.layers if layer.memory is not None]
    for layer, attention in decoder_layers(backbone, served):
        if "forward" not in vars(layer):
            layer.forward = partial(_forward, layer, attention)


def restore(backbone: nn.Module) -> None:
    """Takes back what `speed_up` did."""
    for module in backbone.modules():
        forward: Any = vars(module).get("forward")
        if isinstance(forward, partial) and forward.func is _forward:
            del module.forward


def _forward(layer: Any, attention: Any, *args: Any, **kwargs: Any) -> Any:
    mask = kwargs.get("attention_mask")
    call = mask.call if type(mask) is CallMask else None
    if call is None or call.step is None or not args or torch.compiler.is_compiling():
        return type(layer).forward(layer, *args, **kwargs)
    path = _PATHS.get(layer)
    if path is None or not path.is_of(call, attention):
        path = _PATHS[layer] = FastPath(layer, attention, call)
    tables: Any = kwargs.get("position_embeddings")
    if not path.can_take(args[0], tables, call):
        return type(layer).forward(layer, *args, **kwargs)
    if path.is_verified:
        return path.run(args[0], tables, call)
    output = type(layer).forward(layer, *args, **kwargs)
    return path.verify(args[0], tables, call, output)


class FastPath:
    """A decoder layer as the kernel takes it.

    Args:
        layer: The decoder layer.
        attention: Its attention module.
        call: A call that reads one token.

    Attributes:
        is_verified: Whether the kernel was seen to give what the layer gives.
    """

    def __init__(self, layer: Any, attention: Any, call: Call) -> None:
        self._attention_layer: AttentionLayer = call.attachment.layers[attention.layer_idx]
        self._memory = attention._modules.get(MODULE)
        self._layer, self._parts = layer, _parts(layer, attention)
        self._attachment, self._cache = call.attachment, id(call.cache)
        self.is_verified = False
        self._buffer: Tokens | None = None  # that the kernel can work on
        self._described: DescribedLayer | None = None
        if self._parts is not None:
            self._described = self._describe(attention)

    def is_of(self, call: Call, attention: Any) -> bool:
        """Whether the layer still has its parts and the memory that it had."""
        same = self._attachment is call.attachment and attention._modules.get(MODULE) is self._memory
        # A layer that was built otherwise is looked at again with every new cache: an adapter may be gone.
        return same and (self._parts.are_same() if self._parts is not None else self._cache == id(call.cache))

    def can_take(self, hidden: torch.Tensor, tables: _Tables | None, call: Call) -> bool:
        """Whether the kernel can take a token.

        Args:
            hidden: Input of the layer.
            tables: Its rotary tables.
            call: The call.
        """
        if self._described is None or tables is None or call.step is None or not call.step.takes_kernels:
            return False
        if self._parts is None or not self._parts.are_free():
            return False
        D, _, G, K, _ = self._attention_layer.shape
        if hidden.shape != (1, 1, D) or self._layer.training or not hidden.is_contiguous() or not native.ready(hidden):
            return False
        selection, buffer = call.selection, self._store(call).exact.buffer
        if selection is not None and self._attention_layer.index in selection.scoreboard.layers:
            return False
        if buffer is not self._buffer:
            if buffer is None or buffer.keys.shape[:2] != (1, G) or not _is_readable(buffer):
                return False
            self._buffer = buffer
        return call.shared("tables of kernels", tables[0], lambda: _are_whole(tables, K))

    def run(self, hidden: torch.Tensor, tables: _Tables, call: Call) -> torch.Tensor:
        """Output of the layer, `[1, 1, D]`; arguments as for `can_take`."""
        store = self._store(call)
        step: Any = call.step
        index = self._attention_layer.index
        contents = step.contents(index)
        selected = None if call.selection is None else call.selection.selected.get(store.exact.window)
        extra = None
        if selected is not None and store.bank is not None:
            extra = store.bank.append(_evicted(store.exact, contents), selected)
        return self._run(hidden, tables, call, store.exact.begin_key(contents), extra, step.row(index, hidden))

    def verify(self, hidden: torch.Tensor, tables: _Tables, call: Call, expected: torch.Tensor) -> torch.Tensor:
        """Compares the kernel with what the layer has given; the layer has stored the token already.

        The kernel's result is kept where it is right, so that a text gives the same bits the first time and later.

        Args:
            hidden: Input of the layer.
            tables: Its rotary tables.
            call: The call.
            expected: Output of the layer.

        Returns:
            The output to go on with.
        """
        store = self._store(call)
        selected = None if call.selection is None else call.selection.selected.get(store.exact.window)
        if selected is not None:
            return expected  # a token without anchors is enough
        step: Any = call.step
        index, last = self._attention_layer.index, store.exact.last()
        stored, read = last.map(torch.clone), step.hidden.get(index)
        got = self._run(hidden, tables, call, store.exact.last_slot(), None, step.row(index, hidden))
        least = TOLERANCE * (expected - hidden).abs().max() + TOLERANCE / 10 * expected.abs().max()
        if bool((got - expected).abs().max() <= least):
            self.is_verified = True
            return got
        self._described = None
        step.hidden[index] = read
        for tensor, before in zip(last, stored, strict=True):
            tensor.copy_(before)
        return expected

    def _run(
        self,
        hidden: torch.Tensor,
        tables: _Tables,
        call: Call,
        slot: int,
        extra: ExtraKV | None,
        normed: torch.Tensor,
    ) -> torch.Tensor:
        store, token, out = self._store(call), Token(), torch.empty_like(hidden)  # threads may share the layer
        exact = store.exact
        buffer: Any = exact.buffer
        state = None if store.state is None else store.state.contiguous()
        turned = self._sink_tables(call, tables, exact.seen)
        token.x, token.out, token.normed = hidden.data_ptr(), out.data_ptr(), normed.data_ptr()
        token.cos, token.sin = tables[0].data_ptr(), tables[1].data_ptr()
        token.sink_cos, token.sink_sin = (None, None) if turned is None else (each.data_ptr() for each in turned)
        token.keys, token.values = buffer.keys.data_ptr(), buffer.values.data_ptr()
        token.kind = KINDS[buffer.keys.dtype]
        token.places, token.slot, token.sinks = buffer.length, slot, exact.sinks
        token.used, token.seen = min(exact.seen, exact.sinks + exact.window), exact.seen - 1
        token.state = None if state is None else state.data_ptr()
        token.anchors = 0
        if extra is not None:
            keys, values, visible_from, visible_until = (each.contiguous() for each in extra)
            token.anchors = keys.size(2)
            token.anchor_keys, token.anchor_values = keys.data_ptr(), values.data_ptr()
            token.visible_from, token.visible_until = visible_from.data_ptr(), visible_until.data_ptr()
        if self._described is not None:
            self._described.run(token)
        return out

    def _sink_tables(self, call: Call, tables: _Tables, seen: int) -> _Tables | None:
        """Tables that turn queries once more for sinks and anchors; `None` where these read as the window does."""
        rotation, settings = self._attention_layer.rotation, call.settings
        within = seen <= call.attachment.trained_context or settings.sinks == 0
        if within or settings.sink_positions != "bounded" or rotation is None:
            return None
        positions = torch.full((1, 1), seen - 1)
        turned: _Tables = call.shared("turn of sinks", tables[0], lambda: _dense(rotation.clamped(tables, positions)))
        return turned

    def _store(self, call: Call) -> HippocampalLayer:
        cache: Any = call.cache
        store: HippocampalLayer = cache.layers[self._attention_layer.index]
        return store

    def _describe(self, attention: Any) -> DescribedLayer | None:
        memory, parts = self._attention_layer.memory, self._parts
        scaling = getattr(attention, "scaling", None)
        _, H, G, K, V = self._attention_layer.shape
        if memory is None or parts is None or K != V or not isinstance(scaling, float):
            return None
        weights = memory.output_weights()
        if not native.ready(*(each.detach() for each in weights[:4] if each is not None)):
            return None
        try:
            return DescribedLayer(parts.weights, weights, H, G, K, scaling)
        except ShapeError:
            return None


def _parts(layer: nn.Module, attention: nn.Module) -> DecoderParts | None:
    try:
        return DecoderParts(layer, attention, (MODULE, SCORE_WEIGHTS))
    except LookupError:
        return None


def _is_readable(buffer: Tokens) -> bool:
    """Whether the kernel can read and write a ring."""
    kinds = buffer.keys.dtype is buffer.values.dtype and buffer.keys.dtype in KINDS
    return kinds and all(each.is_cpu and each.is_contiguous() and type(each) is torch.Tensor for each in buffer)


def _are_whole(tables: _Tables, size: int) -> bool:
    """Whether tables rotate whole heads of one token, and the kernel can read them."""
    return all(table.shape == (1, 1, size) and table.is_contiguous() for table in tables) and native.ready(*tables)


def _evicted(exact: SinkWindow, contents: Callable[[], Tokens] | None) -> Tokens:
    """The token that leaves the window, or none."""
    if contents is None:
        return exact.leaving().span(0, 0)
    return contents()


def _dense(tables: _Tables) -> _Tables:
    return tables[0].contiguous(), tables[1].contiguous()


_PATHS: WeakKeyDictionary[nn.Module, FastPath] = WeakKeyDictionary()
