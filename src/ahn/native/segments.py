"""Segments of keys as the kernels of attention take them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ahn.native.checks import check_groups, check_shapes

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""What numbers keys and values may be, as the kernels count them; those of many queries are float32."""

_INT, _POINTER = ctypes.c_int64, ctypes.c_void_p


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
        rows: For a single query: where the keys and values of each row of the batch lie in theirs, `[B]` int64; `None`
            where they have the rows of the batch.
        counts: For a single query: how many of the places each row reads, `[B]` int64; `None` for all.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    first: int = 0
    window: int = 2**62
    visible: tuple[Tensor, Tensor] | None = None
    mask: Tensor | None = None
    rows: Tensor | None = None
    counts: Tensor | None = None


class _Segment(ctypes.Structure):
    """`Segment` of attention.c."""

    _fields_ = (
        *((name, _POINTER) for name in ("queries", "keys", "values")),
        *(
            (name, _INT)
            for name in ("kind", "key_batch", "key_head", "key_place", "value_batch", "value_head", "value_place")
        ),
        *((name, _INT) for name in ("count", "first", "window")),
        *((name, _POINTER) for name in ("visible_from", "visible_until")),
        ("visible_batch", _INT),
        ("mask", _POINTER),
        ("mask_batch", _INT),
        *((name, _POINTER) for name in ("rows", "counts")),
    )


def describe(segments: Sequence[Segment], queries: tuple[int, int, int, int], G: int, V: int) -> ctypes.Array[_Segment]:
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
        N, rows = segment.keys.size(2), B if segment.rows is None else segment.keys.size(0)
        check_shapes((segment.queries, queries), (segment.keys, (rows, G, N, K)), (segment.values, (rows, G, N, V)))
        check_shapes((segment.rows, (B,)), (segment.counts, (B,)))
        for per_row in (*(segment.visible or ()), segment.mask):
            check_shapes((per_row, (1 if per_row is not None and per_row.size(0) == 1 else B, N)))
    return (_Segment * len(segments))(*map(_addresses, segments))


def _addresses(segment: Segment) -> _Segment:
    queries, keys, values, first, window, visible, mask, rows, counts = segment
    visible_from, visible_until = visible or (None, None)
    return _Segment(
        queries.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        KINDS[keys.dtype],
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
        *(None if each is None else each.data_ptr() for each in (rows, counts)),
    )
