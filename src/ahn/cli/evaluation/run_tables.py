"""What `ahn eval run` prints: the arms side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ahn.cli.evaluation.by_arms import add_arms

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from ahn.evaluation.benchmarks.summary import Results


_NUMBERS = ("items", "questions")


def scores(found: Results, arms: Sequence[str]) -> Table:
    """A row for every set, and below them the averages; a column for every arm."""
    from ahn.evaluation.benchmarks.page import set_name

    table = empty(["set", "items"], arms)
    for each in found["sets"]:
        scores = [f"{each['scores'][arm]['score']:.2f}" for arm in arms]
        table.add_row(set_name(each), f"{each['items']:,}", *scores)
    table.add_section()
    for each in found["averages"]:
        length = "" if each["length"] is None else f", {each['length']}"
        name = f"average of {each['sets']} of {each['of']}{length}"
        table.add_row(name, "", *(f"{each['scores'][arm]:.2f}" for arm in arms), style="bold")
    return table


def harness(rows: Sequence[dict[str, Any]], arms: Sequence[str]) -> Table:
    """A row for every metric of every task of lm-evaluation-harness, as the harness gives it."""
    table = empty(["task", "metric", "items"], arms)
    for row in rows:
        items = "-" if row["items"] is None else f"{row['items']:,}"
        table.add_row(row["task"], row["metric"], items, *(f"{row['scores'][arm]:.4g}" for arm in arms))
    return table


def empty(labels: Sequence[str], arms: Sequence[str]) -> Table:
    """A table without rows.

    Args:
        labels: Headings of what stands left of the arms: a name and numbers.
        arms: Names of the arms.
    """
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, show_edge=False)
    for name in labels:
        table.add_column(name, justify="right" if name in _NUMBERS else "left", no_wrap=True)
    add_arms(table, arms)
    return table
