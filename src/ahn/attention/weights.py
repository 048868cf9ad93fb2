"""The attention weights themselves, for scores of anchors that look at them.

Legend of shapes: B batch, H query heads, T new tokens, K key size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ahn.anchors.base import AttentionBlock
from ahn.attention.call import Call, Softmax
from ahn.attention.masks import slot_mask
from ahn.attention.softmax import Reading, block_part, block_size, explicit_weights, ring_and_extra
from ahn.tokens import VisibleKV


def attention_blocks(
    call: Call, view: VisibleKV, query: torch.Tensor, sink_query: torch.Tensor | None, softmax: Softmax
) -> Iterator[AttentionBlock]:
    """The weights of all new queries on the tokens of the window, block by block, without dropout.

    Args:
        call: The call, for its masks.
        view: What the queries may read.
        query: Queries of the new tokens, `[B, H, T, K]`.
        sink_query: Queries for sinks and extra keys where these differ, or `None`.
        softmax: The layer's softmax.
    """
    if not view.ordered:
        yield _weights_of_one(call, view, query, sink_query, softmax)
        return
    first, size = view.seen - query.size(2), block_size(view.window, query)
    for start in range(first, view.seen, size):
        stop = min(start + size, view.seen)
        part, local = block_part(call, view, (start, stop), 1, query)
        own = query[:, :, start - first : stop - first]
        sink_own = None if sink_query is None else sink_query[:, :, start - first : stop - first]
        weights = explicit_weights(Reading(own, sink_own, *part, slice(local, None)), softmax)
        yield AttentionBlock(start, stop - local, weights.view(*own.shape[:3], -1)[..., :local])


def _weights_of_one(
    call: Call, view: VisibleKV, query: torch.Tensor, sink_query: torch.Tensor | None, softmax: Softmax
) -> AttentionBlock:
    """The weights of a single query, which reads the slots of the ring as they lie."""
    part, sink_part = ring_and_extra(view, query, slot_mask(call, view, query))
    weights = explicit_weights(Reading(query, sink_query, *part, sink_part), softmax)
    local_BHQJ = weights.view(*query.shape[:3], -1)[..., sink_part.stop :]
    length = local_BHQJ.size(-1)
    # Token j of the window lies in slot (j - sinks) mod window of those behind the sinks.
    oldest = (view.seen - view.sinks.length) % length if length == view.window else 0
    return AttentionBlock(view.seen - 1, view.seen - length, local_BHQJ.roll(-oldest, -1))
