"""What the records say: scores of each span and arm with their intervals, and what must not be overlooked."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from ahn.evaluation.bootstrap import interval
from ahn.evaluation.recall.items import RecallSettings
from ahn.evaluation.recall.layout import EVICTED, LABELS

_DRAWS = 2000  # of a bootstrap; the ends of an interval move by about 0.01 with more

Record = dict[str, Any]


def cells(records: Iterable[Record]) -> list[Record]:
    """Scores by task, length, number of facts, span and arm, never over several of them.

    Args:
        records: As `measure` gives them.

    Returns:
        Of each: `task`, `length`, `facts` (or `None`), `label`, `arm`; `contexts`, `values` and `hits`, the numbers of
        texts, of values, and of those that the answers held; `found` and `first`, the shares of values in the answers
        and ranked first, 0 to 1, each with the ends of its 95 % interval over texts; `mean_rank`.
    """
    groups: dict[tuple[Any, ...], list[list[Record]]] = {}
    for record in records:
        for label in LABELS:
            if alike := [value for value in record["values"] if value["label"] == label]:
                key = (record["task"], record["length"], record["facts"], label, record["arm"])
                groups.setdefault(key, []).append(alike)
    tasks = list(dict.fromkeys(key[0] for key in groups))
    rows = [_cell(key, contexts) for key, contexts in groups.items()]
    return sorted(rows, key=lambda c: (tasks.index(c["task"]), c["length"], c["facts"] or 0, LABELS.index(c["label"])))


def _cell(key: tuple[Any, ...], contexts: Sequence[Sequence[Record]]) -> Record:
    values = [value for context in contexts for value in context]
    return {
        **dict(zip(("task", "length", "facts", "label", "arm"), key)),
        "contexts": len(contexts),
        "values": len(values),
        "hits": sum(value["found"] for value in values),
        "found": _share(contexts, lambda value: value["found"]),
        "first": _share(contexts, lambda value: value["rank"] == 1),
        "mean_rank": sum(value["rank"] for value in values) / len(values),
    }


def _share(contexts: Sequence[Sequence[Record]], score: Callable[[Record], float]) -> dict[str, float]:
    """A share over all values; texts are drawn whole, because what one text holds is not independent."""
    rows = np.array([(sum(map(score, context)), len(context)) for context in contexts], dtype=float)

    def share(rows: Any) -> float:
        return float(rows[:, 0].sum() / rows[:, 1].sum())

    ends = (math.nan, math.nan) if len(rows) < 2 else (share(rows),) * 2
    if len(rows) > 1 and share(rows) not in (0.0, 1.0):
        ends = interval(rows, share, draws=_DRAWS)
    return {"share": share(rows), "low": ends[0], "high": ends[1]}


def moved_and_dropped(records: Iterable[Record]) -> tuple[int, int]:
    """How many needles were moved because they straddled two spans, and how many values counted for nothing."""
    texts = {(r["task"], r["length"], r["depth"], r["facts"], r["number"]): r for r in records}.values()
    return sum(text["moved"] for text in texts), sum(text["dropped"] for text in texts)


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
        hits, count = sum(cell["hits"] for cell in mine), sum(cell["values"] for cell in mine)
        first = sum(cell["first"]["share"] * cell["values"] for cell in mine) / count
        verdict = f"found {f'{hits:,}' if hits else 'NONE'} of {count:,} evicted values"
        sentences.append(f"{arm} {verdict}; ranks {first:.0%} of them first, by chance {settings.chance:.0%}.")
    return sentences


def remarks(
    records: Iterable[Record], settings: RecallSettings, left_out: Iterable[tuple[int, int]], trained_context: int
) -> list[str]:
    """What was moved, dropped and left out, and what full attention cannot know, in sentences.

    Args:
        records: As `measure` gives them.
        settings: Those of the run.
        left_out: Lengths and numbers of facts that do not fit into them.
        trained_context: Tokens that the base model was trained on.
    """
    moved, dropped = moved_and_dropped(records)
    sentences = [f"{_counted(moved, 'needle')} moved by some sentences, out of the border of two spans."]
    if dropped:
        sentences.append(f"{_counted(dropped, 'value')} dropped: no place is clear of the border of two spans.")
    sentences += [f"{number:,} facts do not fit into {length:,} tokens." for length, number in left_out]
    if "full" in settings.arms and max(settings.lengths) > trained_context:
        sentences.append(f"full reads more than the {trained_context:,} tokens that the model was trained on.")
    return sentences


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what} was" if number == 1 else f"{number:,} {what}s were"
