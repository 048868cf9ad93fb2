"""`ahn eval compare`: two reports of the same command, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ahn.cli.terminal import log, output

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
    from ahn.cli.evaluation.runs import REPORT
    from ahn.evaluation.differences import compare
    from ahn.evaluation.report import read_report
    from ahn.evaluation.tables import ResultTable

    paths = [path / REPORT if path.is_dir() else path for path in (first.expanduser(), second.expanduser())]
    differences = compare(read_report(paths[0]), read_report(paths[1]), everything)
    for title, rows, columns in (
        (f"Settings of {differences.command} that differ", differences.settings, ["setting", "A", "B"]),
        ("Versions, device and date that differ", differences.environment, ["", "A", "B"]),
        ("All results" if everything else "Results that differ", differences.results, ["result", "A", "B", "B - A"]),
    ):
        if rows:
            ResultTable(columns, rows, title).print(output())
        else:
            log(f"{title}: none", console=output())
