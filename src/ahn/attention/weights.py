"""The attention weights themselves, for scores of anchors that look at them.

Legend of shapes: B batch, H query heads, T new tokens, K key size.
"""

from __future__ import annotations

from collections.abc import Iterator

from ahn.anchors.base import AttentionBlock
from ahn.attention.call import LocalRead
from ahn.attention.softmax import explicit_weights, readings


def attention_blocks(local: LocalRead) -> Iterator[AttentionBlock]:
    """The weights of all new queries on the tokens of the window, block by block, without dropout."""
    if not local.view.ordered:
        yield _weights_of_one(local)
        return
    for start, reading in readings(local):
        in_window, shape = reading.sinks.start, reading.query.shape[:3]
        weights = explicit_weights(reading, local.softmax)
        yield AttentionBlock(start, start + shape[2] - in_window, weights.view(*shape, -1)[..., :in_window])


def _weights_of_one(local: LocalRead) -> AttentionBlock:
    """The weights of a single query, which reads the slots of the ring as they lie."""
    view, (_, reading) = local.view, next(readings(local))
    weights = explicit_weights(reading, local.softmax)
    local_BHQJ = weights.view(*reading.query.shape[:3], -1)[..., reading.sinks.stop :]
    length = local_BHQJ.size(-1)
    # Token j of the window lies in slot (j - sinks) mod window of those behind the sinks.
    oldest = (view.seen - view.sinks.length) % length if length == view.window else 0
    return AttentionBlock(view.seen - 1, view.seen - length, local_BHQJ.roll(-oldest, -1))
