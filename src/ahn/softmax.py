"""Local attention: one softmax over sinks and window, in blocks of queries, so that no tensor has L x L elements.

In C where that is possible (`ahn.compiled_attention`), else in torch, here.

Legend of shapes: B batch, T queries, H query heads, G key/value heads (H a multiple), K key size, V value size,
N keys in reach of a block.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F

from ahn.block_attention import Block, Keys, block_attention, can_attend
from ahn.cache.exact import Extra, Tokens
from ahn.compiled_attention import compiled_attention
from ahn.lookup import Lookup

# torch 2.13 has no public function that returns the log-sum of a fused softmax beside its output.
_HAS_LOG_SUM = hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")


@dataclasses.dataclass(frozen=True)
class Softmax:
    """What a layer's softmax does beside the plain one.

    Attributes:
        scaling: Factor on the products of queries and keys.
        dropout: Share of the weights dropped in training.
        softcap: Bound of the scores, tanh(score / softcap) * softcap (Gemma 2), or `None`.
        s_aux: One more score per query head that takes weight and gives no value (gpt-oss), `[H]`, or `None`.
    """

    scaling: float
    dropout: float = 0.0
    softcap: float | None = None
    s_aux: torch.Tensor | None = None


_Part = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""Keys, values and their additive mask."""


def local_attention(lookup: Lookup, softmax: Softmax) -> torch.Tensor:
    """Attention of new tokens over sinks, extra keys and window.

    Args:
        lookup: Queries, and what they may read.
        softmax: The layer's softmax.

    Returns:
        `[B, T, H, V]` in the dtype of the values.
    """
    if softmax == Softmax(softmax.scaling):
        out = compiled_attention(lookup, softmax.scaling)
        if out is not None:
            return out
    if not lookup.view.ordered:
        return _attend_one(lookup, softmax).transpose(1, 2)
    if _can_attend_in_blocks(lookup, softmax):
        return _attend_in_blocks(lookup, softmax.scaling).transpose(1, 2)
    size = _block_size(lookup.window, lookup.queries)
    starts = range(lookup.first, lookup.seen, size)
    blocks = [_attend_block(lookup, start, min(start + size, lookup.seen), softmax) for start in starts]
    return (blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=2)).transpose(1, 2)


def _can_attend_in_blocks(lookup: Lookup, softmax: Softmax) -> bool:
    """Whether the function with a backward pass of its own serves: a plain softmax, and rows that are all alike."""
    view, plain = lookup.view, softmax == Softmax(softmax.scaling) and lookup.far_queries is None
    alike = lookup.plan.padding is None and (view.extra is None or view.extra.born.size(0) == 1)
    return plain and alike and can_attend(lookup.queries, view.local.keys, view.local.values)


def _attend_in_blocks(lookup: Lookup, scaling: float) -> torch.Tensor:
    """All queries, block by block in both directions, `[B, H, T, V]`."""
    view = lookup.view
    nothing = view.sinks.span(0, 0)
    extra = nothing if view.extra is None else view.extra
    name = f"blocks of {lookup.queries.dtype} over {lookup.window}"  # masks are the same in all such layers
    source = lookup.plan if view.extra is None else view.extra.born
    blocks = lookup.plan.shared(name, source, lambda: _blocks(lookup))
    keys, values = (Keys(view.local[index], view.sinks[index], extra[index]) for index in (0, 1))
    return block_attention(lookup.queries, keys, values, blocks, scaling)


def _blocks(lookup: Lookup) -> list[Block]:
    """The queries of a call in blocks, with what each reads."""
    view, plan, size = lookup.view, lookup.plan, _block_size(lookup.window, lookup.queries)
    repeats = lookup.queries.size(1) // view.local.keys.size(1)
    like = lookup.queries.to(torch.get_autocast_dtype("cpu")) if torch.is_autocast_enabled("cpu") else lookup.queries
    blocks = []
    for start in range(lookup.first, lookup.seen, size):
        stop = min(start + size, lookup.seen)
        keys_from = max(view.first, start - lookup.window + 1)
        mask = plan.block_mask((start, stop), keys_from, view.sinks.length, lookup.window, repeats, like)
        places = torch.zeros(0, dtype=torch.long)
        if view.extra is not None:
            read = ((view.extra.born < stop) & (view.extra.died > start))[0]
            places = read.nonzero().flatten()
            allowed = view.extra.allowed(start, stop)[0][:, read].repeat(repeats, 1)
            mask = torch.cat((mask, like.new_zeros(allowed.shape).masked_fill_(~allowed, float("-inf"))), dim=-1)
        rows = slice(start - lookup.first, stop - lookup.first)
        reach = slice(keys_from - view.first, max(keys_from, stop) - view.first)
        blocks.append(Block(rows, reach, places, mask))
    return blocks


def _attend_one(lookup: Lookup, softmax: Softmax) -> torch.Tensor:
    """A single query over the slots of the ring as they lie, and keys from elsewhere, `[B, H, 1, V]`."""
    query, far_query, view, plan, seen = lookup.queries, lookup.far_queries, lookup.view, lookup.plan, lookup.seen
    mask = plan.slot_mask(view, seen, lookup.window, query)
    keys, values, sinks = view.local.keys, view.local.values, view.sinks.length
    if view.extra is None:
        return _attend(query, far_query, keys, values, mask, slice(0, sinks), softmax)
    extra, extra_mask = view.extra, plan.one_mask(view.extra, seen, query) if query.device.type == "cpu" else None
    if mask is None and extra_mask is not None and _can_merge(query, extra_mask, softmax):
        # The window is large and lies apart: it is not copied to stand beside a few keys.
        far = extra.keys, extra.values, extra_mask
        if far_query is None:
            return _merged(query, (keys, values, None), query, far, softmax)
        far_keys, far_values = (
            torch.cat((held[:, :, :sinks], own), dim=2) for held, own in ((keys, extra.keys), (values, extra.values))
        )
        far = far_keys, far_values, F.pad(extra_mask, (sinks, 0))
        return _merged(query, (keys[:, :, sinks:], values[:, :, sinks:], None), far_query, far, softmax)
    extra = extra.reached(seen - 1, seen)
    mask = keys.new_zeros(1, keys.size(2)) if mask is None else mask
    mask = _beside(plan.extra_mask(extra, (seen - 1, seen), 1, query), mask)
    keys, values = torch.cat((extra.keys, keys), dim=2), torch.cat((extra.values, values), dim=2)
    return _attend(query, far_query, keys, values, mask, slice(0, extra.keys.size(2) + sinks), softmax)


def _attend_block(lookup: Lookup, start: int, stop: int, softmax: Softmax) -> torch.Tensor:
    """The queries of one block of tokens, `[B, H, stop - start, V]`."""
    view, plan, far_queries = lookup.view, lookup.plan, lookup.far_queries
    rows = slice(start - lookup.first, stop - lookup.first)
    query = lookup.queries[:, :, rows]
    keys_from = max(view.first, start - lookup.window + 1)
    reach = view.local.span(keys_from - view.first, max(keys_from, stop) - view.first)
    repeats = query.size(1) // reach.keys.size(1) if _stacks_heads(query) else 1
    mask = plan.block_mask((start, stop), keys_from, view.sinks.length, lookup.window, repeats, query)
    parts: list[Tokens | Extra] = [reach, view.sinks]
    if view.extra is not None and (extra := view.extra.reached(start, stop)).keys.size(2):
        mask = _beside(mask, plan.extra_mask(extra, (start, stop), repeats, query))
        parts.append(extra)
    keys, values = (torch.cat([part[index] for part in parts], dim=2) for index in (0, 1))
    # Within the trained context both queries are the same, so that blocks before its end need one of them only.
    near = far_queries is None or stop <= plan.attachment.trained_context
    far_query = None if near or far_queries is None else far_queries[:, :, rows]
    # Queries among the sinks see no token of the window, whose log-sum alone would be undefined.
    attend = _attend_explicitly if far_query is not None and start < view.sinks.length else _attend
    return attend(query, far_query, keys, values, mask, slice(reach.length, None), softmax)


def _attend(
    q_BHTK: torch.Tensor,
    sink_q_BHTK: torch.Tensor | None,
    k_BGNK: torch.Tensor,
    v_BGNV: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: slice,
    softmax: Softmax,
) -> torch.Tensor:
    """One softmax, `[B, H, T, V]`, by the fused kernel where it can express it."""
    if sink_q_BHTK is not None and _can_merge(q_BHTK, mask, softmax):
        return _attend_in_two(q_BHTK, sink_q_BHTK, k_BGNK, v_BGNV, mask, sinks, softmax)
    if sink_q_BHTK is not None or softmax.softcap is not None or softmax.s_aux is not None:
        return _attend_explicitly(q_BHTK, sink_q_BHTK, k_BGNK, v_BGNV, mask, sinks, softmax)
    groups = k_BGNK.size(1)
    if q_BHTK.size(2) == 1 or _stacks_heads(q_BHTK):
        stacked = q_BHTK.reshape(q_BHTK.size(0), groups, -1, q_BHTK.size(3))
        out = F.scaled_dot_product_attention(
            stacked, k_BGNK, v_BGNV, attn_mask=mask, dropout_p=softmax.dropout, scale=softmax.scaling
        )
        return out.reshape(*q_BHTK.shape[:3], -1)
    return F.scaled_dot_product_attention(
        q_BHTK,
        k_BGNK,
        v_BGNV,
        attn_mask=mask,
        dropout_p=softmax.dropout,
        scale=softmax.scaling,
        enable_gqa=groups != q_BHTK.size(1),
    )


def _attend_in_two(
    q_BHTK: torch.Tensor,
    sink_q_BHTK: torch.Tensor,
    k_BGNK: torch.Tensor,
    v_BGNV: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: slice,
    softmax: Softmax,
) -> torch.Tensor:
    """Window and sinks by the fused kernel with their own queries each, merged by the size of their denominators."""
    window = slice(sinks.stop, None) if sinks.start == 0 else slice(0, sinks.start)
    near, far = (
        (k_BGNK[:, :, keys], v_BGNV[:, :, keys], None if mask is None else mask[..., keys]) for keys in (window, sinks)
    )
    return _merged(q_BHTK, near, sink_q_BHTK, far, softmax)


def _merged(q_BHTK: torch.Tensor, near: _Part, far_q_BHTK: torch.Tensor, far: _Part, softmax: Softmax) -> torch.Tensor:
    """One softmax over two sets of keys by the fused kernel, merged by the size of their denominators."""
    near_out, near_sum = _fused(q_BHTK, near, softmax)
    far_out, far_sum = _fused(far_q_BHTK, far, softmax)
    return torch.lerp(near_out, far_out, torch.sigmoid(far_sum - near_sum)[..., None].to(near_out.dtype))


def _fused(q_BHTK: torch.Tensor, part: _Part, softmax: Softmax) -> tuple[torch.Tensor, torch.Tensor]:
    """Output of the fused kernel on CPU, `[B, H, T, V]`, and the logarithm of its denominators, `[B, H, T]`."""
    keys, values, mask = part
    query = q_BHTK
    if query.size(2) == 1:  # query heads stacked on their kv head: its keys are read once
        query = query.reshape(query.size(0), keys.size(1), -1, query.size(3))
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, log_sum = kernel(query, keys, values, 0.0, False, attn_mask=mask, scale=softmax.scaling)
    return out.reshape(*q_BHTK.shape[:3], -1), log_sum.reshape(q_BHTK.shape[:3])


def _can_merge(q: torch.Tensor, mask: torch.Tensor | None, softmax: Softmax) -> bool:
    """Whether the kernel that also returns its denominators serves here: on CPU, for plain softmax, no gradients."""
    plain = softmax.softcap is None and softmax.s_aux is None and not softmax.dropout
    plain = plain and (mask is None or mask.dim() == 2)
    return plain and q.device.type == "cpu" and _HAS_LOG_SUM and not torch.is_grad_enabled()


def _attend_explicitly(
    q_BHTK: torch.Tensor,
    sink_q_BHTK: torch.Tensor | None,
    k_BGNK: torch.Tensor,
    v_BGNV: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: slice,
    softmax: Softmax,
) -> torch.Tensor:
    """The softmax spelled out, float32 inside, query heads stacked on their kv head."""
    batch, heads, new, size = q_BHTK.shape
    groups = k_BGNK.size(1)
    stacked = (batch, groups, heads // groups * new, size)
    scores = _scores(q_BHTK.reshape(stacked), k_BGNK, softmax.scaling)
    if sink_q_BHTK is not None:
        scores[..., sinks] = _scores(sink_q_BHTK.reshape(stacked), k_BGNK[:, :, sinks], softmax.scaling)
    if softmax.softcap is not None:
        scores = torch.tanh(scores / softmax.softcap) * softmax.softcap
    if mask is not None:
        per_head = scores.view(batch, groups, -1, new, scores.size(-1))
        # The mask of one head, should it come stacked; the sum is broadcast over the heads.
        one = mask[..., :new, :]
        scores = (per_head + (one if one.dim() == 2 else one[:, :, None])).view_as(scores)
    if softmax.s_aux is not None:
        extra = softmax.s_aux.float().view(1, groups, -1, 1).expand(batch, -1, -1, new).reshape(*scores.shape[:3], 1)
        scores = torch.cat((scores, extra), dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : k_BGNK.size(2)].to(v_BGNV.dtype)
    weights = F.dropout(weights, softmax.dropout) if softmax.dropout else weights
    return torch.matmul(weights, v_BGNV).view(batch, heads, new, -1)


def _scores(q: torch.Tensor, k: torch.Tensor, scaling: float) -> torch.Tensor:
    """Scaled products, float32."""
    return torch.matmul(q * scaling, k.transpose(2, 3)).float()


def _beside(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Two masks side by side; one that holds for all rows is repeated where the other differs from row to row."""
    if left.dim() != right.dim():
        shape = (left if left.dim() > right.dim() else right).shape[:3]
        left, right = (mask.expand(*shape, mask.size(-1)) for mask in (left, right))
    return torch.cat((left, right), dim=-1)


def _stacks_heads(q: torch.Tensor) -> bool:
    """Whether to stack query heads on their kv head: off the CPU, fused kernels take no grouped heads with a mask."""
    return q.device.type != "cpu"


def _block_size(window: int, q: torch.Tensor) -> int:
    """Queries per block: large enough for fast products, small enough that few masked keys are multiplied."""
    if q.device.type != "cpu":
        return 1024
    return 128 if window <= 512 else 256
