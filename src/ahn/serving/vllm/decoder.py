"""Decoder layers left to the kernels, in steps in which every request reads one token.

Eager operations of a layer cost more than their arithmetic on a CPU. So all layers of a step are one call of the
kernels, which read and write the blocks of the requests. As in `ahn.attention.decoder_layers`, a layer's own forward is
the reference: the first step that the kernel could take goes both ways, and the kernel is used from then on if it gives
the same.

Legend of shapes: L layers, B requests, D hidden size, H query heads, G key/value heads, K size of keys and values,
A anchors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ahn import native
from ahn.attachment import MODULE, SCORE_WEIGHTS
from ahn.attention.call import LayerCall
from ahn.attention.decoder_layers import KernelForward
from ahn.attention.decoder_parts import DecoderParts, PartReader, decoder_layers
from ahn.attention.decoder_run import LayerInput, describe, is_same
from ahn.attention.decoding import KernelProgress, LayerRun
from ahn.backbone.rotary import Tables
from ahn.memories import Memory
from ahn.native.layer import DescribedLayer, Token, TokenTable, run_table
from ahn.native.segments import KINDS
from ahn.serving.vllm.decode import DecodedTokens
from ahn.serving.vllm.runtime import Runtime, ServedLayer
from ahn.serving.vllm.step import ServedStep

OURS = (MODULE, SCORE_WEIGHTS, "attn")
"""Names of modules in an attention module that this library has put there."""
_NEVER = torch.iinfo(torch.int64).max


def leave_to_kernels(
    backbone: nn.Module, runtime: Runtime, find_step: Callable[[], ServedStep | None], reader: PartReader
) -> list[nn.Module]:
    """Lets the decoder layers look for the kernel first, those that are of the usual build.

    Args:
        backbone: The model of the layers, with its weights.
        runtime: What all steps share.
        find_step: Gives the step that the model is in, or `None` where it is in none.
        reader: How the weights of a layer are read.

    Returns:
        These layers; none where those of a step cannot be one call of the kernels.
    """
    if not runtime.is_alike:
        return []
    served = {id(each.layer.module): each for each in runtime.layers.values()}
    decoders: list[nn.Module] = []
    for layer, attention in decoder_layers(backbone, [each.layer.module for each in runtime.layers.values()]):
        forward = ServedForward(layer, attention, served[id(attention)], find_step, reader)
        if forward.is_usual():
            layer.forward = forward
            decoders.append(layer)
    return decoders


class ServedForward(KernelForward):
    """The forward of a decoder layer that reads the tokens of a step.

    Args:
        layer: The decoder layer.
        attention: Its attention module.
        served: Its attention layer.
        find_step: Gives the step that the model is in, or `None` where it is in none.
        reader: How the weights of a layer are read.
    """

    def __init__(
        self,
        layer: Any,
        attention: Any,
        served: ServedLayer,
        find_step: Callable[[], ServedStep | None],
        reader: PartReader,
    ) -> None:
        super().__init__(layer, attention)
        self._served, self._find_step, self._reader = served, find_step, reader

    def is_usual(self) -> bool:
        """Whether the layer is built so that the kernel may take it, with a memory whose output it knows."""
        if self._served.memory.output_weights() is None:
            return False
        with torch.no_grad():  # as in the steps: while weights are loaded, gradients may be asked for
            return _read_parts(self._layer, self._attention, None, self._reader) is not None

    def _find_call(self, kwargs: dict[str, Any]) -> DecodedTokens | None:
        step = self._find_step()
        return None if step is None else step.kernel_tokens

    def _progress(self, call: DecodedTokens) -> KernelProgress:
        return call

    def _new_path(self, call: DecodedTokens) -> ServedPath:
        return ServedPath(self._layer, self._attention, self._served, self._reader)

    def _run_paths(self, paths: list[ServedPath], inputs: LayerInput, call: DecodedTokens) -> list[LayerRun]:
        return run_served(paths, inputs, call)


class ServedPath:
    """A decoder layer as the kernel takes it; works as a `FastPath` does.

    Args:
        layer: The decoder layer.
        attention: Its attention module.
        served: Its attention layer.
        reader: How the weights of a layer are read.

    Attributes:
        served: Its attention layer.
        described: What the kernel is told of it; `None` where it cannot take it.
    """

    def __init__(self, layer: Any, attention: Any, served: ServedLayer, reader: PartReader) -> None:
        self.served = served
        self._verified: set[tuple[Any, ...]] = set()  # circumstances in which it was seen to be right
        self.described: DescribedLayer | None = None
        self._layer, self._memory = layer, served.layer.memory
        self._parts = _read_parts(layer, attention, self._memory, reader)
        if self._parts is not None:
            self.described = describe(served.layer, attention, self._parts)

    @property
    def index(self) -> int:
        """Index of the attention layer."""
        return self.served.layer.index

    def is_of(self, call: DecodedTokens) -> bool:
        """Whether the layer still has its parts and the memory that it had."""
        same = self.served.layer.memory is self._memory
        return same and (self._parts is None or self._parts.state.is_same())

    def can_take(self, call: DecodedTokens) -> bool:
        """Whether the kernel can take the tokens of a step through the layer."""
        is_usual = self._parts is not None and self._parts.state.is_free()
        return is_usual and self.described is not None and not self._layer.training

    def can_read(self, inputs: LayerInput, call: DecodedTokens) -> bool:
        """Whether the kernel can read what the layer is given."""
        D, _, _, K, _ = self.served.layer.shape
        hidden, tables, positions = inputs
        if hidden.shape != (1, call.count, D) or not hidden.is_contiguous() or not native.ready(hidden):
            return False
        if positions is None and self.served.layer.rotation is not None:
            return False
        return call.call.shared("tables of kernels", tables[0], lambda: _are_whole(tables, call.count, K))

    def is_verified(self, call: DecodedTokens) -> bool:
        """Whether the kernel was seen to give what the layer gives, in circumstances like those of a step."""
        return _circumstances(call) in self._verified

    def verify(self, inputs: LayerInput, call: DecodedTokens, own: Callable[[], Any]) -> Any:
        """Compares what the kernel gives with what the layer gives, which is what the blocks then hold.

        Args:
            inputs: What the layer is given.
            call: The tokens of the step.
            own: The layer's own forward.

        Returns:
            What the layer gives.
        """
        run = run_served([self], inputs, call)[0]
        expected = own()
        if is_same(run.output, expected, inputs.hidden):
            self._verified.add(_circumstances(call))
        else:
            self.described = None
        return expected


def _circumstances(call: DecodedTokens) -> tuple[Any, ...]:
    """What makes layers compute otherwise: how far the longest text has come, to a factor of two, and what is read."""
    longest = call.longest
    return longest.bit_length(), bool(call.evicts.any()), call.call.turns_sinks(longest)


def run_served(paths: Sequence[ServedPath], inputs: LayerInput, tokens: DecodedTokens) -> list[LayerRun]:
    """Takes the tokens of a step through layers of which each reads what the one before gives.

    Args:
        paths: The layers.
        inputs: What the first is given: hidden states `[1, B, D]`, tables `[1, B, K]`, positions `[1, B]`.
        tokens: The tokens of the step.
    """
    L, B, D = len(paths), tokens.count, inputs.hidden.size(2)
    _, H, G, K, _ = paths[0].served.layer.shape
    with torch.inference_mode(False):  # outputs keep count of changes
        outputs_L1BD = torch.empty(L, 1, B, D)
        outputs = outputs_L1BD.unbind(0)
    normed_LB1D = torch.empty(L, B, 1, D)
    heads_LBXK = None if tokens.anchors is None else torch.empty(L, B, H + 2 * G, K)
    rotary = {"position_embeddings": inputs.tables, "position_ids": inputs.positions}
    calls = [tokens.layer_call(path.served, normed, rotary) for path, normed in zip(paths, normed_LB1D, strict=True)]
    table = _lay_blocks(tokens, [path.index for path in paths])
    TokenTable(table.numbers[:1]).point(x=inputs.hidden)
    TokenTable(table.numbers[1:]).point(x=outputs_L1BD[:-1, 0])
    table.point(out=outputs_L1BD[:, 0], normed=normed_LB1D, projected=heads_LBXK)
    _point_tables(table, ("cos", "sin"), inputs.tables)
    turn = calls[0].sink_turn(tokens.longest)
    _point_tables(table, ("sink_cos", "sink_sin"), turn)
    run_table([path.described for path in paths if path.described is not None], table)
    noted = [None] * L if heads_LBXK is None else heads_LBXK[..., None, :].unbind(0)
    return [
        LayerRun(path.index, output, partial(_finish, tokens, call, path.served, heads))
        for path, output, call, heads in zip(paths, outputs, calls, noted, strict=True)
    ]


def _read_parts(
    layer: nn.Module, attention: nn.Module, memory: Memory | None, reader: PartReader
) -> DecoderParts | None:
    """The parts of a decoder layer; `None` where it is built otherwise."""
    try:
        return DecoderParts(layer, attention, OURS, memory, reader)
    except LookupError:
        return None


def _finish(tokens: DecodedTokens, call: LayerCall, served: ServedLayer, heads_BX1K: torch.Tensor | None) -> None:
    """Notes what a layer has read, once the model has come to it; the last layer ends the step."""
    H, G = served.layer.shape.query_heads, served.layer.shape.kv_heads
    projected = None
    if heads_BX1K is not None:
        projected = heads_BX1K[:, :H], heads_BX1K[:, H : H + G], heads_BX1K[:, H + G :]
    tokens.note(call, served, projected)
    if served.layer.index == tokens.runtime.last:
        tokens.close()


def _lay_blocks(tokens: DecodedTokens, layers: Sequence[int]) -> TokenTable:
    """The tokens of a step with what the kernel must know of their blocks.

    Args:
        tokens: The tokens.
        layers: Indices of the layers.
    """
    runtime, exact = tokens.runtime, tokens.runtime.exact
    own = [index - runtime.first for index in layers]
    table = TokenTable(torch.zeros(len(layers), tokens.count, len(Token._fields_), dtype=torch.int64))

    def addresses(name: str) -> torch.Tensor:
        return runtime.addresses(name, tokens.blocks)[own]

    table.set(keys=addresses("keys"), values=addresses("values"), state=addresses("state") * tokens.evicts)
    table.set(kind=KINDS[torch.float32], capacity=exact.sinks + exact.window, slot=tokens.slots)
    table.set(used=tokens.used, sinks=tokens.used.clamp(max=exact.sinks), seen=tokens.seen)
    if tokens.anchors is not None:
        missing_BA = tokens.anchors.missing
        visible_BA = torch.zeros(missing_BA.shape, dtype=torch.int64).masked_fill_(missing_BA, _NEVER)
        table.set(
            anchors=missing_BA.size(1), anchor_keys=addresses("anchor_keys"), anchor_values=addresses("anchor_values")
        )
        until_BA = torch.full_like(visible_BA, _NEVER)
        table.point(
            visible_from=visible_BA.expand(len(layers), -1, -1), visible_until=until_BA.expand(len(layers), -1, -1)
        )
    return table


def _point_tables(table: TokenTable, names: tuple[str, str], tables: Tables | None) -> None:
    """Tells the kernel where rotary tables of the tokens lie, `[1, B, K]` or `[B, 1, K]`, the same for all layers."""
    L, B = table.numbers.shape[:2]
    for name, each in zip(names, tables or (), strict=False):
        table.point(**{name: each.reshape(1, B, -1).expand(L, -1, -1)})


def _are_whole(tables: Tables, tokens: int, size: int) -> bool:
    """Whether tables rotate whole heads of the tokens, and the kernel can read them."""
    whole = all(table.shape == (1, tokens, size) and table.is_contiguous() for table in tables)
    return whole and native.ready(*tables)
