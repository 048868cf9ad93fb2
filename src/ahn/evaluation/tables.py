"""Results as tables: one description for the terminal and for a page."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_ANY_WIDTH = 10_000
_NARROWEST = 16  # characters of the first column, which may be wrapped
_NUMBER = re.compile(r"[-+−]?\d[\d.,]*( ?\S{1,8})?( \(.*\))?|\d+/\d+|-|")


@dataclasses.dataclass
class ResultTable:
    """Rows of cells.

    Attributes:
        columns: Titles; the last ones may be names of arms, or what may stand below one another.
        rows: Cells, one for each column. Texts stay as they are; whole numbers get separators, others four digits, and
            what is missing (`None`, NaN) is "-".
        caption: What the table shows.
        arms: Titles of these last ones. On a narrow terminal they are shown in groups.
        styles: Styles of the terminal by row, or by row and column.
        sections: Rows before which a line is drawn.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""
    arms: Sequence[str] = ()
    styles: dict[Any, str] = dataclasses.field(default_factory=dict)
    sections: Sequence[int] = ()

    def __post_init__(self) -> None:
        self.cells = [[show_cell(value) for value in row] for row in self.rows]
        self.numeric = [
            all(_NUMBER.fullmatch(row[column]) for row in self.cells) for column in range(len(self.columns))
        ]

    def print(self, console: Console) -> None:
        """Prints caption and table: several below one another, with some of the arms each, where one is too wide."""
        if self.caption:
            console.print(self.caption, style="bold", markup=False, soft_wrap=True)
        labels = len(self.columns) - len(self.arms)
        group = list(range(labels))
        for column in range(labels, len(self.columns)):
            if len(group) > labels and self._width(console, [*group, column]) > console.width:
                console.print(self._rich(group))
                group = group[:labels]
            group.append(column)
        console.print(self._rich(group))

    def _width(self, console: Console, columns: Sequence[int]) -> int:
        return console.measure(self._rich(columns), options=console.options.update(width=_ANY_WIDTH)).minimum

    def _rich(self, columns: Sequence[int]) -> Table:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, header_style="bold")
        for column in columns:
            name = self.columns[column]
            heading = name.replace(":", ":\n") if name in self.arms else name
            wrapped = column == 0 and bool(self.arms) and any(len(row[0]) > _NARROWEST for row in self.cells)
            table.add_column(
                heading,
                justify="right" if self.numeric[column] or name in self.arms else "left",
                no_wrap=not wrapped,
                min_width=_NARROWEST if wrapped else None,
                overflow="fold",
            )
        for number, row in enumerate(self.cells):
            if number in self.sections:
                table.add_section()
            cells = [Text(row[column], self.styles.get((number, column), "")) for column in columns]
            table.add_row(*cells, style=self.styles.get(number))
        return table


def show_cell(value: Any) -> str:
    """A value as a cell shows it, see `ResultTable`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "-" if value is None else str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.4g}" if math.isfinite(value) else "-"


def with_interval(value: float, low: float | None, high: float | None, digits: int = 2, ends: int = 2) -> str:
    """A number and the ends of its interval: "0.25 (0.20 to 0.31)".

    Args:
        value: The number.
        low: Lower end; `None` or NaN for no interval.
        high: Upper end.
        digits: Digits of the number behind the point.
        ends: Those of the ends.
    """
    text = f"{value:.{digits}f}"
    return text if low is None or math.isnan(low) else f"{text} ({low:.{ends}f} to {high:.{ends}f})"
