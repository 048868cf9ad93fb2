"""`ahn eval compare`: two reports of the same command, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ahn.cli.terminal import output, say

EXAMPLES = """Examples:

ahn eval compare before/report.json after/report.json

ahn eval compare before after  [dim]# folders of --out[/dim]
"""


def command(
    first: Annotated[Path, typer.Argument(metavar="A", help="The report.json of an evaluation, or its folder.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another of the same command.")],
    everything: Annotated[
        bool, typer.Option("--all", help="Also show numbers that are equal, and each document or item.")
    ] = False,
) -> None:
    """Show how two evaluations differ: their settings, and their results number by number."""
    from rich import box
    from rich.table import Table

    from ahn.cli.evaluation.options import REPORT
    from ahn.evaluation.comparison import compare
    from ahn.evaluation.report import read_report

    paths = [path / REPORT if path.is_dir() else path for path in (first.expanduser(), second.expanduser())]
    found = compare(read_report(paths[0]), read_report(paths[1]), everything)
    for title, rows, columns in (
        (f"Settings of {found.command} that differ", found.settings, ["setting", "A", "B"]),
        ("Measured with", found.environment, ["", "A", "B"]),
        ("Results", found.results, ["result", "A", "B", "B - A"]),
    ):
        if not rows:
            say(f"{title}: none" if columns[0] else f"{title} the same", console=output())
            continue
        shown = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
        for number, name in enumerate(columns):
            shown.add_column(name, justify="right" if columns[-1] == "B - A" and number else "left", overflow="fold")
        for row in rows:
            shown.add_row(*row)
        output().print(shown)
