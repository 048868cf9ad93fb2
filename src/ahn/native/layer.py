"""Decoded tokens through whole decoder layers in one call: norm, projections, rotation, attention, memory, gated MLP.

Legend of shapes: L layers, B tokens, each of a text of its own, D hidden size, H query heads, G key/value heads,
K size of keys and values, I inner size, N anchors.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from ahn import native
from ahn.errors import ShapeError
from ahn.native.linearized import LinearizedWeights
from ahn.native.packed import PANEL_ROWS, DescribedWeight
from ahn.native.team import Team

_INT, _FLOAT, _POINTER = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
_LANES, _PACKED = 8, 3
_GATED, _LINEARIZED = 0, 1
_TEAM = Team()

MOST_TOKENS = 32
"""Tokens that are worth taking through layers together: the products of more are faster in libraries."""


class _Weight(ctypes.Structure):
    """`Weight` of layer.c."""

    _fields_ = (
        *((name, _INT) for name in ("kind", "rows", "columns")),
        *((name, _POINTER) for name in ("numbers", "bias")),
    )


class _Norm(ctypes.Structure):
    """`Norm` of layer.c."""

    _fields_ = (("weight", _POINTER), ("epsilon", _FLOAT))


class _GatedOutput(ctypes.Structure):
    """`Output` of kernels.h."""

    _fields_ = (
        *((name, _POINTER) for name in ("gate", "gate_bias", "norm", "project")),
        ("scale", _FLOAT),
        *((name, ctypes.c_int) for name in ("per_head", "key_first")),
    )


class _LinearizedOutput(ctypes.Structure):
    """`Linearized` of kernels.h."""

    _fields_ = tuple((name, _POINTER) for name in LinearizedWeights._fields)


class _Memory(ctypes.Structure):
    """`Memory` of kernels.h."""

    _fields_ = (("kind", _INT), ("output", _POINTER))


_MAPS = ("query", "key", "value", "output", "gate", "up", "down")


class _DecoderLayer(ctypes.Structure):
    """`Layer` of layer.c."""

    _fields_ = (
        *((name, _INT) for name in ("hidden", "heads", "kv_heads", "size", "is_gelu")),
        *((name, _Norm) for name in ("first", "second", "query_norm", "key_norm")),
        *((name, _Weight) for name in _MAPS),
        ("memory", _Memory),
        ("scaling", _FLOAT),
    )


class Token(ctypes.Structure):
    """One token on its way through a layer: addresses of tensors that the caller keeps alive, and counts; 8 bytes each.

    Attributes:
        x: Input of the layer, `[D]` float32.
        out: Its output, `[D]`.
        normed: Where to put what its attention reads, `[D]`.
        projected: Where to put queries and keys after their rotation, and values, `[H + 2 G, K]`, or `None`.
        cos: Rotary table of the token, `[K]`.
        sin: The same.
        sink_cos: Table that turns queries once more for sinks and anchors, or `None`.
        sink_sin: The same.
        keys: The ring, `[G, capacity, K]`.
        values: The same.
        kind: What numbers they and the anchors are, a value of `ahn.native.segments.KINDS`.
        capacity: Places of the ring.
        slot: Where the token goes.
        used: Places that hold tokens, this one included.
        sinks: Sinks, at the first places.
        seen: Index of the token.
        anchor_keys: Anchors, `[G, N, K]`.
        anchor_values: The same.
        visible_from: Index of the first token that reads each, `[N]` int64.
        visible_until: Index of the first that no longer does.
        anchors: N.
        state: State of the memory, or `None` where nothing has left the window.
    """

    _fields_ = (
        *((name, _POINTER) for name in ("x", "out", "normed", "projected")),
        *((name, _POINTER) for name in ("cos", "sin", "sink_cos", "sink_sin")),
        *((name, _POINTER) for name in ("keys", "values")),
        *((name, _INT) for name in ("kind", "capacity", "slot", "used", "sinks", "seen")),
        *((name, _POINTER) for name in ("anchor_keys", "anchor_values", "visible_from", "visible_until")),
        ("anchors", _INT),
        ("state", _POINTER),
    )


class LinearWeight(NamedTuple):
    """A linear map.

    Attributes:
        weight: `[N, D]` in float32 or bfloat16, dense, or a packed weight.
        rows: N.
        bias: `[N]` float32, or `None`.
    """

    weight: Tensor | DescribedWeight
    rows: int
    bias: Tensor | None

    @property
    def columns(self) -> int:
        """D."""
        return self.weight.columns if isinstance(self.weight, DescribedWeight) else self.weight.size(1)


class NormWeight(NamedTuple):
    """A norm by the root of the mean square.

    Attributes:
        weight: `[D]` or `[K]` float32.
        epsilon: Added to the mean square.
    """

    weight: Tensor
    epsilon: float


class LayerWeights(NamedTuple):
    """The weights of a decoder layer.

    Attributes:
        first: Norm before attention.
        query: Projection to `[H, K]`.
        key: Projection to `[G, K]`.
        value: The same.
        query_norm: Norm of each query head, or `None`.
        key_norm: Norm of each key head, or `None`.
        output: Projection from `[H, K]`.
        second: Norm before the MLP.
        gate: Projection to `[I]`, which passes the activation.
        up: Projection to `[I]`.
        down: Projection from `[I]`.
        activation: What it is.
    """

    first: NormWeight
    query: LinearWeight
    key: LinearWeight
    value: LinearWeight
    query_norm: NormWeight | None
    key_norm: NormWeight | None
    output: LinearWeight
    second: NormWeight
    gate: LinearWeight
    up: LinearWeight
    down: LinearWeight
    activation: Literal["silu", "gelu_tanh"]


class DescribedLayer:
    """A decoder layer as the kernel takes it.

    Args:
        weights: Its weights.
        memory: Output of its memory.
        heads: Query heads, H.
        kv_heads: Key/value heads, G.
        size: Size of keys and values, K.
        scaling: Factor on the products of queries and keys.

    Raises:
        ShapeError: The kernel cannot take them.

    Attributes:
        address: Where the kernel finds it.
    """

    def __init__(
        self,
        weights: LayerWeights,
        memory: native.OutputWeights | LinearizedWeights,
        heads: int,
        kv_heads: int,
        size: int,
        scaling: float,
    ) -> None:
        self._check(weights, heads, kv_heads, size)
        kind, output = _output(memory)
        self._held = weights, memory, output  # whose addresses are noted
        named = weights._asdict()
        self._layer = _DecoderLayer(
            weights.query.columns,
            heads,
            kv_heads,
            size,
            int(weights.activation == "gelu_tanh"),
            *(_norm(named[name]) for name in ("first", "second", "query_norm", "key_norm")),
            *(_linear(named[name]) for name in _MAPS),
            _Memory(kind, ctypes.addressof(output)),
            scaling,
        )
        self.address = ctypes.addressof(self._layer)

    @staticmethod
    def _check(weights: LayerWeights, heads: int, kv_heads: int, size: int) -> None:
        D, inner = weights.query.columns, weights.gate.rows
        due = {
            "query": (heads * size, D),
            "key": (kv_heads * size, D),
            "value": (kv_heads * size, D),
            "output": (D, heads * size),
            "gate": (inner, D),
            "up": (inner, D),
            "down": (D, inner),
        }
        maps = {name: getattr(weights, name) for name in due}
        shapes = {name: (each.rows, each.columns) for name, each in maps.items()}
        halved = [each for each in maps.values() if isinstance(each.weight, Tensor) and each.weight.element_size() == 2]
        whole = all(each.columns % _LANES == 0 for each in maps.values())
        if shapes != due or heads % kv_heads or size % PANEL_ROWS or not whole:
            raise ShapeError(f"the kernel cannot take a layer with maps of the shapes {shapes}")
        if any(each.columns % PANEL_ROWS for each in halved):
            raise ShapeError(f"a kernel takes bfloat16 with columns that are a multiple of {PANEL_ROWS}")


class TokenTable:
    """Tokens of several texts on their way through layers: a column for each field of `Token`.

    Args:
        numbers: `[L, B, fields]` int64; zeros to begin with, which are the `None` of an address.
    """

    _columns: ClassVar = {field[0]: number for number, field in enumerate(Token._fields_)}

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers
        self._tensors: list[Tensor] = []  # whose addresses are noted

    def set(self, **fields: Tensor | int) -> None:
        """Sets fields.

        Args:
            **fields: Numbers or addresses, `[L, B]` or what spreads to that.
        """
        for name, value in fields.items():
            self.numbers[..., self._columns[name]] = value

    def point(self, **fields: Tensor | None) -> None:
        """Sets fields to addresses.

        Args:
            **fields: Tensors `[L, B, ...]` whose entries lie dense; nothing is set for `None`.
        """
        for name, tensor in fields.items():
            if tensor is not None:
                steps = torch.arange(tensor.size(0))[:, None] * tensor.stride(0)
                steps = steps + torch.arange(tensor.size(1)) * tensor.stride(1)
                self.set(**{name: tensor.data_ptr() + tensor.element_size() * steps})
                self._tensors.append(tensor)


def run_layers(layers: Sequence[DescribedLayer], tokens: Sequence[Token]) -> None:
    """Takes a token through consecutive layers: writes their outputs, their slots, and what their attention reads.

    Args:
        layers: The layers.
        tokens: The token on its way through each; what a layer gives is the input of the next.
    """
    laid = (Token * len(layers))(*tokens)
    _run(layers, 1, ctypes.addressof(laid))


def run_table(layers: Sequence[DescribedLayer], table: TokenTable) -> None:
    """Takes the tokens of several texts through consecutive layers, as `run_layers` takes one.

    Args:
        layers: The layers.
        table: The tokens on their way through each.
    """
    _run(layers, table.numbers.size(1), table.numbers.data_ptr())


def _run(layers: Sequence[DescribedLayer], tokens: int, laid: int) -> None:
    addresses = (_POINTER * len(layers))(*(layer.address for layer in layers))
    arguments = len(layers), tokens, ctypes.addressof(addresses), laid
    _TEAM.run(torch.get_num_threads(), lambda threads: native._run("ahn_decode_layers", *arguments, threads))


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _norm(norm: NormWeight | None) -> _Norm:
    return _Norm(None, 0.0) if norm is None else _Norm(norm.weight.data_ptr(), norm.epsilon)


def _output(memory: native.OutputWeights | LinearizedWeights) -> tuple[int, ctypes.Structure]:
    if isinstance(memory, LinearizedWeights):
        return _LINEARIZED, _LinearizedOutput(*map(_address, memory))
    *tensors, scale, per_head, key_first = memory
    return _GATED, _GatedOutput(*map(_address, tensors), scale, int(per_head), int(key_first))


def _linear(linear: LinearWeight) -> _Weight:
    weight = linear.weight
    if isinstance(weight, DescribedWeight):
        kind, address = _PACKED, ctypes.addressof(weight.structure)
    else:
        kind, address = int(weight.element_size() == 2), weight.data_ptr()
    return _Weight(kind, linear.rows, linear.columns, address, _address(linear.bias))
