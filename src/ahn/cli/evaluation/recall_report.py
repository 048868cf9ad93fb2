"""What `ahn eval recall` says of its results: tables on the screen, a report, a page, figures."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ahn.cli.evaluation.by_arms import add_arms, print_by_arms
from ahn.cli.terminal import say
from ahn.evaluation.page import Page
from ahn.evaluation.recall.plan import Settings
from ahn.evaluation.recall.plot import capacity_curve, heat_map
from ahn.evaluation.recall.results import Cell, Record, cells, facts, moved_and_dropped, verdicts
from ahn.evaluation.recall.spans import EVICTED
from ahn.evaluation.recall.tasks import TASKS
from ahn.evaluation.report import EvaluationReport, environment

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

COLUMNS = ("task", "tokens", "facts", "span", "arm", "texts", "values", "in the answer", "ranked first", "mean rank")


@dataclasses.dataclass
class Found:
    """What a run found.

    Attributes:
        settings: What was measured.
        records: As `measure` gives them.
        left_out: Lengths and numbers of facts that do not fit into them.
        trained_context: Tokens that the base model was trained on.
    """

    settings: Settings
    records: list[Record]
    left_out: list[tuple[int, int]]
    trained_context: int

    def __post_init__(self) -> None:
        self.cells = cells(self.records)

    @property
    def verdicts(self) -> list[str]:
        """What must not be overlooked, a sentence for each arm."""
        return verdicts(self.cells, self.settings)

    @property
    def remarks(self) -> list[str]:
        """What was moved, dropped and left out, and what full attention cannot know."""
        moved, dropped = moved_and_dropped(self.records)
        said = [f"{_counted(moved, 'needle')} moved by some sentences, out of the border of two spans."]
        if dropped:
            said.append(f"{_counted(dropped, 'value')} dropped: no place is clear of the border of two spans.")
        said += [f"{number:,} facts do not fit into {length:,} tokens." for length, number in self.left_out]
        if "full" in self.settings.arms and max(self.settings.lengths) > self.trained_context:
            said.append(f"full reads more than the {self.trained_context:,} tokens that the model was trained on.")
        return said

    @property
    def rows(self) -> dict[tuple[Any, ...], dict[str, Cell]]:
        """Cells by arm, for every task, length, number of facts and span."""
        rows: dict[tuple[Any, ...], dict[str, Cell]] = {}
        for cell in self.cells:
            rows.setdefault((cell.task, cell.length, cell.facts, cell.label), {})[cell.arm] = cell
        return rows


def show(console: Console, found: Found, settings: dict[str, Any]) -> None:
    """Prints the tables, and below them what must not be overlooked."""
    opening = f"window {settings['window']:,}, sinks {settings['sinks']:,}; spans are those when the question begins"
    say(opening, console=console)
    chance = f"{found.settings.chance:.0%}"
    for title, shown in (("In the answer, of all", _hits), (f"Ranked first, % (chance {chance})", _first)):
        print_by_arms(console, found.settings.arms, partial(_table, found, title, shown))
    for sentence in found.verdicts:
        say(sentence, "bold red" if "NONE" in sentence else "bold", console=console)
    for sentence in found.remarks:
        say(sentence, console=console)


def written(found: Found, settings: dict[str, Any], model: Any) -> tuple[EvaluationReport, Page, dict[str, Any]]:
    """EvaluationReport, page and figures."""
    moved, dropped = moved_and_dropped(found.records)
    results = {
        "cells": [facts(cell) for cell in found.cells],
        "verdicts": found.verdicts,
        "chance": found.settings.chance,
        "moved_needles": moved,
        "dropped_values": dropped,
        "left_out": [{"length": length, "facts": number} for length, number in found.left_out],
    }
    where = environment(model, found.settings.seed)
    figures = _figures(found)
    return EvaluationReport("recall", settings, results, where), _page(found, settings, where, figures), figures


def _figures(found: Found) -> dict[str, Any]:
    figures = {
        f"recall_{task}": heat_map(task, found.records, found.settings)
        for task in found.settings.tasks
        if TASKS[task].by == "depth"
    }
    if any(cell.facts is not None for cell in found.cells):
        figures["recall_capacity"] = capacity_curve(found.cells, found.settings)
    return figures


def _page(found: Found, settings: dict[str, Any], where: dict[str, Any], figures: dict[str, Any]) -> Page:
    page = Page(f"Recall by span: {settings['model']}")
    page.text(
        f"Window {settings['window']:,}, sinks {settings['sinks']:,}. A needle is evicted if it had left the window "
        "when the question began, and in the window if it is there until the answer ends."
    )
    page.heading("Evicted needles")
    for sentence in found.verdicts:
        page.text(sentence)
    for sentence in found.remarks:
        page.text(sentence)
    for name, figure in figures.items():
        page.heading(name.removeprefix("recall_"))
        page.figure(figure, f"{name.removeprefix('recall_')}: {TASKS[name.removeprefix('recall_')].title}")
    page.heading("All cells")
    rows = [
        (cell.task, cell.length, cell.facts, cell.label, cell.arm, cell.contexts, cell.values, *_scores(cell))
        for cell in found.cells
    ]
    chance = f"chance of ranking first: {found.settings.chance:.2f}"
    page.table(COLUMNS, rows, f"Shares with 95 % bootstrap intervals over texts; {chance}")
    page.heading("Settings")
    page.facts(settings)
    page.facts(where)
    return page


def _table(found: Found, title: str, shown: Any, arms: Sequence[str]) -> Table:
    """A row for every task, length and span, a column for every arm; zeros of evicted needles stand out."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=0)
    for name in ("task", "tokens", "span"):
        table.add_column(name, justify="right" if name == "tokens" else "left", no_wrap=True)
    add_arms(table, arms)
    last = None
    for (task, length, number, label), row in found.rows.items():
        if last not in (None, task):
            table.add_section()
        last = task
        named = task if number is None else f"{task} {number}"
        scores = [shown(row[arm]) for arm in arms]
        styles = ["bold red" if label == EVICTED and not row[arm].hits else "" for arm in arms]
        table.add_row(named, f"{length:,}", label, *map(Text, scores, styles))
    return table


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what} was" if number == 1 else f"{number:,} {what}s were"


def _hits(cell: Cell) -> str:
    return f"{cell.hits}/{cell.values}"


def _first(cell: Cell) -> str:
    return f"{100 * cell.first.share:.0f}"


def _scores(cell: Cell) -> tuple[str, str, float]:
    return _with_interval(cell.found), _with_interval(cell.first), cell.mean_rank


def _with_interval(score: Any) -> str:
    if math.isnan(score.low):
        return f"{score.share:.2f}"
    return f"{score.share:.2f} ({score.low:.2f} to {score.high:.2f})"
