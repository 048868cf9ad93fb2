"""What the records say: scores of each span and arm with intervals, what must not be overlooked, and pictures."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ahn.evaluation.bootstrap import interval
from ahn.evaluation.drawing import arm_colours, new_figure
from ahn.evaluation.recall.items import EVICTED, LABELS
from ahn.evaluation.recall.tasks import RecallSettings

_DRAWS = 2000  # of a bootstrap; the ends of an interval move by about 0.01 with more
_WRITTEN = 8  # columns up to which each cell of a map has its number written in it

Record = dict[str, Any]


def cells(records: Iterable[Record]) -> list[Record]:
    """Scores by task, length, number of facts, span and arm, never over several of them.

    Args:
        records: As `measure` gives them.

    Returns:
        Of each: `contexts`, `values` and `hits`, the numbers of texts, of values, and of those that answers held;
        `found` and `first`, shares of values in the answers and ranked first, with 95 % intervals; `mean_rank`.
    """
    groups: dict[tuple[Any, ...], list[list[Record]]] = {}
    for record in records:
        for label in LABELS:
            if alike := [value for value in record["values"] if value["label"] == label]:
                key = (record["task"], record["length"], record["facts"], label, record["arm"])
                groups.setdefault(key, []).append(alike)
    tasks = list(dict.fromkeys(key[0] for key in groups))
    order = sorted(groups, key=lambda key: (tasks.index(key[0]), key[1], key[2] or 0, LABELS.index(key[3])))
    return [_cell(key, groups[key]) for key in order]


def _cell(key: tuple[Any, ...], contexts: Sequence[Sequence[Record]]) -> Record:
    ranks = [value["rank"] for context in contexts for value in context]
    return {
        **dict(zip(("task", "length", "facts", "label", "arm"), key)),
        "contexts": len(contexts),
        "values": len(ranks),
        "hits": sum(value["found"] for context in contexts for value in context),
        "found": _share([[value["found"] for value in context] for context in contexts]),
        "first": _share([[value["rank"] == 1 for value in context] for context in contexts]),
        "mean_rank": sum(ranks) / len(ranks),
    }


def _share(contexts: Sequence[Sequence[bool]]) -> dict[str, float]:
    """A share over all values; texts are drawn whole, because what one text holds is not independent."""
    rows = np.array([(sum(context), len(context)) for context in contexts], dtype=float)
    share = _ratio(rows)
    if len(rows) < 2:
        return {"share": share, "low": math.nan, "high": math.nan}
    low, high = (share, share) if share in (0.0, 1.0) else interval(rows, _ratio, draws=_DRAWS)
    return {"share": share, "low": low, "high": high}


def _ratio(rows: Any) -> float:
    return float(rows[:, 0].sum() / rows[:, 1].sum())


def verdicts(rows: Iterable[Record], settings: RecallSettings) -> list[str]:
    """A sentence for each arm on the needles that were evicted, above all where it recalls none of them.

    Args:
        rows: As `cells` gives them.
        settings: Those of the run.
    """
    evicted = [cell for cell in rows if cell["label"] == EVICTED]
    if not evicted:
        return ["No needle was evicted: take longer --lengths or a smaller --window to measure what a memory recalls."]
    sentences = []
    for arm in settings.arms:
        mine = [cell for cell in evicted if cell["arm"] == arm]
        hits, count = (sum(cell[name] for cell in mine) for name in ("hits", "values"))
        first = sum(cell["first"]["share"] * cell["values"] for cell in mine) / count
        verdict = f"found {f'{hits:,}' if hits else 'NONE'} of {count:,} evicted values"
        sentences.append(f"{arm} {verdict}; ranks {first:.0%} of them first, by chance {settings.chance:.0%}.")
    return sentences


def moved_and_dropped(records: Iterable[Record]) -> tuple[int, int]:
    """How many needles were moved because they straddled two spans, and how many values counted for nothing."""
    texts = {tuple(r[name] for name in ("task", "length", "depth", "facts", "number")): r for r in records}.values()
    return sum(text["moved"] for text in texts), sum(text["dropped"] for text in texts)


def heat_map(task: str, records: Sequence[Record], settings: RecallSettings) -> Any:
    """A map of depth and length for each arm: values found in answers above, values that ranked first below.

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
    for line, title, means in zip(panels, titles, by_depth(mine, settings)):
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


def by_depth(records: Iterable[Record], settings: RecallSettings) -> list[dict[tuple[str, int, int], float]]:
    """Shares of values in the answers, and of those ranked first, by arm, length and index of the nearest depth."""
    values = [
        ((record["arm"], record["length"], round(value["depth"] * (settings.depths - 1))), value)
        for record in records
        for value in record["values"]
    ]
    return [
        _means((key, value["found"]) for key, value in values),
        _means((key, value["rank"] == 1) for key, value in values),
    ]


def _means(pairs: Iterable[tuple[Any, float]]) -> dict[Any, float]:
    numbers: dict[Any, list[float]] = {}
    for key, number in pairs:
        numbers.setdefault(key, []).append(number)
    return {key: sum(each) / len(each) for key, each in numbers.items()}


def _map(panel: Any, means: Mapping[tuple[str, int, int], float], arm: str, settings: RecallSettings) -> Any:
    """Depths downwards, lengths to the right; what was not measured stays grey."""
    rows, lengths = range(settings.depths), settings.lengths
    panel.set_facecolor("lightgrey")
    table = [[means.get((arm, length, row), math.nan) for length in lengths] for row in rows]
    image = panel.imshow(table, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    panel.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=45)
    panel.set_yticks(rows, [f"{settings.depth(row):.0%}" for row in rows])
    for (name, length, row), mean in means.items() if len(lengths) <= _WRITTEN else ():
        if name == arm:
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


def capacity_curve(rows: Iterable[Record], settings: RecallSettings) -> Any:
    """Share of the facts that are recalled against their number, for each length and span.

    Args:
        rows: As `cells` gives them.
        settings: Those of the run.

    Returns:
        A figure of matplotlib, with 95 % intervals as bands.
    """
    mine = [cell for cell in rows if cell["facts"] is not None]
    lengths = sorted({cell["length"] for cell in mine})
    labels = [label for label in LABELS if any(cell["label"] == label for cell in mine)]
    figure = new_figure(4.2 * len(labels), 3.1 * len(lengths) + 0.4)
    panels = figure.subplots(len(lengths), len(labels), sharey=True, squeeze=False)
    for panel, (length, label) in zip(panels.flat, itertools.product(lengths, labels)):
        for arm, colour in arm_colours(settings.arms).items():
            curve = [c for c in mine if (c["length"], c["label"], c["arm"]) == (length, label, arm)]
            counts = [cell["facts"] for cell in curve]
            share, low, high = ([cell["found"][part] for cell in curve] for part in ("share", "low", "high"))
            panel.plot(counts, share, marker="o", label=arm, color=colour)
            panel.fill_between(counts, low, high, color=colour, alpha=0.12, linewidth=0)
        panel.set_title(f"{length:,} tokens, {label}", fontsize=10)
        panel.set(ylim=(-0.05, 1.05), xlabel="facts in the text")
        if panel.dataLim.xmax > 0:  # some facts were asked for here
            panel.set_xscale("log", base=2)
            panel.xaxis.set_major_formatter(lambda number, _: f"{number:.0f}")
        panel.grid(alpha=0.3)
    for line in panels:
        line[0].set_ylabel("facts in the answer")
    panels[0][0].legend(fontsize=8)
    return figure
