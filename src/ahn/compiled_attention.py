"""Local attention by the kernels in C: what they are to read. See `ahn.native`; `ahn.softmax` is the same in torch.

Legend of shapes: B batch, T queries, H query heads, G key/value heads, K key size, V value size, S sinks, N slots.
"""

from __future__ import annotations

import torch

from ahn.cache.exact import View
from ahn.native import Stretch, attend, attend_one, ready
from ahn.plan import Plan


def compiled_attention(
    q_BHTK: torch.Tensor,
    sink_q_BHTK: torch.Tensor | None,
    view: View,
    plan: Plan,
    window: int,
    seen: int,
    scaling: float,
) -> torch.Tensor | None:
    """As `ahn.softmax.local_attention` with a plain softmax, or `None` where the kernels cannot do it.

    Args:
        q_BHTK: Queries of the new tokens, `[B, H, T, K]`.
        sink_q_BHTK: Queries for sinks and extra keys where these differ, or `None`.
        view: What the queries may read.
        plan: The call, for its padding.
        window: Tokens of the layer's window.
        seen: Tokens seen, the new ones included.
        scaling: Factor on the products of queries and keys.

    Returns:
        `[B, T, H, V]`.
    """
    tensors = [q_BHTK, view.local.keys, view.local.values, view.sinks.keys, view.sinks.values]
    tensors += [] if sink_q_BHTK is None else [sink_q_BHTK]
    tensors += [] if view.extra is None else [view.extra.keys, view.extra.values]
    if not ready(*tensors, sizes=(view.local.keys.size(3), view.local.values.size(3))):
        return None
    first = seen - q_BHTK.size(2)
    if view.ordered and plan.padding and first < plan.padding.most + view.sinks.length + window:
        return None
    near_q = q_BHTK.contiguous() if q_BHTK.stride(3) != 1 or not view.ordered else q_BHTK
    far_q = near_q if sink_q_BHTK is None else sink_q_BHTK
    if far_q.stride() != near_q.stride():
        near_q, far_q = near_q.contiguous(), far_q.contiguous()
    beside = _beside(view, far_q)
    if not view.ordered:
        mask = plan.slot_mask(view, seen, window, q_BHTK)
        return attend_one([*_ring(view, near_q, far_q, mask), *beside], first, scaling)
    sinks = Stretch(far_q, _dense(view.sinks.keys), _dense(view.sinks.values))
    local = Stretch(near_q, _dense(view.local.keys), _dense(view.local.values), first=view.first, reach=window)
    return attend([sinks, *beside, local], first, scaling)


def _ring(view: View, near_q: torch.Tensor, far_q: torch.Tensor, mask_B11N: torch.Tensor | None) -> list[Stretch]:
    """The slots of a ring as they lie, the sinks apart where they have a query of their own."""
    keys, values = _dense(view.local.keys), _dense(view.local.values)
    mask = None if mask_B11N is None else mask_B11N[:, 0, 0]
    sinks = view.sinks.length
    if far_q is near_q or sinks == 0:
        return [Stretch(near_q, keys, values, mask=mask)]
    parts = ((far_q, slice(0, sinks)), (near_q, slice(sinks, None)))
    return [
        Stretch(query, keys[:, :, span], values[:, :, span], mask=None if mask is None else mask[:, span])
        for query, span in parts
    ]


def _beside(view: View, far_q: torch.Tensor) -> list[Stretch]:
    """Keys of a later store."""
    if view.extra is None:
        return []
    keys, values, born, died = view.extra
    return [Stretch(far_q, _dense(keys), _dense(values), lives=(born.contiguous(), died.contiguous()))]


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with the numbers of a key or value side by side."""
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()
