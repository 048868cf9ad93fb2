"""Local attention: one softmax over sinks and window, in blocks of queries, so that no tensor has L x L elements.

In C where that is possible (`ahn.attention.softmax_native`), else in torch, here.

Legend of shapes: B batch, T queries, H query heads, G key/value heads (H a multiple), K key size, V value size,
N keys in reach of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ahn.attention.call import Call, LocalRead, Softmax
from ahn.attention.masks import beside, block_mask, extra_mask, one_mask, read_by, slot_mask
from ahn.backbone.compat import FUSED_GROUPS_HEADS
from ahn.ops import at_least_float32
from ahn.tokens import Attended, ExtraKV, Tokens, VisibleKV

# torch 2.13 has no public function that returns the log-sum of a fused softmax beside its output.
_HAS_LOG_SUM = hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")

Part = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""Keys, values and their additive mask."""


class Reading(NamedTuple):
    """Queries and what they read.

    Attributes:
        query: `[B, H, T, K]`.
        sink_query: Queries for the sinks where these differ, or `None`.
        keys: `[B, G, N, K]`.
        values: `[B, G, N, V]`.
        mask: Additive, or `None` if all may be read.
        sinks: Which of the keys are sinks and extra keys.
    """

    query: torch.Tensor
    sink_query: torch.Tensor | None
    keys: torch.Tensor
    values: torch.Tensor
    mask: torch.Tensor | None
    sinks: slice

    def can_merge(self, softmax: Softmax) -> bool:
        """Whether the kernel that also returns its denominators serves: on CPU, for plain softmax, no gradients.

        It takes values of the size of the keys only.
        """
        fits = (self.mask is None or self.mask.dim() == 2) and self.values.size(3) == self.query.size(3)
        on_cpu = self.query.device.type == "cpu" and _HAS_LOG_SUM and not torch.is_grad_enabled()
        return softmax.is_plain and fits and on_cpu


def attend(local: LocalRead) -> Attended:
    """Attention of new tokens over sinks, extra keys and window."""
    return Attended(_attend_all(local), log_sums(local) if local.wants_log_sum else None)


def _attend_all(local: LocalRead) -> torch.Tensor:
    """The same, `[B, T, H, V]`."""
    view, query = local.view, local.query
    if not view.ordered:
        return _attend_one(local).transpose(1, 2)
    size = block_size(view.window, query)
    blocks = [
        _attend_block(local, (start, min(start + size, view.seen))) for start in range(local.first, view.seen, size)
    ]
    return (blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=2)).transpose(1, 2)


def _attend_one(local: LocalRead) -> torch.Tensor:
    """A single query over the slots of the ring as they lie, and keys from elsewhere, `[B, H, 1, V]`."""
    call, view, query, sink_query, softmax, _ = local
    mask = slot_mask(call, view, query)
    keys, values, sinks = view.local.keys, view.local.values, view.sinks.length
    if view.extra is None:
        return _attend(Reading(query, sink_query, keys, values, mask, slice(0, sinks)), softmax)
    extra, extra_one = view.extra, one_mask(call, view.extra, view.seen, query) if query.device.type == "cpu" else None
    one = Reading(query, sink_query, keys, values, extra_one, slice(0, sinks))
    if mask is None and extra_one is not None and one.can_merge(softmax):
        # The window is large and lies apart: it is not copied to stand beside a few keys.
        sink_part = extra.keys, extra.values, extra_one
        if sink_query is None:
            return _merged(query, (keys, values, None), query, sink_part, softmax)
        sink_keys, sink_values = (
            torch.cat((ring[:, :, :sinks], own), dim=2) for ring, own in ((keys, extra.keys), (values, extra.values))
        )
        sink_part = sink_keys, sink_values, F.pad(extra_one, (sinks, 0))
        return _merged(query, (keys[:, :, sinks:], values[:, :, sinks:], None), sink_query, sink_part, softmax)
    part, other = ring_and_extra(view, query, mask)
    return _attend(Reading(query, sink_query, *part, other), softmax)


def ring_and_extra(view: VisibleKV, query: torch.Tensor, mask: torch.Tensor | None) -> tuple[Part, slice]:
    """What a single query reads: extra keys, then the slots of the ring as they lie; which are extra keys and sinks.

    Args:
        view: What it may read.
        query: The query, `[B, H, 1, K]`.
        mask: Mask of the slots, or `None` if all may be read.
    """
    keys, values, block = view.local.keys, view.local.values, (view.seen - 1, view.seen)
    if view.extra is None:
        return (keys, values, mask), slice(0, view.sinks.length)
    extra = read_by(view.extra, *block)
    mask = keys.new_zeros(1, keys.size(2)) if mask is None else mask
    mask = beside(extra_mask(extra, block, 1, query), mask)
    keys, values = torch.cat((extra.keys, keys), dim=2), torch.cat((extra.values, values), dim=2)
    return (keys, values, mask), slice(0, extra.keys.size(2) + view.sinks.length)


def _attend_block(local: LocalRead, block: tuple[int, int]) -> torch.Tensor:
    """The queries of one block of tokens, by first and last + 1 index, `[B, H, stop - start, V]`."""
    call, view, query, sink_query, softmax, _ = local
    start, stop = block
    rows = slice(start - local.first, stop - local.first)
    repeats = query.size(1) // view.local.keys.size(1) if _stacks_heads(query) else 1
    part, in_window = block_part(call, view, block, repeats, query)
    # Within the trained context both queries are the same, so that blocks before its end need one of them only.
    same = sink_query is None or stop <= call.attachment.trained_context
    sink_rows = None if same or sink_query is None else sink_query[:, :, rows]
    # Queries among the sinks see no token of the window, whose log-sum alone would be undefined.
    attend_rows = _attend_explicitly if sink_rows is not None and start < view.sinks.length else _attend
    return attend_rows(Reading(query[:, :, rows], sink_rows, *part, slice(in_window, None)), softmax)


def block_part(
    call: Call, view: VisibleKV, block: tuple[int, int], repeats: int, like: torch.Tensor
) -> tuple[Part, int]:
    """What a block of queries reads: tokens of the window, then sinks and extra keys; how many are of the window.

    Args:
        call: The call, for its masks.
        view: What the queries may read.
        block: First and last + 1 index of the queries.
        repeats: How often to stack the mask, for query heads stacked on one kv head.
        like: A tensor of the dtype and device to use.
    """
    keys_from = max(view.first, block[0] - view.window + 1)
    local = view.local.span(keys_from - view.first, max(keys_from, block[1]) - view.first)
    mask = block_mask(call, view, block, keys_from, repeats, like)
    parts: list[Tokens | ExtraKV] = [local, view.sinks]
    if view.extra is not None and (extra := read_by(view.extra, *block)).keys.size(2):
        mask = beside(mask, extra_mask(extra, block, repeats, like))
        parts.append(extra)
    keys, values = (torch.cat([part[index] for part in parts], dim=2) for index in (0, 1))
    return (keys, values, mask), local.length


def _attend(reading: Reading, softmax: Softmax) -> torch.Tensor:
    """One softmax, `[B, H, T, V]`, by the fused kernel where it can express it."""
    query, sink_query, keys, values, mask, _ = reading
    if sink_query is not None and reading.can_merge(softmax):
        return _attend_in_two(reading, sink_query, softmax)
    if sink_query is not None or softmax.softcap is not None or softmax.s_aux is not None:
        return _attend_explicitly(reading, softmax)
    stacks = query.size(2) == 1 or _stacks_heads(query)
    out = F.scaled_dot_product_attention(
        query.reshape(query.size(0), keys.size(1), -1, query.size(3)) if stacks else query,
        keys,
        values,
        attn_mask=mask,
        dropout_p=softmax.dropout,
        scale=softmax.scaling,
        enable_gqa=not stacks and keys.size(1) != query.size(1),
    )
    return out.reshape(*query.shape[:3], -1)


def _attend_in_two(reading: Reading, sink_query: torch.Tensor, softmax: Softmax) -> torch.Tensor:
    """Window and sinks by the fused kernel with their own queries each, merged by the size of their denominators."""
    query, _, keys, values, mask, sinks = reading
    window = slice(sinks.stop, None) if sinks.start == 0 else slice(0, sinks.start)
    local, sink_part = (
        (keys[:, :, span], values[:, :, span], None if mask is None else mask[..., span]) for span in (window, sinks)
    )
    return _merged(query, local, sink_query, sink_part, softmax)


def _merged(
    q_BHTK: torch.Tensor, local: Part, sink_q_BHTK: torch.Tensor, sink_part: Part, softmax: Softmax
) -> torch.Tensor:
    """One softmax over two sets of keys by the fused kernel, merged by the size of their denominators."""
    local_out, local_sum = _fused(q_BHTK, local, softmax)
    sink_out, sink_sum = _fused(sink_q_BHTK, sink_part, softmax)
    return torch.lerp(local_out, sink_out, torch.sigmoid(sink_sum - local_sum)[..., None].to(local_out.dtype))


def _fused(q_BHTK: torch.Tensor, part: Part, softmax: Softmax) -> tuple[torch.Tensor, torch.Tensor]:
    """Output of the fused kernel on CPU, `[B, H, T, V]`, and the logarithm of its denominators, `[B, H, T]`."""
    keys, values, mask = part[0].to(q_BHTK.dtype), part[1].to(q_BHTK.dtype), part[2]  # autocast does not reach it
    query, new = q_BHTK, q_BHTK.size(2)
    if new == 1 or not FUSED_GROUPS_HEADS:  # query heads stacked on their kv head: its keys are read once
        query = query.reshape(query.size(0), keys.size(1), -1, query.size(3))
        mask = mask if mask is None or new == 1 else mask.repeat(query.size(2) // new, 1)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, log_sum = kernel(query, keys, values, 0.0, False, attn_mask=mask, scale=softmax.scaling)
    return out.reshape(*q_BHTK.shape[:3], -1), log_sum.reshape(q_BHTK.shape[:3])


def _attend_explicitly(reading: Reading, softmax: Softmax) -> torch.Tensor:
    """The softmax spelled out, float32 inside, query heads stacked on their kv head."""
    weights = explicit_weights(reading, softmax).to(reading.values.dtype)
    weights = F.dropout(weights, softmax.dropout) if softmax.dropout else weights
    return torch.matmul(weights, reading.values).view(*reading.query.shape[:3], -1)


def explicit_weights(reading: Reading, softmax: Softmax) -> torch.Tensor:
    """The weights of the softmax, query heads stacked on their kv head, `[B, G, H / G * T, N]` float32."""
    return torch.softmax(_explicit_scores(reading, softmax), dim=-1)[..., : reading.keys.size(2)]


def log_sums(local: LocalRead) -> torch.Tensor:
    """Logarithm of the sum of exp(score) over all that each query reads, `[B, T, H]`, with gradients."""
    sums = [explicit_log_sum(reading, local.softmax) for _, reading in readings(local)]
    return torch.cat(sums, dim=2).transpose(1, 2)


def explicit_log_sum(reading: Reading, softmax: Softmax) -> torch.Tensor:
    """Logarithm of the sum of exp(score) over what is read, `[B, H, T]`, at least in float32."""
    return _explicit_scores(reading, softmax).logsumexp(-1).view(reading.query.shape[:3])


def readings(local: LocalRead) -> Iterator[tuple[int, Reading]]:
    """What the queries read, block by block, each with the index of its first query."""
    call, view, query, sink_query, _, _ = local
    if not view.ordered:
        part, sinks = ring_and_extra(view, query, slot_mask(call, view, query))
        yield view.seen - 1, Reading(query, sink_query, *part, sinks)
        return
    size = block_size(view.window, query)
    for start in range(local.first, view.seen, size):
        stop = min(start + size, view.seen)
        part, in_window = block_part(call, view, (start, stop), 1, query)
        rows = slice(start - local.first, stop - local.first)
        sink_rows = None if sink_query is None else sink_query[:, :, rows]
        yield start, Reading(query[:, :, rows], sink_rows, *part, slice(in_window, None))


def _explicit_scores(reading: Reading, softmax: Softmax) -> torch.Tensor:
    """The scores that are compared, `[B, G, H / G * T, N]`, and one more where something takes weight alone."""
    query, sink_query, keys, _, mask, sinks = reading
    batch, heads, new, size = query.shape
    groups = keys.size(1)
    stacked = (batch, groups, heads // groups * new, size)
    scores = _scores(query.reshape(stacked), keys, softmax.scaling)
    if sink_query is not None:
        scores[..., sinks] = _scores(sink_query.reshape(stacked), keys[:, :, sinks], softmax.scaling)
    if softmax.softcap is not None:
        scores = torch.tanh(scores / softmax.softcap) * softmax.softcap
    if mask is not None:
        per_head = scores.view(batch, groups, -1, new, scores.size(-1))
        # The mask of one head, should it come stacked; the sum is broadcast over the heads.
        one = mask[..., :new, :]
        scores = (per_head + (one if one.dim() == 2 else one[:, :, None])).view_as(scores)
    if softmax.s_aux is not None:
        extra = softmax.s_aux.to(scores.dtype).view(1, groups, -1, 1).expand(batch, -1, -1, new)
        extra = extra.reshape(*scores.shape[:3], 1)
        scores = torch.cat((scores, extra), dim=-1)
    return scores


def _scores(q: torch.Tensor, k: torch.Tensor, scaling: float) -> torch.Tensor:
    """Scaled products, at least in float32."""
    return at_least_float32(torch.matmul(q * scaling, k.transpose(2, 3)))


def _stacks_heads(q: torch.Tensor) -> bool:
    """Whether to stack query heads on their kv head: off the CPU, fused kernels take no grouped heads with a mask."""
    return q.device.type != "cpu"


def block_size(window: int, q: torch.Tensor) -> int:
    """Queries per block: large enough for fast products, small enough that few masked keys are multiplied."""
    if q.device.type != "cpu":
        return 1024
    return 128 if window <= 512 else 256
