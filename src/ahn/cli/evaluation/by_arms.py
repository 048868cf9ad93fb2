"""Tables with a column for every arm: several, one below the other, where one would be too wide for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.console import Console
    from rich.table import Table

_ANY_WIDTH = 10_000


def print_by_arms(console: Console, arms: Sequence[str], table: Callable[[Sequence[str]], Table]) -> None:
    """Prints a table, split so that no column is cut.

    Args:
        console: Where to.
        arms: Names of all arms.
        table: Makes the table of some of them, whose columns are those of `add_arms`.
    """
    group: list[str] = []
    for arm in arms:
        if group and _width(console, table([*group, arm])) > console.width:
            console.print(table(group))
            group = []
        group.append(arm)
    console.print(table(group))


def add_arms(table: Table, arms: Sequence[str]) -> None:
    """Adds a column for every arm, whose heading is broken before the name of a score.

    Args:
        table: The table.
        arms: Names of the arms.
    """
    for arm in arms:
        table.add_column(arm.replace(":", ":\n"), justify="right", no_wrap=True)


def _width(console: Console, table: Table) -> int:
    """Characters that a table needs at least."""
    return console.measure(table, options=console.options.update(width=_ANY_WIDTH)).minimum
