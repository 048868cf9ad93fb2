"""Local attention by the kernels in C: what they are to read. See `ahn.native`; `softmax.py` is the same in torch.

Legend of shapes: B batch, T queries, H query heads, G key/value heads, K key size, V value size, S sinks, N slots.
"""

from __future__ import annotations

import torch

from ahn import native
from ahn.attention.call import LocalRead
from ahn.attention.masks import slot_mask
from ahn.native import Segment
from ahn.tokens import Attended, VisibleKV


def can_attend(local: LocalRead) -> bool:
    """Whether the kernels can do what `attend` does."""
    call, view, query, sink_query, softmax, _ = local
    kv = _keys_and_values(view)
    if kv[0].dtype is not torch.float32:
        return can_attend_halves(local)
    tensors = [query, *kv, *([] if sink_query is None else [sink_query])]
    if not softmax.is_plain or not native.ready(*tensors, sizes=_sizes(view)):
        return False
    padded = call.padding is not None and local.first < call.padding.most + view.sinks.length + view.window
    return not (view.ordered and padded)


def can_attend_halves(local: LocalRead) -> bool:
    """Whether the kernels can read keys and values that are stored in half precision: those of a single query."""
    _, view, query, sink_query, softmax, _ = local
    if view.ordered or not softmax.is_plain:
        return False
    kv = _keys_and_values(view)
    halved = kv[0].dtype in (torch.bfloat16, torch.float16)
    alike = all(each.dtype is kv[0].dtype and each.is_cpu and type(each) is torch.Tensor for each in kv)
    queries = [query, *([] if sink_query is None else [sink_query])]
    gradients = torch.is_grad_enabled() and any(each.requires_grad for each in kv)
    return halved and alike and not gradients and native.ready(*queries, sizes=_sizes(view))


def _keys_and_values(view: VisibleKV) -> list[torch.Tensor]:
    extra = [] if view.extra is None else [view.extra.keys, view.extra.values]
    return [view.local.keys, view.local.values, view.sinks.keys, view.sinks.values, *extra]


def _sizes(view: VisibleKV) -> tuple[int, int]:
    return view.local.keys.size(3), view.local.values.size(3)


def attend(local: LocalRead) -> Attended:
    """As `ahn.attention.softmax.attend`; the softmax is a plain one."""
    call, view, query, sink_query, softmax, wants_log_sum = local
    window_q, sink_q = _queries(view, query, sink_query)
    extra = _extra(view, sink_q)
    B, H, T, _ = query.shape
    log_sum_BTH = query.new_empty(B, T, H) if wants_log_sum else None
    if not view.ordered:
        ring = _ring(view, window_q, sink_q, slot_mask(call, view, window_q))
        return Attended(native.attend_one([*ring, *extra], local.first, softmax.scaling, log_sum_BTH), log_sum_BTH)
    sinks = Segment(sink_q, _dense(view.sinks.keys), _dense(view.sinks.values))
    window = Segment(window_q, _dense(view.local.keys), _dense(view.local.values), first=view.first, window=view.window)
    segments = [sinks, *extra, window]
    return Attended(native.attend(segments, local.first, softmax.scaling, log_sum_BTH), log_sum_BTH)


def _queries(
    view: VisibleKV, query: torch.Tensor, sink_query: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries for the window and those for sinks and extra keys, which may be the same, alike in memory."""
    window_q = _dense(query) if view.ordered else query.contiguous()
    sink_q = window_q if sink_query is None else sink_query
    return (window_q, sink_q) if sink_q.stride() == window_q.stride() else (window_q.contiguous(), sink_q.contiguous())


def _ring(
    view: VisibleKV, window_q: torch.Tensor, sink_q: torch.Tensor, mask_B11N: torch.Tensor | None
) -> list[Segment]:
    """The slots of a ring as they lie, the sinks apart where they have a query of their own."""
    keys, values = _dense(view.local.keys), _dense(view.local.values)
    mask = None if mask_B11N is None else mask_B11N[:, 0, 0]
    sinks = view.sinks.length
    if sink_q is window_q or sinks == 0:
        return [Segment(window_q, keys, values, mask=mask)]
    parts = ((sink_q, slice(0, sinks)), (window_q, slice(sinks, None)))
    return [
        Segment(query, keys[:, :, span], values[:, :, span], mask=None if mask is None else mask[:, span])
        for query, span in parts
    ]


def _extra(view: VisibleKV, sink_q: torch.Tensor) -> list[Segment]:
    """Keys of a later store."""
    if view.extra is None:
        return []
    keys, values, visible_from, visible_until = view.extra
    return [
        Segment(sink_q, _dense(keys), _dense(values), visible=(visible_from.contiguous(), visible_until.contiguous()))
    ]


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with the numbers of a query, key or value side by side."""
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()
