"""What the records say: scores of each span and arm with their intervals, and what must not be overlooked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import numpy as np

from ahn.evaluation.bootstrap import interval
from ahn.evaluation.recall.plan import Settings
from ahn.evaluation.recall.spans import LABELS

_DRAWS = 2000  # of a bootstrap; the ends of an interval move by about 0.01 with more

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Score:
    """A share of values.

    Attributes:
        share: The share, 0 to 1; NaN where there are no values.
        low: Lower end of its 95 % bootstrap interval over contexts; NaN for fewer than two contexts.
        high: Upper end.
    """

    share: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Cell:
    """Scores of the values of one span, in one arm.

    Attributes:
        task: Name of the task.
        length: Tokens of the prompts.
        facts: Number of facts in each context, or `None` where the task is not measured against it.
        label: Span of the needles, of `LABELS`.
        arm: The arm.
        contexts: Number of contexts with such values.
        values: Number of values.
        hits: Number of values that the answers held.
        found: Share of the values that the answers held.
        first: Share of the values that ranked first among wrong ones.
        mean_rank: Mean rank.
    """

    task: str
    length: int
    facts: int | None
    label: str
    arm: str
    contexts: int
    values: int
    hits: int
    found: Score
    first: Score
    mean_rank: float


def cells(records: Iterable[Record]) -> list[Cell]:
    """Scores by task, length, number of facts, span and arm, never over several of them.

    Args:
        records: As `measure` gives them.
    """
    groups: dict[tuple[Any, ...], list[list[Record]]] = {}
    for record in records:
        for label in LABELS:
            if alike := [value for value in record["values"] if value["label"] == label]:
                key = (record["task"], record["length"], record["facts"], label, record["arm"])
                groups.setdefault(key, []).append(alike)
    order = {label: place for place, label in enumerate(LABELS)}
    made = [_cell(key, contexts) for key, contexts in groups.items()]
    places = {task: place for place, task in enumerate(dict.fromkeys(cell.task for cell in made))}
    return sorted(made, key=lambda cell: (places[cell.task], cell.length, cell.facts or 0, order[cell.label]))


def by_depth(records: Iterable[Record], settings: Settings, score: Callable[[Record], float]) -> dict[Hashable, float]:
    """Means of a score by task, arm, length and the index of the nearest depth.

    Args:
        records: As `measure` gives them.
        settings: Those of the run.
        score: A number for one value of a record, such as `is_found`.
    """
    found: dict[Hashable, list[float]] = {}
    for record in records:
        for value in record["values"]:
            row = round(value["depth"] * (settings.depths - 1))
            found.setdefault((record["task"], record["arm"], record["length"], row), []).append(score(value))
    return {key: sum(scores) / len(scores) for key, scores in found.items()}


def is_found(value: Record) -> float:
    """1 for a value that the answer held."""
    return float(value["found"])


def is_first(value: Record) -> float:
    """1 for a value that ranked first."""
    return float(value["rank"] == 1)


def moved_and_dropped(records: Iterable[Record]) -> tuple[int, int]:
    """How many needles were moved because they straddled two spans, and how many values counted for nothing."""
    contexts = {(r["task"], r["length"], r["depth"], r["facts"], r["number"]): r for r in records}.values()
    return sum(each["moved"] for each in contexts), sum(each["dropped"] for each in contexts)


def verdicts(found: Sequence[Cell], settings: Settings) -> list[str]:
    """A sentence for each arm on the needles that were evicted, above all where it recalls none of them.

    Args:
        found: As `cells` gives them.
        settings: Those of the run.
    """
    gone = [cell for cell in found if cell.label == "evicted"]
    if not gone:
        return ["No needle was evicted: take longer --lengths or a smaller --window to measure what a memory recalls."]
    sentences = []
    for arm in settings.arms:
        mine = [cell for cell in gone if cell.arm == arm]
        hits, count = sum(cell.hits for cell in mine), sum(cell.values for cell in mine)
        first = sum(cell.first.share * cell.values for cell in mine) / count
        said = f"found {hits:,} of {count:,} evicted values" if hits else f"found NONE of {count:,} evicted values"
        sentences.append(f"{arm} {said}; ranks {first:.0%} of them first, by chance {settings.chance:.0%}.")
    return sentences


def facts(cell: Cell) -> Record:
    """A cell as plain values, ready for JSON."""
    return dataclasses.asdict(cell)


def _cell(key: tuple[Any, ...], contexts: Sequence[Sequence[Record]]) -> Cell:
    values = [value for context in contexts for value in context]
    hits = sum(value["found"] for value in values)
    ranks = sum(value["rank"] for value in values)
    task, length, number, label, arm = key
    return Cell(
        task,
        length,
        number,
        label,
        arm,
        contexts=len(contexts),
        values=len(values),
        hits=hits,
        found=_score(contexts, is_found),
        first=_score(contexts, is_first),
        mean_rank=ranks / len(values),
    )


def _score(contexts: Sequence[Sequence[Record]], score: Callable[[Record], float]) -> Score:
    """A share over all values; contexts are drawn whole, because what stands in one text is not independent."""
    rows = np.array([(sum(map(score, context)), len(context)) for context in contexts], dtype=float)
    share = _share(rows)
    if len(rows) < 2:
        return Score(share, math.nan, math.nan)
    if share in (0.0, 1.0):
        return Score(share, share, share)
    return Score(share, *interval(rows, _share, draws=_DRAWS))


def _share(rows: Any) -> float:
    return float(rows[:, 0].sum() / rows[:, 1].sum())
