"""The colours of arms in all pictures."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

_PLAIN = {
    "full": "black",
    "window": "tab:blue",
    "ahn": "tab:orange",
    "ct_max": "tab:green",
    "ct_mean": "tab:olive",
    "tail": "tab:gray",
}
_OTHERS = ("tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:cyan", "navy", "gold", "lime")


def arm_colours(arms: Sequence[str]) -> dict[str, str]:
    """A colour of matplotlib for each arm: plain names have the same in all pictures, others take turns.

    Args:
        arms: Names of the arms, in the order in which they are drawn.
    """
    others = itertools.cycle(_OTHERS)
    return {arm: _PLAIN.get(arm) or next(others) for arm in arms}
