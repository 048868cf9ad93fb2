"""The slots of the Compressive Transformer: evicted tokens are pooled into them, first in first out."""

from __future__ import annotations

from ahn.cache.compressive import POOLED


def slots_read(evicted: int, slots: int) -> int:
    """How many slots all queries read together: each reads those that are filled when its own token has come.

    Args:
        evicted: Tokens that have left the window; one query comes with each.
        slots: Slots that there are.
    """
    growing = min(evicted, POOLED * slots)
    groups, rest = divmod(growing, POOLED)
    filling = POOLED * groups * (groups - 1) // 2 + groups * (rest + 1)
    return filling + (evicted - growing) * slots
