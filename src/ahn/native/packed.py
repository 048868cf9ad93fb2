"""Products with weights of 4 and 8 bits in groups, and of bfloat16, by vectors of float32 that are not rounded.

Legend of shapes: N rows of a weight, D columns, P panels of `PANEL_ROWS` rows, G groups of columns, W words of a group.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from ahn import native
from ahn.errors import ShapeError
from ahn.native.checks import check_shapes

PANEL_ROWS = 16
"""Rows of a weight that lie side by side."""
MOST_ROWS = 8
"""Vectors up to which `multiply` and `multiply_half` are faster than a product with the float32 weight."""

_INT, _POINTER = ctypes.c_int64, ctypes.c_void_p


class Packed(NamedTuple):
    """A weight in groups of columns: weight = scale * code + minimum.

    Attributes:
        codes: `[P, G, W, PANEL_ROWS]` int32. A word holds 32 / bits consecutive columns, the first in its lowest bits.
        scales: `[P, G, PANEL_ROWS]`, float16 or float32.
        minima: The same.
        bits: Of a code, 4 or 8.
    """

    codes: Tensor
    scales: Tensor
    minima: Tensor
    bits: int


class _Packed(ctypes.Structure):
    """`packed` of packed.c."""

    _fields_ = (
        *((name, _INT) for name in ("bits", "panels", "groups", "group_words", "halved")),
        *((name, _POINTER) for name in ("codes", "scales", "minima")),
    )


class DescribedWeight(NamedTuple):
    """A packed weight as the kernels take it, checked once; its tensors must outlive it.

    Attributes:
        structure: Sizes and addresses.
        rows: Rows that it has room for.
        columns: D.
    """

    structure: _Packed
    rows: int
    columns: int


def can_multiply(x: Tensor, weight: Tensor, *others: Tensor) -> bool:
    """Whether the kernels can work on vectors and weights.

    Args:
        x: The vectors.
        weight: The weight's numbers.
        *others: Its scales, minima and bias, where there are any.
    """
    tensors = (weight, *others)
    dense = all(each.is_cpu and each.is_contiguous() and type(each) in (Tensor, torch.nn.Parameter) for each in tensors)
    return dense and native.ready(x.detach())


def multiply(x: Tensor, weight: Packed | DescribedWeight, bias_N: Tensor | None, rows: int) -> Tensor:
    """A linear map of a few vectors, `[..., N]`.

    Args:
        x: The vectors, `[..., D]` float32.
        weight: The weight, dense.
        bias_N: The bias, if there is one.
        rows: N.

    Raises:
        ShapeError: A tensor has another shape.
    """
    described = _with_rows(weight, rows)
    check_shapes((x, (*x.shape[:-1], described.columns)), (bias_N, (rows,)))
    x = x.contiguous()
    out = x.new_empty(*x.shape[:-1], rows)
    vectors = x.numel() // described.columns
    native._run("ahn_packed_multiply", vectors, rows, ctypes.byref(described.structure), x, bias_N, out)
    return out


def unpack(weight: Packed | DescribedWeight, start: int, stop: int) -> Tensor:
    """Rows of a weight as float32, `[stop - start, D]`.

    Args:
        weight: The weight, dense.
        start: The first row, a multiple of `PANEL_ROWS`.
        stop: Behind the last row.

    Raises:
        ShapeError: A tensor has another shape, or the weight has no such rows.
    """
    described = _with_rows(weight, stop)
    if not 0 <= start <= stop or start % PANEL_ROWS:
        raise ShapeError(f"a weight has no rows {start} to {stop} that begin with a panel of {PANEL_ROWS}")
    out = torch.empty(stop - start, described.columns)
    native._run("ahn_packed_unpack", start // PANEL_ROWS, stop - start, ctypes.byref(described.structure), out)
    return out


def multiply_half(x: Tensor, weight_ND: Tensor, bias_N: Tensor | None) -> Tensor:
    """A linear map of a few vectors with a weight in bfloat16, `[..., N]`.

    Args:
        x: The vectors, `[..., D]` float32, D a multiple of `PANEL_ROWS`.
        weight_ND: The weight in bfloat16, dense.
        bias_N: The bias, if there is one.

    Raises:
        ShapeError: A tensor has another shape.
    """
    N, D = weight_ND.shape
    if weight_ND.dtype is not torch.bfloat16 or D % PANEL_ROWS or D == 0:
        raise ShapeError(f"a kernel takes bfloat16 and columns that are a multiple of {PANEL_ROWS}, not {D}")
    check_shapes((x, (*x.shape[:-1], D)), (bias_N, (N,)))
    x = x.contiguous()
    out = x.new_empty(*x.shape[:-1], N)
    native._run("ahn_half_multiply", x.numel() // D, N, D, x, weight_ND, bias_N, out)
    return out


def describe(weight: Packed) -> DescribedWeight:
    """A weight as the kernels take it.

    Raises:
        ShapeError: Its tensors do not fit together.
    """
    codes, scales, minima, bits = weight
    if codes.dim() != 4 or bits not in (4, 8) or codes.numel() == 0 or codes.dtype is not torch.int32:
        raise ShapeError(f"a kernel takes codes of 4 or 8 bits in words, not {bits} bits of shape {list(codes.shape)}")
    P, G, W, _ = codes.shape
    check_shapes((codes, (P, G, W, PANEL_ROWS)), (scales, (P, G, PANEL_ROWS)), (minima, (P, G, PANEL_ROWS)))
    if scales.dtype not in (torch.float16, torch.float32) or minima.dtype is not scales.dtype:
        raise ShapeError("a kernel takes scales and minima in float16 or in float32, both alike")
    addresses = (each.data_ptr() for each in (codes, scales, minima))
    structure = _Packed(bits, P, G, W, int(scales.dtype is torch.float16), *addresses)
    return DescribedWeight(structure, P * PANEL_ROWS, G * W * (32 // bits))


def _with_rows(weight: Packed | DescribedWeight, rows: int) -> DescribedWeight:
    """A weight as the kernels take it, if it has so many rows."""
    described = describe(weight) if isinstance(weight, Packed) else weight
    if not 0 <= rows <= described.rows:
        raise ShapeError(f"a weight with room for {described.rows} rows has no {rows} rows")
    return described
