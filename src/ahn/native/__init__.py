"""Kernels in C that compute in float32 on a CPU. Each has an equivalent in torch; those with gradients say so.

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

from ahn.errors import ShapeError
from ahn.native import build
from ahn.native.checks import check_shapes
from ahn.native.segments import Segment, describe

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
    "ahn_scan_back": [*[_INT] * 6, *[_POINTER] * 13, ctypes.c_int],
    "ahn_attend": [*[_INT] * 10, _FLOAT, _POINTER, _INT, *[_POINTER] * 2],
    "ahn_attend_one": [*[_INT] * 6, _FLOAT, _POINTER, _INT, *[_POINTER] * 2],
    "ahn_write_delta": [*[_INT] * 3, *[_POINTER] * 7],
    "ahn_write_state_space": [*[_INT] * 3, *[_POINTER] * 7],
    "ahn_write_linearized": [*[_INT] * 6, *[_POINTER] * 7],
    "ahn_linear": [*[_INT] * 3, *[_POINTER] * 4],
    "ahn_linear_each": [*[_INT] * 5, *[_POINTER] * 3],
    "ahn_decode_add": [*[_INT] * 5, *[_POINTER] * 8, _FLOAT, ctypes.c_int, ctypes.c_int, _POINTER],
    "ahn_decode_add_linearized": [*[_INT] * 5, *[_POINTER] * 14],
    "ahn_decode_layers": [_INT, _INT, _POINTER, _POINTER, ctypes.c_int],
    "ahn_packed_multiply": [*[_INT] * 2, *[_POINTER] * 4],
    "ahn_packed_unpack": [*[_INT] * 2, *[_POINTER] * 2],
    "ahn_half_multiply": [*[_INT] * 3, *[_POINTER] * 4],
    "ahn_take_slots": [*[_INT] * 5, *[_POINTER] * 2],
    "ahn_put_slots": [*[_INT] * 5, *[_POINTER] * 2],
    "ahn_divergence": [*[_INT] * 2, *[_POINTER] * 5, ctypes.c_int],
    "ahn_divergence_back": [*[_INT] * 2, *[_POINTER] * 6, ctypes.c_int],
    "ahn_norm": [*[_INT] * 2, *[_FLOAT] * 2, *[_POINTER] * 4],
    "ahn_norm_back": [*[_INT] * 3, *[_FLOAT] * 2, *[_POINTER] * 6],
    "ahn_gated": [_INT, *[_POINTER] * 3],
    "ahn_gated_back": [_INT, *[_POINTER] * 5],
}
_CANNOT_FAIL = (
    "ahn_write_delta",
    "ahn_write_state_space",
    "ahn_write_linearized",
    "ahn_decode_add_linearized",
    "ahn_linear",
    "ahn_linear_each",
    "ahn_packed_unpack",
    "ahn_half_multiply",
    "ahn_take_slots",
    "ahn_put_slots",
    "ahn_divergence",
    "ahn_divergence_back",
    "ahn_norm",
    "ahn_norm_back",
    "ahn_gated",
    "ahn_gated_back",
)

MOST_VECTORS = 4
"""Vectors that `linear` multiplies at once."""


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


def attend(segments: Sequence[Segment], seen: int, scaling: float, log_sum_BTH: Tensor | None = None) -> Tensor:
    """One softmax of many queries over several segments of keys.

    Args:
        segments: The keys; every query reads at least one of them. The queries of all lie in memory alike.
        seen: Index of the first query's token.
        scaling: Factor on the products of queries and keys.
        log_sum_BTH: Where to put the logarithm of the sum of exp(score) of each query, dense; `None` for nowhere.

    Returns:
        `[B, T, H, V]`.
    """
    q_BHTK, v_BGNV = segments[0].queries, segments[0].values
    B, H, T, K = q_BHTK.shape
    G, V = v_BGNV.size(1), v_BGNV.size(3)
    out = q_BHTK.new_empty(B, T, H, V)
    described = describe(segments, (B, H, T, K), G, V)
    check_shapes((log_sum_BTH, (B, T, H)))
    sizes = B, T, H, G, K, V, *q_BHTK.stride()[:3]
    _run("ahn_attend", *sizes, seen, scaling, ctypes.addressof(described), len(segments), out, log_sum_BTH)
    return out


def attend_one(segments: Sequence[Segment], seen: int, scaling: float, log_sum_B1H: Tensor | None = None) -> Tensor:
    """One softmax of a single query over several segments of keys; segments without `visible` are read whole.

    Args:
        segments: The keys; the queries are `[B, H, 1, K]`, dense.
        seen: Index of the query's token.
        scaling: Factor on the products of queries and keys.
        log_sum_B1H: As for `attend`.

    Returns:
        `[B, 1, H, V]`.
    """
    q_BH1K, v_BGNV = segments[0].queries, segments[0].values
    B, H, _, K = q_BH1K.shape
    G, V = v_BGNV.size(1), v_BGNV.size(3)
    out = q_BH1K.new_empty(B, 1, H, V)
    described = describe(segments, (B, H, 1, K), G, V)
    check_shapes((log_sum_B1H, (B, 1, H)))
    sizes = B, H, G, K, V
    _run("ahn_attend_one", *sizes, seen, scaling, ctypes.addressof(described), len(segments), out, log_sum_B1H)
    return out


def write_delta_(
    k_XK: Tensor,
    v_XV: Tensor,
    decay_X: Tensor | None,
    write_X: Tensor,
    state: Tensor,
    places_X: Tensor | None = None,
    former: Tensor | None = None,
) -> None:
    """Writes one token into states of the (gated) delta rule; see `ahn.ops.write_delta_`.

    Args:
        k_XK: Keys.
        v_XV: Values.
        decay_X: Share of each state that stays, or `None`.
        write_X: Writing strengths.
        state: The states, `[X, K, V]`, dense; with `places_X` of any shape `[..., K, V]`, each of them dense.
        places_X: Where each state begins, in numbers from the first of `state`, int64.
        former: The states before the token, of the shape of `state`, dense; `None` where `state` holds them.
    """
    (X, K), V = k_XK.shape, v_XV.size(1)
    _check_states(state, (X, K, V), places_X, former)
    check_shapes((v_XV, (X, V)), (decay_X, (X,)), (write_X, (X,)))
    k, v, write = k_XK.contiguous(), v_XV.contiguous(), write_X.contiguous()
    decay = None if decay_X is None else decay_X.contiguous()
    _run("ahn_write_delta", X, K, V, k, v, decay, write, places_X, former, state)


def write_state_space_(
    k_XK: Tensor,
    v_XV: Tensor,
    decay_X: Tensor,
    step_X: Tensor,
    state: Tensor,
    places_X: Tensor | None = None,
    former: Tensor | None = None,
) -> None:
    """Writes one token into states of the state space recurrence; see `ahn.ops.write_state_space_`.

    Args:
        k_XK: Keys.
        v_XV: Values.
        decay_X: Share of each state that stays.
        step_X: Step sizes.
        state: The states, `[X, V, K]`, dense; with `places_X` of any shape `[..., V, K]`, each of them dense.
        places_X: As for `write_delta_`.
        former: The same.
    """
    (X, K), V = k_XK.shape, v_XV.size(1)
    _check_states(state, (X, V, K), places_X, former)
    check_shapes((v_XV, (X, V)), (decay_X, (X,)), (step_X, (X,)))
    k, v, decay, step = (x.contiguous() for x in (k_XK, v_XV, decay_X, step_X))
    _run("ahn_write_state_space", X, K, V, k, v, decay, step, places_X, former, state)


def _check_states(state: Tensor, shape: tuple[int, int, int], places_X: Tensor | None, former: Tensor | None) -> None:
    if places_X is None:
        check_shapes((state, shape), (former, shape))
    else:
        check_shapes((places_X, shape[:1]), (state[(0,) * (state.dim() - 2)], shape[1:]))


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


def can_decode_add(
    local_B1HV: Tensor, q_B1HK: Tensor, x_B1D: Tensor, state: Tensor, weights: tuple[Tensor | float | None, ...]
) -> bool:
    """Whether `decode_add_`, or that of linearised attention, can work on these; with rows, their states are dense."""
    dense = [x for x in (local_B1HV, *weights) if isinstance(x, Tensor)]
    sizes = q_B1HK.size(3), local_B1HV.size(3)
    return all(x.is_contiguous() for x in dense) and ready(*dense, q_B1HK, x_B1D, state, sizes=sizes)


def decode_add_(
    local_B1HV: Tensor,
    q_B1HK: Tensor,
    x_B1D: Tensor,
    state: Tensor,
    weights: OutputWeights,
    rows_B: Tensor | None = None,
) -> None:
    """Adds what a memory answers to one query per row, in place; see `ahn.ops.decode_add_`.

    Args:
        local_B1HV: What to add to, dense.
        q_B1HK: Queries.
        x_B1D: Input of the attention layer.
        state: `[B, H, K, V]` with `weights.key_first`, else `[B, H, V, K]`.
        weights: The output.
        rows_B: Which row of `state` is whose, int64; `None` where they are those of the batch.
    """
    B, _, H, K = q_B1HK.shape
    V, D = local_B1HV.size(3), x_B1D.size(2)
    check_shapes((local_B1HV, (B, 1, H, V)), (x_B1D, (B, 1, D)), (weights.gate_HD, (H, D)))
    rows = B if rows_B is None else state.size(0)
    check_shapes((state, (rows, H, K, V) if weights.key_first else (rows, H, V, K)), (weights.gate_bias_H, (H,)))
    check_shapes(
        (weights.norm, (V,) if weights.per_head else (H * V,)), (weights.o_proj_HVV, (H, V, V)), (rows_B, (B,))
    )
    q, x = q_B1HK.contiguous(), x_B1D.contiguous()
    state = state.contiguous() if rows_B is None else state
    places_B = None if rows_B is None else rows_B * state.stride(0)
    *tensors, scale, per_head, key_first = weights
    _run(
        "ahn_decode_add",
        B,
        H,
        K,
        V,
        D,
        q,
        x,
        state,
        places_B,
        *tensors,
        scale,
        int(per_head),
        int(key_first),
        local_B1HV,
    )


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
    if any(weight.shape != (N, D) or not weight.is_contiguous() for weight in weights):
        raise ShapeError(f"a kernel takes dense maps that are alike, of shape {[N, D]}")
    x, out = x_LMD.contiguous(), x_LMD.new_empty(L, maps, M, N)
    addresses = (_POINTER * len(weights))(*(weight.data_ptr() for weight in weights))
    _run("ahn_linear_each", L, maps, M, N, D, x, ctypes.addressof(addresses), out)
    return out


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
    for name in _CANNOT_FAIL:
        getattr(kernels, name).restype = None
    return kernels


@lru_cache(maxsize=1)
def _panel() -> int:
    """Numbers that a size must be a multiple of."""
    panel: int = _kernels().ahn_panel()  # type: ignore[union-attr]
    return panel
