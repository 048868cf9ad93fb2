"""Numbers rounded to 4 or 8 bits, in groups with a scale and a minimum, and how they lie in memory.

Legend of shapes: N rows of a weight, D columns, G groups of a row, P panels of rows, W words of a group.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ahn.errors import ShapeError
from ahn.native.packed import PANEL_ROWS, Packed

Bits = Literal[4, 8]
GROUP = 32
"""Columns that share a scale and a minimum, where nothing else says how many."""


class Groups(NamedTuple):
    """A weight as whole numbers: weight = scale * code + minimum.

    Attributes:
        codes_NGC: `[N, G, columns of a group]` uint8, from 0 to 2^bits - 1.
        scales_NG: Float16 or float32.
        minima_NG: The same.
    """

    codes_NGC: Tensor
    scales_NG: Tensor
    minima_NG: Tensor

    def dequantize(self) -> Tensor:
        """The weight, `[N, D]` float32."""
        scales, minima = self.scales_NG.float()[..., None], self.minima_NG.float()[..., None]
        return (self.codes_NGC * scales + minima).flatten(1)


def fits(columns: int) -> bool:
    """Whether rows of so many columns fall into groups."""
    return columns > 0 and columns % GROUP == 0


def round_to_groups(weight_ND: Tensor, bits: Bits) -> Groups:
    """Rounds a weight to the nearest of 2^bits numbers at even distances between the extremes of its group.

    Args:
        weight_ND: The weight, D a multiple of `GROUP`.
        bits: Of a code.

    Returns:
        The groups, with scales and minima in float16; in float32 where float16 cannot hold them.
    """
    weight_NGC = weight_ND.float().view(weight_ND.size(0), -1, GROUP)
    least, most = weight_NGC.aminmax(dim=-1)
    top = 2**bits - 1
    scales, minima = (most - least) / top, least
    if bool((scales.amax() < 6e4) & (minima.abs().amax() < 6e4)):
        minima = minima.half()
        # The range begins at the rounded minimum; a scale of float16 reaches the largest number, or nearly.
        scales = ((most - minima.float()) / top).clamp(min=0).half()
    steps = scales.float()[..., None]
    codes = ((weight_NGC - minima.float()[..., None]) / steps).nan_to_num(0, 0, 0).round_().clamp_(0, top)
    return Groups(codes.to(torch.uint8), scales, minima)


def pack(groups: Groups, bits: Bits) -> Packed:
    """Lays groups out as the kernels read them, with rows of zeros up to whole panels.

    Args:
        groups: The groups; the columns of each fill whole words of 32 bits.
        bits: Of a code.
    """
    codes, scales, minima = (_panels(part) for part in groups)
    if bits == 4:
        codes = codes[..., ::2] | codes[..., 1::2] << 4
    words = codes.contiguous().view(torch.int32)
    scales, minima = (part.transpose(1, 2).contiguous() for part in (scales, minima))
    return Packed(words.permute(0, 2, 3, 1).contiguous(), scales, minima, bits)


def pack_spans(parts: Iterable[Groups], rows: int, bits: Bits) -> Packed:
    """Packs spans of rows one after the other into one weight, so that no second copy of it is ever there.

    Args:
        parts: The spans in order, each but the last of whole panels.
        rows: Rows of all spans.
        bits: Of a code.

    Returns:
        The weight; its scales and minima are float32 where those of some spans are.
    """
    panels, whole = 0, None
    for part in parts:
        packed = pack(part, bits)
        if whole is None:
            codes, scales, minima = (_room(each, rows) for each in packed[:3])
            whole = Packed(codes, scales, minima, bits)
        if whole.scales.dtype is torch.float16 and packed.scales.dtype is torch.float32:
            whole = whole._replace(scales=whole.scales.float(), minima=whole.minima.float())
        span = slice(panels, panels + packed.codes.size(0))
        for room, each in zip(whole[:3], packed[:3], strict=True):
            room[span] = each
        panels = span.stop
    if whole is None or panels != whole.codes.size(0):
        raise ShapeError(f"spans of {panels * PANEL_ROWS} rows are no weight of {rows} rows")
    return whole


def _room(part: Tensor, rows: int) -> Tensor:
    """Room for a part of a packed weight, for all of its rows."""
    return part.new_empty(-(-rows // PANEL_ROWS), *part.shape[1:])


def spans(rows: int, columns: int, numbers: int) -> list[slice]:
    """Spans of rows that fill whole panels and hold about so many numbers each, at least one panel."""
    most = max(1, numbers // columns // PANEL_ROWS) * PANEL_ROWS
    return [slice(start, min(start + most, rows)) for start in range(0, rows, most)]


def unpack(packed: Packed, panels: Tensor | slice, lanes: Tensor | Sequence[int] | slice) -> Tensor:
    """Rows of a packed weight as float32, on any device.

    Args:
        packed: The weight.
        panels: Indices of the rows' panels, or a span of panels.
        lanes: Indices of the rows within their panels; all where the panels are a span.

    Returns:
        `[rows, D]`.
    """
    if isinstance(panels, slice):
        codes = packed.codes[panels].permute(0, 3, 1, 2).flatten(0, 1)
        scales, minima = (each[panels].transpose(1, 2).flatten(0, 1) for each in (packed.scales, packed.minima))
    else:
        codes, scales, minima = (
            packed.codes[panels, :, :, lanes],
            packed.scales[panels, :, lanes],
            packed.minima[panels, :, lanes],
        )
    shifts = torch.arange(0, 32, packed.bits, dtype=torch.int32, device=codes.device)
    values = ((codes[..., None] >> shifts) & (2**packed.bits - 1)).flatten(2)
    rows: Tensor = (values * scales.float()[..., None] + minima.float()[..., None]).flatten(1)
    return rows


def _panels(part: Tensor) -> Tensor:
    """Rows in panels, `[P, PANEL_ROWS, ...]`."""
    missing = -part.size(0) % PANEL_ROWS
    if missing:
        part = torch.cat((part, part.new_zeros(missing, *part.shape[1:])))
    panels: Tensor = part.unflatten(0, (-1, PANEL_ROWS))
    return panels
