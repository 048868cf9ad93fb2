"""The attention weights themselves, for scores of anchors that look at them.

Legend of shapes: B batch, H query heads, Q queries and J keys of a block.
"""

from __future__ import annotations

from collections.abc import Iterator

from ahn.anchors.base import AttentionBlock
from ahn.attention.lookup import Lookup
from ahn.attention.softmax import Softmax, block_of, block_size, explicit_weights, ring_with_extra


def attention_blocks(lookup: Lookup, softmax: Softmax) -> Iterator[AttentionBlock]:
    """The weights of all new queries on the tokens of the window, block by block, without dropout.

    Args:
        lookup: Queries, and what they may read.
        softmax: The layer's softmax.
    """
    if not lookup.view.ordered:
        yield _weights_of_one(lookup, softmax)
        return
    size = block_size(lookup.window, lookup.queries)
    for start in range(lookup.first, lookup.seen, size):
        stop = min(start + size, lookup.seen)
        query, sink_query, (keys, _, mask), reach = block_of(lookup, start, stop)
        weights = explicit_weights(query, sink_query, keys, mask, slice(reach, None), softmax)
        yield AttentionBlock(start, stop - reach, weights.view(*query.shape[:3], -1)[..., :reach])


def _weights_of_one(lookup: Lookup, softmax: Softmax) -> AttentionBlock:
    """The weights of a single query, which reads the slots of the ring as they lie."""
    view, seen, sinks = lookup.view, lookup.seen, lookup.view.sinks.length
    mask = lookup.plan.slot_mask(view, seen, lookup.window, lookup.queries)
    (keys, _, mask), far = ring_with_extra(lookup, mask)
    weights = explicit_weights(lookup.queries, lookup.sink_queries, keys, mask, far, softmax)
    near_BHQJ = weights.view(*lookup.queries.shape[:3], -1)[..., far.stop :]
    length = near_BHQJ.size(-1)
    # Token j of the window lies in slot (j - sinks) mod window of those behind the sinks.
    oldest_first = near_BHQJ.roll(-((seen - sinks) % length), -1) if length == lookup.window else near_BHQJ
    return AttentionBlock(seen - 1, seen - length, oldest_first)
