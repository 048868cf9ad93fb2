"""`ahn eval qmsum`: how well each arm knows the answers to questions about meetings, by where the evidence is."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ahn.cli import checks
from ahn.cli.evaluation import options
from ahn.cli.evaluation.by_arms import print_by_arms
from ahn.cli.progress import work_bar
from ahn.cli.terminal import UsageError, notes, output, say

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from ahn.cli.evaluation.options import Run
    from ahn.evaluation.qmsum.meetings import Meeting
    from ahn.evaluation.qmsum.results import Results
    from ahn.evaluation.qmsum.run import Item

EXAMPLES = """Examples:

ahn eval qmsum qmsum --limit 5

ahn eval qmsum qmsum --arms full,window,ahn,tail --max-tokens 8192 --out meetings

ahn eval qmsum qmsum --limit 2 --answers 128  [dim]# ROUGE-L of written answers too[/dim]
"""


def command(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder with QMSum's JSON files.")],
    limit: Annotated[
        int | None, typer.Option(help="First meetings that are read.  [dim]\\[default: all][/dim]")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Leave longer meetings out, a question and its answer included.")
    ] = None,
    answers: Annotated[int, typer.Option(help="Also write answers of so many tokens, for ROUGE-L.")] = 0,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="The chat template.  [dim]\\[default: if there is one][/dim]"),
    ] = None,
    arms: options.Arms = "window,ahn,tail",
    model: options.Model = options.MODEL,
    adapter: options.Adapter = None,
    window: options.Window = options.WINDOW,
    sinks: options.Sinks = options.SINKS,
    sink_positions: options.SinkPositions = options.SINK_POSITIONS,
    out: options.Out = None,
    seed: options.Seed = 0,
) -> None:
    """Score the gold answers to questions about meetings, split by whether their evidence has left the window."""
    checks.at_least("--limit", limit, 1)
    checks.at_least("--max-tokens", max_tokens, 1)
    checks.at_least("--answers", answers, 0)
    from ahn.evaluation.qmsum.meetings import checksum, read_meetings

    if answers:
        from ahn.evaluation.libraries import rouge

        rouge()
    meetings = read_meetings(folder.expanduser(), limit)
    run = options.open_run(
        "qmsum",
        model=model,
        adapter=adapter,
        window=window,
        sinks=sinks,
        sink_positions=sink_positions,
        arms=arms,
        out=out,
        seed=seed,
        limit=limit,
        max_tokens=max_tokens,
        answers=answers,
        chat=chat,
        meetings=checksum(meetings),
    )
    _run(run, meetings, max_tokens)


def _run(run: Run, meetings: Sequence[Meeting], max_tokens: int | None) -> None:
    """The part that needs the model."""
    loaded = run.load()
    from ahn.evaluation.qmsum import show
    from ahn.evaluation.qmsum.results import results
    from ahn.evaluation.qmsum.run import check_positions, measure
    from ahn.evaluation.report import Report, environment

    with notes().status("Counting tokens ..."):
        items = _items(run, loaded.tokenizer, meetings, max_tokens)
    if "full" in run.arms:
        check_positions(items, loaded.model)
    total = len(run.arms) * sum(each.work for each in items)
    with run.working(), work_bar(notes(), total, "tokens", "read") as progress:
        new_tokens = run.settings["answers"]
        records = measure(loaded.model, loaded.tokenizer, items, run.arms, run.journal, progress, new_tokens)
    found = results(records, run.arms)
    print_by_arms(output(), run.arms, partial(_table, found))
    if run.out is not None:
        report = Report("qmsum", run.settings, found, environment(loaded.model, run.settings["seed"]))
        figure = show.figure(found)
        run.finish(report, show.page(report, figure), {} if figure is None else {"differences": figure})


def _items(run: Run, tokenizer: Any, meetings: Sequence[Meeting], max_tokens: int | None) -> list[Item]:
    """The meetings in tokens, without those that are too long."""
    from ahn.evaluation.qmsum.run import item
    from ahn.models import prompts

    chat = prompts.has_chat(tokenizer) if run.settings["chat"] is None else run.settings["chat"]
    every = [item(each, tokenizer, run.settings["window"], run.settings["sinks"], chat) for each in meetings]
    items = [each for each in every if max_tokens is None or each.longest <= max_tokens]
    if not items:
        shortest = min(each.longest for each in every)
        raise UsageError(f"no meeting has at most {max_tokens:,} tokens; the shortest has {shortest:,}.")
    if len(items) < len(every):
        say(f"{len(every) - len(items)} of {len(every)} meetings are longer than --max-tokens and left out")
    return items


def _table(found: Results, arms: Sequence[str]) -> Table:
    """Nats per token of every group and arm; ROUGE-L below where answers were written."""
    from ahn.cli.evaluation.run_tables import empty

    table = empty(["evidence", "questions"], arms)
    for name, title, digits in (("nats", "nats per token", 3), ("rouge_l", "ROUGE-L", 1)):
        if name in found["groups"]["all"]:
            table.add_section()
            table.add_row(title, style="bold")
            for group, each in found["groups"].items():
                if each["queries"]:
                    values = (f"{each[name][arm]['value']:.{digits}f}" for arm in arms)
                    table.add_row(group, f"{each['queries']:,}", *values)
    return table
