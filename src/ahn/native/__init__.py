"""Kernels in C for float32 on a CPU, without gradients. Each has an equivalent in torch.

They are compiled for this machine when the first tensors come that they can work on. Where that is not possible (no C
compiler, Windows), or where `AHN_NATIVE=0` is set, everything runs in torch, more slowly.

Legend of shapes: B batch, T tokens, H query heads, G key/value heads, K key size, V value size, D hidden size,
X states, N places of a segment.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ahn.native import build
from ahn.native.checks import check_groups, check_shapes

__all__ = [
    "MOST_VECTORS",
    "OutputWeights",
    "Segment",
    "attend",
    "attend_one",
    "can_decode_add",
    "can_multiply",
    "decode_add_",
    "linear",
    "linear_each",
    "ready",
    "scan",
    "scan_state_space",
    "switched_off",
    "why_not",
    "write_delta_",
    "write_state_space_",
]

_log = logging.getLogger(__name__)
_off: ContextVar[bool] = ContextVar("ahn_native_off", default=False)
_INT, _FLOAT, _POINTER = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
_ARGUMENTS = {
    "ahn_scan": [*[_INT] * 6, *[_POINTER] * 7, ctypes.c_int],
    "ahn_attend": [*[_INT] * 10, _FLOAT, _POINTER, _INT, _POINTER],
    "ahn_attend_one": [*[_INT] * 6, _FLOAT, _POINTER, _INT, _POINTER],
    "ahn_write_delta": [*[_INT] * 3, *[_POINTER] * 5],
    "ahn_write_state_space": [*[_INT] * 3, *[_POINTER] * 5],
    "ahn_linear": [*[_INT] * 3, *[_POINTER] * 4],
    "ahn_linear_each": [*[_INT] * 5, *[_POINTER] * 3],
    "ahn_decode_add": [*[_INT] * 5, *[_POINTER] * 7, _FLOAT, ctypes.c_int, ctypes.c_int, _POINTER],
}

MOST_VECTORS = 4
"""Vectors that `linear` multiplies at once."""


class Segment(NamedTuple):
    """Keys and values of consecutive places, with the queries that read them.

    Attributes:
        queries: `[B, H, T, K]`.
        keys: `[B, G, N, K]`, the last dimension dense.
        values: `[B, G, N, V]`, the last dimension dense.
        first: Index of the token at the first place; the others follow it.
        window: A query reads that many tokens up to its own.
        visible: For places without an order, in place of `first` and `window`: index of the first token whose query
            reads each, and of the first whose query no longer does, `[B or 1, N]` int64 each.
        mask: For a single query: added to its scores, `[B, N]`, or `None`.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    first: int = 0
    window: int = 2**62
    visible: tuple[Tensor, Tensor] | None = None
    mask: Tensor | None = None


class _Segment(ctypes.Structure):
    """`Segment` of attention.c."""

    _fields_ = (
        *((name, _POINTER) for name in ("queries", "keys", "values")),
        *((name, _INT) for name in ("key_batch", "key_head", "key_place", "value_batch", "value_head", "value_place")),
        *((name, _INT) for name in ("count", "first", "window")),
        *((name, _POINTER) for name in ("visible_from", "visible_until")),
        ("visible_batch", _INT),
        ("mask", _POINTER),
        ("mask_batch", _INT),
    )


@contextmanager
def switched_off() -> Iterator[None]:
    """Runs everything of this thread or task in torch; meant for tests and comparisons."""
    token = _off.set(True)
    try:
        yield
    finally:
        _off.reset(token)


def ready(*tensors: Tensor, sizes: Sequence[int] = ()) -> bool:
    """Whether the kernels can work on tensors.

    Args:
        *tensors: All that they would be given.
        sizes: Sizes of keys and values, which must fill whole vectors.

    Returns:
        True for plain float32 tensors on a CPU that need no gradient, if the kernels could be compiled.
    """
    if torch.compiler.is_compiling():
        return False
    for tensor in tensors:
        if tensor.dtype is not torch.float32 or not tensor.is_cpu or type(tensor) not in (Tensor, nn.Parameter):
            return False
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    if _off.get() or not isinstance(_kernels(), ctypes.CDLL):
        return False
    return all(size % _panel() == 0 for size in sizes)


def why_not() -> str | None:
    """Why there are no kernels on this machine, or `None` where there are; compiles them if need be."""
    kernels = _kernels()
    return None if isinstance(kernels, ctypes.CDLL) else kernels


def scan(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, log_decay_BTH: Tensor | None, write_BTH: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The (gated) delta rule over tokens; see `ahn.ops.gated_delta_rule`.

    Args:
        q_BTHK: Queries.
        k_BTGK: Keys.
        v_BTGV: Values.
        log_decay_BTH: Log decay per token; `None` where nothing decays.
        write_BTH: Writing strength per token.
        state: State before the first token, `[B, H, K, V]`. It is not changed.

    Returns:
        The outputs, `[B, T, H, V]`, and the state after the last token.
    """
    return _scan(q_BTHK, k_BTGK, v_BTGV, log_decay_BTH, write_BTH, state, is_delta=True)


def scan_state_space(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, log_decay_BTH: Tensor, step_BTH: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The state space recurrence over tokens, state `[B, H, V, K]`; see `ahn.ops.state_space`."""
    return _scan(q_BTHK, k_BTGK, v_BTGV, log_decay_BTH, step_BTH, state, is_delta=False)


def _scan(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, write: Tensor, state: Tensor, *, is_delta: bool
) -> tuple[Tensor, Tensor]:
    B, T, H, K = q.shape
    G, V = v.shape[2:]
    check_groups(H, G)
    check_shapes((k, (B, T, G, K)), (v, (B, T, G, V)), (log_decay, (B, T, H)), (write, (B, T, H)))
    check_shapes((state, (B, H, K, V) if is_delta else (B, H, V, K)))
    after = state.clone(memory_format=torch.contiguous_format)
    out = q.new_empty(B, T, H, V)
    q, k, v, write = (x.contiguous() for x in (q, k, v, write))
    log_decay = None if log_decay is None else log_decay.contiguous()
    _run("ahn_scan", B, T, H, G, K, V, q, k, v, log_decay, write, after, out, int(is_delta))
    return out, after


def attend(segments: Sequence[Segment], seen: int, scaling: float) -> Tensor:
    """One softmax of many queries over several segments of keys.

    Args:
        segments: The keys; every query reads at least one of them. The queries of all lie in memory alike.
        seen: Index of the first query's token.
        scaling: Factor on the products of queries and keys.

    Returns:
        `[B, T, H, V]`.
    """
    q_BHTK, v_BGNV = segments[0].queries, segments[0].values
    B, H, T, K = q_BHTK.shape
    G, V = v_BGNV.size(1), v_BGNV.size(3)
    out = q_BHTK.new_empty(B, T, H, V)
    described = _described(segments, (B, H, T, K), G, V)
    strides = q_BHTK.stride()[:3]
    _run("ahn_attend", B, T, H, G, K, V, *strides, seen, scaling, ctypes.addressof(described), len(segments), out)
    return out


def attend_one(segments: Sequence[Segment], seen: int, scaling: float) -> Tensor:
    """One softmax of a single query over several segments of keys; segments without `visible` are read whole.

    Args:
        segments: The keys; the queries are `[B, H, 1, K]`, dense.
        seen: Index of the query's token.
        scaling: Factor on the products of queries and keys.

    Returns:
        `[B, 1, H, V]`.
    """
    q_BH1K, v_BGNV = segments[0].queries, segments[0].values
    B, H, _, K = q_BH1K.shape
    G, V = v_BGNV.size(1), v_BGNV.size(3)
    out = q_BH1K.new_empty(B, 1, H, V)
    described = _described(segments, (B, H, 1, K), G, V)
    _run("ahn_attend_one", B, H, G, K, V, seen, scaling, ctypes.addressof(described), len(segments), out)
    return out


def write_delta_(k_XK: Tensor, v_XV: Tensor, decay_X: Tensor | None, write_X: Tensor, state_XKV: Tensor) -> None:
    """Writes one token into states of the (gated) delta rule, dense, in place; see `ahn.ops.write_delta_`."""
    X, K, V = state_XKV.shape
    check_shapes((k_XK, (X, K)), (v_XV, (X, V)), (decay_X, (X,)), (write_X, (X,)))
    k, v, write = k_XK.contiguous(), v_XV.contiguous(), write_X.contiguous()
    decay = None if decay_X is None else decay_X.contiguous()
    _run("ahn_write_delta", X, K, V, k, v, decay, write, state_XKV)


def write_state_space_(k_XK: Tensor, v_XV: Tensor, decay_X: Tensor, step_X: Tensor, state_XVK: Tensor) -> None:
    """Writes one token into states of the state space recurrence, dense, in place; see `ahn.ops.write_state_space_`."""
    X, V, K = state_XVK.shape
    check_shapes((k_XK, (X, K)), (v_XV, (X, V)), (decay_X, (X,)), (step_X, (X,)))
    k, v, decay, step = (x.contiguous() for x in (k_XK, v_XV, decay_X, step_X))
    _run("ahn_write_state_space", X, K, V, k, v, decay, step, state_XVK)


class OutputWeights(NamedTuple):
    """The output of a memory: its weights, its kind of norm, and the layout of the state that it reads.

    Attributes:
        gate_HD: Weight of the gate per head, `[H, D]`.
        gate_bias_H: Its bias, `[H]`, or `None`.
        norm: Weight of the norm, `[V]` with `per_head`, else `[H * V]`.
        o_proj_HVV: Output projection, `[H, V, V]`.
        scale: Length to which queries are brought.
        per_head: Whether the norm is taken over each head and before the gate, rather than over all heads and after it.
        key_first: Whether the state is `[B, H, K, V]`, rather than `[B, H, V, K]`.
    """

    gate_HD: Tensor
    gate_bias_H: Tensor | None
    norm: Tensor
    o_proj_HVV: Tensor
    scale: float
    per_head: bool
    key_first: bool


def can_decode_add(local_B1HV: Tensor, q_B1HK: Tensor, x_B1D: Tensor, state: Tensor, weights: OutputWeights) -> bool:
    """Whether `decode_add_` can work on these."""
    dense = [x for x in (local_B1HV, *weights[:4]) if x is not None]
    sizes = q_B1HK.size(3), local_B1HV.size(3)
    return all(x.is_contiguous() for x in dense) and ready(*dense, q_B1HK, x_B1D, state, sizes=sizes)


def decode_add_(local_B1HV: Tensor, q_B1HK: Tensor, x_B1D: Tensor, state: Tensor, weights: OutputWeights) -> None:
    """Adds what a memory answers to one query per row, in place; see `ahn.ops.decode_add_`.

    Args:
        local_B1HV: What to add to, dense.
        q_B1HK: Queries.
        x_B1D: Input of the attention layer.
        state: `[B, H, K, V]` with `weights.key_first`, else `[B, H, V, K]`.
        weights: The output.
    """
    B, _, H, K = q_B1HK.shape
    V, D = local_B1HV.size(3), x_B1D.size(2)
    check_shapes((local_B1HV, (B, 1, H, V)), (x_B1D, (B, 1, D)), (weights.gate_HD, (H, D)))
    check_shapes((state, (B, H, K, V) if weights.key_first else (B, H, V, K)), (weights.gate_bias_H, (H,)))
    check_shapes((weights.norm, (V,) if weights.per_head else (H * V,)), (weights.o_proj_HVV, (H, V, V)))
    q, x, state = q_B1HK.contiguous(), x_B1D.contiguous(), state.contiguous()
    *tensors, scale, per_head, key_first = weights
    _run("ahn_decode_add", B, H, K, V, D, q, x, state, *tensors, scale, int(per_head), int(key_first), local_B1HV)


def can_multiply(vectors: int, size: int) -> bool:
    """Whether `linear` and `linear_each` take this number of vectors of this size."""
    return vectors <= MOST_VECTORS and size % 8 == 0


def linear(x: Tensor, weight_ND: Tensor, bias_N: Tensor | None) -> Tensor:
    """A linear map of a few vectors, `[..., N]`.

    Args:
        x: At most `MOST_VECTORS` vectors, `[..., D]`, D a multiple of 8.
        weight_ND: The weight, dense.
        bias_N: The bias, if there is one.
    """
    N, D = weight_ND.shape
    check_shapes((x, (*x.shape[:-1], D)), (bias_N, (N,)))
    x = x.contiguous()
    out = x.new_empty(*x.shape[:-1], N)
    _run("ahn_linear", x.numel() // D, N, D, x, weight_ND, bias_N, out)
    return out


def linear_each(x_LMD: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Several linear maps of each of several layers, `[L, maps, M, N]`.

    Args:
        x_LMD: At most `MOST_VECTORS` vectors of each layer, D a multiple of 8.
        weights: The layers' maps, those of the first layer first, `[N, D]` each.
    """
    L, M, D = x_LMD.shape
    N = weights[0].size(0)
    maps = len(weights) // L
    check_shapes(*((weight, (N, D)) for weight in weights))
    weights = [weight.contiguous() for weight in weights]
    x, out = x_LMD.contiguous(), x_LMD.new_empty(L, maps, M, N)
    addresses = (_POINTER * len(weights))(*(weight.data_ptr() for weight in weights))
    _run("ahn_linear_each", L, maps, M, N, D, x, ctypes.addressof(addresses), out)
    return out


def _described(
    segments: Sequence[Segment], queries: tuple[int, int, int, int], G: int, V: int
) -> ctypes.Array[_Segment]:
    """Segments as the kernels take them; the tensors must outlive the call.

    Args:
        segments: The segments.
        queries: Shape of the queries of each, `[B, H, T, K]`.
        G: Key/value heads.
        V: Value size.

    Raises:
        ShapeError: A tensor has another shape.
    """
    B, H, _, K = queries
    check_groups(H, G)
    for segment in segments:
        N = segment.keys.size(2)
        check_shapes((segment.queries, queries), (segment.keys, (B, G, N, K)), (segment.values, (B, G, N, V)))
        for per_row in (*(segment.visible or ()), segment.mask):
            check_shapes((per_row, (1 if per_row is not None and per_row.size(0) == 1 else B, N)))
    return (_Segment * len(segments))(*map(_addresses, segments))


def _addresses(segment: Segment) -> _Segment:
    queries, keys, values, first, window, visible, mask = segment
    visible_from, visible_until = visible or (None, None)
    return _Segment(
        queries.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        *keys.stride()[:3],
        *values.stride()[:3],
        keys.size(2),
        first,
        window,
        None if visible_from is None else visible_from.data_ptr(),
        None if visible_until is None else visible_until.data_ptr(),
        0 if visible_from is None or visible_from.size(0) == 1 else visible_from.stride(0),
        None if mask is None else mask.data_ptr(),
        0 if mask is None or mask.size(0) == 1 else mask.stride(0),
    )


def _run(name: str, *arguments: Any) -> None:
    """Calls a kernel; tensors go as addresses."""
    plain = (x.data_ptr() if isinstance(x, Tensor) else x for x in arguments)
    if getattr(_kernels(), name)(*plain):
        raise MemoryError(f"{name} found no memory to work in")


@lru_cache(maxsize=1)
def _kernels() -> ctypes.CDLL | str:
    """The kernels, or why there are none."""
    if os.environ.get("AHN_NATIVE") == "0":
        return "AHN_NATIVE=0 is set"
    try:
        kernels = build.load()
    except build.CannotBuild as error:
        _log.warning("the CPU kernels are not used, which is slower but changes no result: %s", error)
        return str(error)
    for name, arguments in _ARGUMENTS.items():
        getattr(kernels, name).argtypes = arguments
    for name in ("ahn_write_delta", "ahn_write_state_space", "ahn_linear", "ahn_linear_each"):
        getattr(kernels, name).restype = None
    return kernels


@lru_cache(maxsize=1)
def _panel() -> int:
    """Numbers that a size must be a multiple of."""
    panel: int = _kernels().ahn_panel()  # type: ignore[union-attr]
    return panel
