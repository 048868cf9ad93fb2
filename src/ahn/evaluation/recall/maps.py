"""Recall as pictures: depth against length with the place where the window begins, and the curve over many facts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ahn.evaluation.drawing import arm_colours, new_figure
from ahn.evaluation.recall.items import RecallSettings
from ahn.evaluation.recall.layout import LABELS

_WRITTEN = 8  # columns up to which each cell of a map has its number written in it

Record = dict[str, Any]


def heat_map(task: str, records: Sequence[Record], settings: RecallSettings) -> Any:
    """A map for each arm: values found in answers above, values that ranked first below.

    Args:
        task: Name of a task that is measured against depth.
        records: As `measure` gives them.
        settings: Those of the run.

    Returns:
        A figure of matplotlib. A red line shows where the window begins; what is above it, and hatched, was evicted,
        but for the sinks.
    """
    figure = new_figure(2.3 * len(settings.arms) + 1.6, 5.6)
    panels = figure.subplots(2, len(settings.arms), sharex=True, sharey=True, squeeze=False)
    mine = [record for record in records if record["task"] == task]
    begins = _means((record["length"], record["window_begins"]) for record in mine)
    titles = ("in the answer", f"ranked first (chance {settings.chance:.0%})")
    scores: tuple[Callable[[Record], float], ...] = (lambda value: value["found"], lambda value: value["rank"] == 1)
    for line, title, score in zip(panels, titles, scores):
        means = by_depth(mine, settings, score)
        for panel, arm in zip(line, settings.arms):
            image = _map(panel, means, arm, settings)
            _mark_window(panel, begins, settings)
            panel.set_title(arm, fontweight="bold", fontsize=10)
        line[0].set_ylabel(f"{title}\ndepth in the text")
        figure.colorbar(image, ax=list(line), shrink=0.9)
    for panel in panels[-1]:
        panel.set_xlabel("length (tokens)")
    figure.suptitle(f"{task}: red line = the window begins; above it, hatched = evicted", fontsize=11)
    return figure


def capacity_curve(cells: Iterable[Record], settings: RecallSettings) -> Any:
    """Share of the facts that are recalled against their number, for each length and span.

    Args:
        cells: As `cells` gives them.
        settings: Those of the run.

    Returns:
        A figure of matplotlib, with 95 % intervals as bands.
    """
    mine = [cell for cell in cells if cell["facts"] is not None]
    lengths = sorted({cell["length"] for cell in mine})
    labels = [label for label in LABELS if any(cell["label"] == label for cell in mine)]
    figure = new_figure(4.2 * len(labels), 3.1 * len(lengths) + 0.4)
    panels = figure.subplots(len(lengths), len(labels), sharey=True, squeeze=False)
    for line, length in zip(panels, lengths):
        for panel, label in zip(line, labels):
            panel.set_xscale("log", base=2)
            for arm, colour in arm_colours(settings.arms).items():
                of_arm = [c for c in mine if (c["length"], c["label"], c["arm"]) == (length, label, arm)]
                _curve(panel, arm, of_arm, colour)
            panel.set_title(f"{length:,} tokens, {label}", fontsize=10)
            panel.set(ylim=(-0.05, 1.05), xlabel="facts in the text")
            panel.xaxis.set_major_formatter(lambda number, _: f"{number:.0f}")
            panel.grid(alpha=0.3)
        line[0].set_ylabel("facts in the answer")
    panels[0][0].legend(fontsize=8)
    return figure


def by_depth(
    records: Iterable[Record], settings: RecallSettings, score: Callable[[Record], float]
) -> dict[tuple[Any, ...], float]:
    """Means of a score of values by arm, length and the index of the nearest depth."""
    return _means(
        ((record["arm"], record["length"], round(value["depth"] * (settings.depths - 1))), score(value))
        for record in records
        for value in record["values"]
    )


def _means(pairs: Iterable[tuple[Any, float]]) -> dict[Any, float]:
    numbers: dict[Any, list[float]] = {}
    for key, number in pairs:
        numbers.setdefault(key, []).append(number)
    return {key: sum(each) / len(each) for key, each in numbers.items()}


def _map(panel: Any, means: Mapping[tuple[Any, ...], float], arm: str, settings: RecallSettings) -> Any:
    """Depths downwards, lengths to the right; what was not measured stays grey."""
    rows, lengths = range(settings.depths), settings.lengths
    panel.set_facecolor("lightgrey")
    table = [[means.get((arm, length, row), float("nan")) for length in lengths] for row in rows]
    image = panel.imshow(table, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    panel.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=45)
    panel.set_yticks(rows, [f"{settings.depth(row):.0%}" for row in rows])
    for (reader, length, row), mean in means.items() if len(lengths) <= _WRITTEN else ():
        if reader == arm:
            colour = "white" if mean > 0.6 else "black"
            panel.text(lengths.index(length), row, f"{mean:.2g}", ha="center", va="center", color=colour, fontsize=8)
    return image


def _mark_window(panel: Any, begins: Mapping[int, float], settings: RecallSettings) -> None:
    """The line where the window begins, and hatching over what lies before it."""
    top, last = -0.5, settings.depths - 1
    for column, length in enumerate(settings.lengths):
        edge = begins.get(length, 0.0) * last if last else begins.get(length, 0.0) - 0.5
        if edge > top:
            ends = [column - 0.5, column + 0.5]
            panel.fill_between(ends, top, edge, facecolor="none", edgecolor="red", alpha=0.25, hatch="//", lw=0)
            panel.plot(ends, [edge, edge], color="red", linewidth=2)
    panel.set(xlim=(-0.5, len(settings.lengths) - 0.5), ylim=(last + 0.5, -0.5))


def _curve(panel: Any, arm: str, cells: Sequence[Record], colour: str) -> None:
    numbers = [cell["facts"] for cell in cells]
    share, low, high = ([cell["found"][part] for cell in cells] for part in ("share", "low", "high"))
    panel.plot(numbers, share, marker="o", label=arm, color=colour)
    panel.fill_between(numbers, low, high, color=colour, alpha=0.12, linewidth=0)
