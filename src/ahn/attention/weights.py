"""The attention weights themselves, for scores of anchors that look at them.

Legend of shapes: B batch, H query heads, T new tokens, K key size.
"""

from __future__ import annotations

from collections.abc import Iterator

from ahn.anchors.base import AttentionBlock
from ahn.attention.call import LocalRead
from ahn.attention.masks import slot_mask
from ahn.attention.softmax import Reading, block_part, block_size, explicit_weights, ring_and_extra


def attention_blocks(local: LocalRead) -> Iterator[AttentionBlock]:
    """The weights of all new queries on the tokens of the window, block by block, without dropout."""
    call, view, query, sink_query, softmax = local
    if not view.ordered:
        yield _weights_of_one(local)
        return
    first, size = local.first, block_size(view.window, query)
    for start in range(first, view.seen, size):
        stop = min(start + size, view.seen)
        part, in_window = block_part(call, view, (start, stop), 1, query)
        own = query[:, :, start - first : stop - first]
        sink_own = None if sink_query is None else sink_query[:, :, start - first : stop - first]
        weights = explicit_weights(Reading(own, sink_own, *part, slice(in_window, None)), softmax)
        yield AttentionBlock(start, stop - in_window, weights.view(*own.shape[:3], -1)[..., :in_window])


def _weights_of_one(local: LocalRead) -> AttentionBlock:
    """The weights of a single query, which reads the slots of the ring as they lie."""
    call, view, query, sink_query, softmax = local
    part, sink_part = ring_and_extra(view, query, slot_mask(call, view, query))
    weights = explicit_weights(Reading(query, sink_query, *part, sink_part), softmax)
    local_BHQJ = weights.view(*query.shape[:3], -1)[..., sink_part.stop :]
    length = local_BHQJ.size(-1)
    # Token j of the window lies in slot (j - sinks) mod window of those behind the sinks.
    oldest = (view.seen - view.sinks.length) % length if length == view.window else 0
    return AttentionBlock(view.seen - 1, view.seen - length, local_BHQJ.roll(-oldest, -1))
