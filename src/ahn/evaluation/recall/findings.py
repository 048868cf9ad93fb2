"""What arms find: each reads every text once and answers its questions; scores by span, verdicts and pictures."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ahn._home import new_figure
from ahn.evaluation.arms import ArmReader, arm_reader
from ahn.evaluation.bootstrap import interval
from ahn.evaluation.controls import CONTROLS, Oracle
from ahn.evaluation.drawing import arm_colours
from ahn.evaluation.driver import Job, OnProgress, complete
from ahn.evaluation.journal import Journal
from ahn.evaluation.recall.items import ItemMaker, RecallItem
from ahn.evaluation.recall.tasks import EVICTED, LABELS, RecallSettings, Spec, Value
from ahn.models import prompts

_GROUPED = re.compile(r"(?<=\d),(?=\d{3})")
_DRAWS = 2000  # of a bootstrap; the ends of an interval move by about 0.01 with more
_WRITTEN = 8  # columns up to which each cell of a map has its number written in it

Record = dict[str, Any]


def measure(model: Any, maker: ItemMaker, journal: Journal, on_progress: OnProgress = lambda *_: None) -> list[Record]:
    """The records of all texts and arms; what the journal does not hold yet is read, and kept there at once.

    `on_progress` is told how many of the maker's tokens are read.
    """
    stop = prompts.stop_ids(model, maker.tokenizer)
    jobs = (
        Job(f"{spec.key}/{arm}", lambda _, spec=spec, arm=arm: _record(model, maker, spec, arm, stop), spec.length)  # type: ignore[misc]
        for spec in maker.specs
        for arm in maker.settings.arms
    )
    return list(complete(jobs, journal, on_progress))


def in_answer(value: str, answer: str) -> bool:
    """Whether an answer holds a value as a whole word, whatever its case; a number also as "1,234,567"."""
    plain = _GROUPED.sub("", answer) if value.isdecimal() else answer
    return re.search(rf"(?<!\w){re.escape(value)}(?!\w)", plain, re.IGNORECASE) is not None


def rank(scores: Sequence[float]) -> int:
    """Place of the first of several scores, from 1; others that equal it come before it, and NaN is the lowest."""
    best, *others = (-math.inf if math.isnan(score) else score for score in scores)
    return 1 + sum(other >= best for other in others)


def _record(model: Any, maker: ItemMaker, spec: Spec, arm: str, stop: Collection[int]) -> Record:
    """What is kept of an arm and a text: enough for every table, and to look at single answers."""
    item = maker.item(spec)
    record = {name: getattr(spec, name) for name in ("task", "length", "depth", "facts", "number")} | {"arm": arm}
    record |= {name: getattr(item, name) for name in ("tokens", "window_begins", "moved", "dropped")}
    record |= {"values": [], "answers": [], "seconds": 0.0, "cache_bytes": 0}
    if item.dropped == len(item.labels):
        return record
    controls = {**CONTROLS, Oracle.name: Oracle(item.needles)}
    reader = arm_reader(model, arm, score=False, controls=controls)
    reader.prefill(torch.tensor(_context_for(arm, item, maker.sinks, maker.window)))
    for question, values in item.questions.items():
        counted = [value for value in values if item.labels[value] is not None]
        if counted:
            ranks = _ranks(maker, reader, counted)
            answer = _after(reader, maker.closing(question)).answer(maker.tokenizer, maker.limit(values), stop)
            record["answers"].append(answer)
            record["values"] += [
                {
                    "value": value.text,
                    "label": item.labels[value],
                    "depth": item.depths[value],
                    "found": in_answer(value.text, answer),
                    "rank": ranks[value],
                }
                for value in counted
            ]
    return record | {"seconds": reader.seconds, "cache_bytes": reader.cache_bytes}


def _context_for(arm: str, item: RecallItem, sinks: int, window: int) -> Sequence[int]:
    """What an arm is fed of a text: `tail` would read every window anew, and only the last one counts."""
    if arm != "tail" or len(item.context) <= sinks + window:
        return item.context
    return (*item.context[:sinks], *item.context[-window:])


def _ranks(maker: ItemMaker, reader: ArmReader, values: Sequence[Value]) -> dict[Value, int]:
    """The rank of each value; what several of them are ranked among is read once."""
    ranks: dict[Value, int] = {}
    for question in dict.fromkeys(value.question for value in values):
        asked = _after(reader, maker.closing(question))
        ranked = {value: maker.ranked_values(value) for value in values if value.question == question}
        every = dict.fromkeys(ids for alike in ranked.values() for ids in alike)
        scores = {ids: -float(_after(asked, ids).nll.double().sum()) for ids in every}
        ranks |= {value: rank([scores[ids] for ids in alike]) for value, alike in ranked.items()}
    return ranks


def _after(reader: ArmReader, ids: Sequence[int]) -> ArmReader:
    fork = reader.fork()
    fork.prefill(torch.tensor(ids))
    return fork


def cells(records: Iterable[Record]) -> list[Record]:
    """Scores of records by task, length, number of facts, span and arm, never over several of them.

    Each has `contexts`, `values` and `hits`, the numbers of texts, of values, and of those that answers held; `found`
    and `first`, shares of values in the answers and ranked first, with 95 % intervals over texts; and `mean_rank`.
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
    """A sentence for each arm on the needles that were evicted, above all where it recalls none of them."""
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

    What is above the red line, where the window begins, was evicted, but for the sinks.
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
    top, last = -0.5, settings.depths - 1
    for column, length in enumerate(settings.lengths):
        edge = begins.get(length, 0.0) * last if last else begins.get(length, 0.0) - 0.5
        if edge > top:
            ends = [column - 0.5, column + 0.5]
            panel.fill_between(ends, top, edge, facecolor="none", edgecolor="red", alpha=0.25, hatch="//", lw=0)
            panel.plot(ends, [edge, edge], color="red", linewidth=2)
    panel.set(xlim=(-0.5, len(settings.lengths) - 0.5), ylim=(last + 0.5, -0.5))


def capacity_curve(rows: Iterable[Record], settings: RecallSettings) -> Any:
    """Share of the facts that are recalled against their number, for each length and span, with bands of 95 %."""
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
