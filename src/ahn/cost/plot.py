"""FLOPs and cache bytes against the context, as a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ahn._home import new_figure, write_figure
from ahn.cost.counting import Cost, Counting
from ahn.cost.formatting import byte_unit, scaled, thousands
from ahn.memories import memory_names

_POINTS = 40
_MEMORY_COLOURS = ("tab:orange", "tab:green", "tab:purple", "tab:red", "tab:brown")


def plot_costs(model: Counting, context: int, files: Sequence[Path]) -> None:
    """Draws what reading costs up to a context: in full, with a window, and with each memory.

    Args:
        model: The cost model.
        context: The longest context, in tokens.
        files: Where to write; each suffix says how, `.png` or `.svg`.
    """
    contexts = _contexts(model, context)
    costs = [model.at(each) for each in contexts]
    figure = new_figure(11, 4.4)
    left, right = figure.subplots(1, 2)
    _panel(left, contexts, costs, lambda cost: cost.prefill_flops, "FLOPs to read the context", _flops_unit)
    _panel(right, contexts, costs, lambda cost: cost.cache_bytes, "Cache after reading it", _bytes_unit)
    config = model.base.attachment.config
    for panel in (left, right):
        _mark_window(panel, config.sinks + config.window, context)
    figure.suptitle(
        f"{model.base.name}: sinks {config.sinks:,}, window {config.window:,}, convention {model.name}", fontsize=12
    )
    for file in files:
        write_figure(file, figure)


def _contexts(model: Counting, context: int) -> list[int]:
    """Contexts to compute, with the corner at which the window is full."""
    config = model.base.attachment.config
    even = {max(1, round(context * step / _POINTS)) for step in range(_POINTS + 1)}
    corner = config.sinks + config.window
    return sorted({*even, min(context, corner), min(context, corner + 1)})


def _panel(
    panel: Any,
    contexts: list[int],
    costs: list[dict[str, Cost]],
    value: Callable[[Cost], int],
    title: str,
    unit: Callable[[int], tuple[int, str]],
) -> None:
    """One quantity over the context; the legend gives its value at the end, where lines may lie on each other."""
    from matplotlib.lines import Line2D

    power, name = unit(value(costs[-1]["full"]))
    keys = []
    for method, style in _styles().items():
        panel.plot(contexts, [value(cost[method]) / 10**power for cost in costs], **style)
        label = f"{method}: {scaled(value(costs[-1][method]), power)}"
        keys.append(Line2D([], [], label=label, **{**style, "linestyle": "solid"}))
    panel.set(title=title, xlabel="context (tokens)", ylabel=name, xlim=(0, 1.01 * contexts[-1]), ylim=(0, None))
    panel.xaxis.set_major_formatter(lambda tokens, _: f"{tokens:,.0f}")
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(handles=keys, loc="upper left", title=f"{name} at {contexts[-1]:,} tokens", alignment="left")


def _styles() -> dict[str, dict[str, Any]]:
    """How each method is drawn: memories as dashes that take turns, on top of the broad line of the window."""
    styles: dict[str, dict[str, Any]] = {
        "full": {"color": "black", "linewidth": 2},
        "window": {"color": "lightsteelblue", "linewidth": 5, "solid_capstyle": "butt"},
    }
    names = memory_names()
    for index, memory in enumerate(names):
        colour = _MEMORY_COLOURS[index % len(_MEMORY_COLOURS)]
        dashes = (4 * index, (4, 4 * max(1, len(names) - 1)))
        styles[memory] = {"color": colour, "linewidth": 2, "linestyle": dashes, "dash_capstyle": "butt"}
    return styles


def _mark_window(panel: Any, exact: int, context: int) -> None:
    if exact < context:
        panel.axvline(exact, color="grey", linewidth=1, linestyle=":")
        panel.text(
            exact,
            0.02,
            f" window full at {exact:,}",
            color="dimgrey",
            fontsize=9,
            transform=panel.get_xaxis_transform(),
        )


def _flops_unit(largest: int) -> tuple[int, str]:
    power = thousands(largest)
    return power, f"$10^{{{power}}}$ FLOPs"


def _bytes_unit(largest: int) -> tuple[int, str]:
    power = thousands(largest)
    return power, byte_unit(power)
