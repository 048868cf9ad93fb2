"""Recall as pictures: depth against length with the place where the window begins, and the curve over many facts."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

from ahn.evaluation.arm_colours import arm_colours
from ahn.evaluation.recall.plan import Settings
from ahn.evaluation.recall.results import Cell, Record, by_depth, is_first, is_found
from ahn.evaluation.recall.spans import LABELS

_WRITTEN = 8  # columns up to which each cell of a map has its number written in it


def heat_map(task: str, records: Sequence[Record], settings: Settings) -> Any:
    """A map for each arm: values found in answers above, values that ranked first below.

    Args:
        task: Name of a task that is measured against depth.
        records: As `measure` gives them.
        settings: Those of the run.

    Returns:
        A figure of matplotlib. A red line shows where the window begins; what is above it, and hatched, was evicted,
        but for the sinks.
    """
    figure = _figure(2.3 * len(settings.arms) + 1.6, 5.6)
    panels = figure.subplots(2, len(settings.arms), sharex=True, sharey=True, squeeze=False)
    begins = _window_begins(task, records)
    rows: tuple[tuple[str, Callable[[Record], float]], ...] = (
        ("in the answer", is_found),
        (f"ranked first (chance {settings.chance:.0%})", is_first),
    )
    for line, (title, score) in zip(panels, rows):
        means = by_depth((record for record in records if record["task"] == task), settings, score)
        for panel, arm in zip(line, settings.arms):
            image = _map(panel, means, task, arm, settings)
            _mark_window(panel, begins, settings)
            panel.set_title(arm, fontweight="bold", fontsize=10)
        line[0].set_ylabel(f"{title}\ndepth in the text")
        figure.colorbar(image, ax=list(line), shrink=0.9)
    for panel in panels[-1]:
        panel.set_xlabel("length (tokens)")
    figure.suptitle(f"{task}: red line = the window begins; above it, hatched = evicted", fontsize=11)
    return figure


def capacity_curve(found: Sequence[Cell], settings: Settings) -> Any:
    """Share of the facts that are recalled against their number, for each length and span.

    Args:
        found: As `cells` gives them.
        settings: Those of the run.

    Returns:
        A figure of matplotlib, with 95 % intervals as bands.
    """
    mine = [cell for cell in found if cell.facts is not None]
    lengths = sorted({cell.length for cell in mine})
    labels = [label for label in LABELS if any(cell.label == label for cell in mine)]
    figure = _figure(4.2 * len(labels), 3.1 * len(lengths) + 0.4)
    panels = figure.subplots(len(lengths), len(labels), sharey=True, squeeze=False)
    for line, length in zip(panels, lengths):
        for panel, label in zip(line, labels):
            for arm, colour in arm_colours(settings.arms).items():
                here = [c for c in mine if (c.length, c.label, c.arm) == (length, label, arm)]
                _curve(panel, arm, here, colour)
            panel.set_title(f"{length:,} tokens, {label}", fontsize=10)
            panel.set(ylim=(-0.05, 1.05), xlabel="facts in the text")
            panel.grid(alpha=0.3)
        line[0].set_ylabel("facts in the answer")
    panels[0][0].legend(fontsize=8)
    return figure


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _map(panel: Any, means: Mapping[Hashable, float], task: str, arm: str, settings: Settings) -> Any:
    """Depths downwards, lengths to the right; what was not measured stays grey."""
    table = [
        [means.get((task, arm, length, row), float("nan")) for length in settings.lengths]
        for row in range(settings.depths)
    ]
    panel.set_facecolor("lightgrey")
    image = panel.imshow(table, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    panel.set_xticks(range(len(settings.lengths)), [f"{length:,}" for length in settings.lengths], rotation=45)
    panel.set_yticks(range(settings.depths), [f"{settings.depth(row):.0%}" for row in range(settings.depths)])
    if len(settings.lengths) <= _WRITTEN:
        for row, line in enumerate(table):
            for column, mean in enumerate(line):
                if mean == mean:  # not NaN
                    colour = "white" if mean > 0.6 else "black"
                    panel.text(column, row, f"{mean:.2g}", ha="center", va="center", color=colour, fontsize=8)
    return image


def _window_begins(task: str, records: Iterable[Record]) -> dict[int, float]:
    """Mean depth at which the window begins, by length."""
    found: dict[int, list[float]] = {}
    for record in records:
        if record["task"] == task:
            found.setdefault(record["length"], []).append(record["window_begins"])
    return {length: sum(depths) / len(depths) for length, depths in found.items()}


def _mark_window(panel: Any, begins: Mapping[int, float], settings: Settings) -> None:
    """The line where the window begins, and hatching over what lies before it."""
    top = -0.5
    for column, length in enumerate(settings.lengths):
        edge = begins.get(length, 0.0) * (settings.depths - 1) if settings.depths > 1 else begins.get(length, 0.0) - 0.5
        if edge <= top:
            continue
        left, right = column - 0.5, column + 0.5
        panel.fill_between([left, right], top, edge, facecolor="none", edgecolor="red", alpha=0.25, hatch="//", lw=0)
        panel.plot([left, right], [edge, edge], color="red", linewidth=2)
    panel.set(xlim=(-0.5, len(settings.lengths) - 0.5), ylim=(settings.depths - 0.5, -0.5))


def _curve(panel: Any, arm: str, here: Sequence[Cell], colour: str) -> None:
    numbers = [cell.facts for cell in here]
    panel.plot(numbers, [cell.found.share for cell in here], marker="o", label=arm, color=colour)
    panel.fill_between(
        numbers, [c.found.low for c in here], [c.found.high for c in here], color=colour, alpha=0.12, linewidth=0
    )
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter(lambda number, _: f"{number:.0f}")
