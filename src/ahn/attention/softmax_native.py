"""Local attention by the kernels in C: what they are to read. See `ahn.native`; `softmax.py` is the same in torch.

Legend of shapes: B batch, T queries, H query heads, G key/value heads, K key size, V value size, S sinks, N slots.
"""

from __future__ import annotations

import torch

from ahn.attention.lookup import Lookup
from ahn.native import Segment, attend, attend_one, ready
from ahn.tokens import View


def compiled_attention(lookup: Lookup, scaling: float) -> torch.Tensor | None:
    """As `ahn.attention.softmax.local_attention` with a plain softmax, or `None` where the kernels cannot do it.

    Args:
        lookup: Queries, and what they may read.
        scaling: Factor on the products of queries and keys.

    Returns:
        `[B, T, H, V]`.
    """
    view, plan, window = lookup.view, lookup.plan, lookup.window
    tensors = [lookup.queries, view.local.keys, view.local.values, view.sinks.keys, view.sinks.values]
    tensors += [] if lookup.sink_queries is None else [lookup.sink_queries]
    tensors += [] if view.extra is None else [view.extra.keys, view.extra.values]
    if not ready(*tensors, sizes=(view.local.keys.size(3), view.local.values.size(3))):
        return None
    if view.ordered and plan.padding and lookup.first < plan.padding.most + view.sinks.length + window:
        return None
    near_q, far_q = _queries(lookup)
    beside = _beside(view, far_q)
    if not view.ordered:
        mask = plan.slot_mask(view, lookup.seen, window, near_q)
        return attend_one([*_ring(view, near_q, far_q, mask), *beside], lookup.first, scaling)
    sinks = Segment(far_q, _dense(view.sinks.keys), _dense(view.sinks.values))
    local = Segment(near_q, _dense(view.local.keys), _dense(view.local.values), first=view.first, window=window)
    return attend([sinks, *beside, local], lookup.first, scaling)


def _queries(lookup: Lookup) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries for the window and those for sinks and extra keys, which may be the same, alike in memory."""
    near = _dense(lookup.queries) if lookup.view.ordered else lookup.queries.contiguous()
    far = near if lookup.sink_queries is None else lookup.sink_queries
    return (near, far) if far.stride() == near.stride() else (near.contiguous(), far.contiguous())


def _ring(view: View, near_q: torch.Tensor, far_q: torch.Tensor, mask_B11N: torch.Tensor | None) -> list[Segment]:
    """The slots of a ring as they lie, the sinks apart where they have a query of their own."""
    keys, values = _dense(view.local.keys), _dense(view.local.values)
    mask = None if mask_B11N is None else mask_B11N[:, 0, 0]
    sinks = view.sinks.length
    if far_q is near_q or sinks == 0:
        return [Segment(near_q, keys, values, mask=mask)]
    parts = ((far_q, slice(0, sinks)), (near_q, slice(sinks, None)))
    return [
        Segment(query, keys[:, :, span], values[:, :, span], mask=None if mask is None else mask[:, span])
        for query, span in parts
    ]


def _beside(view: View, far_q: torch.Tensor) -> list[Segment]:
    """Keys of a later store."""
    if view.extra is None:
        return []
    keys, values, visible_from, visible_until = view.extra
    return [
        Segment(far_q, _dense(keys), _dense(values), visible=(visible_from.contiguous(), visible_until.contiguous()))
    ]


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with the numbers of a query, key or value side by side."""
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()
