"""What all pictures share: a figure without a screen, and the colours of arms."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

_PLAIN = {
    "full": "black",
    "window": "tab:blue",
    "ahn": "tab:orange",
    "ct_max": "tab:green",
    "ct_mean": "tab:olive",
    "tail": "tab:gray",
}
_OTHERS = ("tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:cyan", "navy", "gold", "lime")


def new_figure(width: float, height: float) -> Any:
    """An empty figure of matplotlib that needs no screen.

    Args:
        width: Inches.
        height: Inches.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def tidy(panel: Any) -> None:
    """Gives a panel a faint grid and no frame at the top and the right."""
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)


def arm_colours(arms: Sequence[str]) -> dict[str, str]:
    """A colour of matplotlib for each arm: plain names have the same in all pictures, others take turns.

    Args:
        arms: Names of the arms, in the order in which they are drawn.
    """
    others = itertools.cycle(_OTHERS)
    return {arm: _PLAIN.get(arm) or next(others) for arm in arms}
