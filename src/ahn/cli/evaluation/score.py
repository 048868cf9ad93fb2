"""`ahn eval score`: scores of predictions that were made before, without a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ahn.cli import checks
from ahn.cli.terminal import output, say

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from ahn.evaluation import Average, SetScore

EXAMPLES = """Examples:

ahn eval score predictions.jsonl

ahn eval score preds_longbook_qa_eng.jsonl --scoring paper

ahn eval score lveval-outputs --json scores.json  [dim]# all files of a folder[/dim]
"""
SCORINGS = ("official", "paper")


def command(
    files: Annotated[
        list[str],
        typer.Argument(metavar="FILE", help="Predictions in JSONL, ours or the official scripts', or a folder."),
    ],
    task: Annotated[
        str | None,
        typer.Option(help="Task of lines that name none.  [dim]\\[default: as the file is named][/dim]"),
    ] = None,
    scoring: Annotated[
        str, typer.Option(metavar="official|paper", help="The benchmark's rules or, for En.QA and Zh.QA, the paper's.")
    ] = "official",
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write everything to this file.")] = None,
) -> None:
    """Score predictions of LV-Eval, InfiniteBench and LongBench again, without a model."""
    checks.one_of("--scoring", scoring, SCORINGS)
    json_file = None if json_file is None else json_file.expanduser()
    checks.file_to_write("--json", json_file)
    from ahn.evaluation import averages, read_predictions, score_predictions
    from ahn.evaluation.scores import to_json

    rules: Literal["official", "paper"] = "paper" if scoring == "paper" else "official"
    scores = score_predictions(read_predictions(files, task), rules)
    for title in dict.fromkeys(each.target.benchmark.title for each in scores):
        mine = [each for each in scores if each.target.benchmark.title == title]
        output().print(_table(title, mine, averages(mine)))
    if json_file is not None:
        json_file.write_text(json.dumps(to_json(scores, files), indent=2, ensure_ascii=False) + "\n", "utf-8")
        say(f"wrote {json_file}", console=output())


def _table(title: str, scores: Sequence[SetScore], means: Sequence[Average]) -> Table:
    """A row for every set of one benchmark, and below them the averages, by length where there are lengths."""
    from rich.table import Table

    by_length = any(each.target.length for each in scores)
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("task", no_wrap=True)
    if by_length:
        table.add_column("length", justify="right", no_wrap=True)
    table.add_column("metric")
    for name in ("items", "score"):
        table.add_column(name, justify="right", no_wrap=True)
    for each in scores:
        whole = each.target.task.items
        items = f"{len(each.items):,}" if whole in (None, len(each.items)) else f"{len(each.items):,} of {whole:,}"
        length = [each.target.length or "-"] if by_length else []
        table.add_row(each.target.task.name, *length, each.metric.title, items, f"{each.score:.2f}")
    table.add_section()
    for mean in means:
        length = [mean.length or "-"] if by_length else []
        sets = f"average of {mean.sets} of {mean.of}"
        table.add_row(sets, *length, "", "", f"{mean.score:.2f}", style="bold")
    return table
