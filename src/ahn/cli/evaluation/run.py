"""`ahn eval run`: public benchmarks, asked in several arms and scored side by side."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ahn.cli import checks
from ahn.cli.evaluation import options
from ahn.cli.evaluation.options import Run
from ahn.cli.evaluation.score import SCORINGS
from ahn.cli.progress import work_bar
from ahn.cli.terminal import UsageError, notes, output

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from ahn.evaluation.asking.results import Results
    from ahn.evaluation.asking.sets import QuestionSet, Way

EXAMPLES = """Examples:

ahn eval run --tasks passkey,kv_retrieval --data infinitebench --out passkey

ahn eval run --tasks cmrc_mixup_16k --data lveval --max-tokens 8000 --limit 20

ahn eval run --tasks longbook_qa_eng --data infinitebench --scoring paper
"""
PREDICTIONS = "predictions"


def command(
    tasks: Annotated[str, typer.Option(help="Names of tasks, joined by commas.")],
    data: Annotated[
        str | None, typer.Option(help="Folder of the JSONL files, or a hub id.  [dim]\\[default: the hub's own][/dim]")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="First records of each task that are asked.  [dim]\\[default: all][/dim]")
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of a prompt at most, by the benchmark's rule.  [dim]\\[default: no limit][/dim]"),
    ] = None,
    scoring: Annotated[
        str, typer.Option(metavar="official|paper", help="The benchmark's rules or, for En.QA and Zh.QA, the paper's.")
    ] = "official",
    prompts: Annotated[Path | None, typer.Option(help="JSON or YAML with templates of your own.")] = None,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="The chat template.  [dim]\\[default: if there is one][/dim]"),
    ] = None,
    arms: options.Arms = "full,window,ahn",
    model: options.Model = options.MODEL,
    adapter: options.Adapter = None,
    window: options.Window = options.WINDOW,
    sinks: options.Sinks = options.SINKS,
    sink_positions: options.SinkPositions = options.SINK_POSITIONS,
    out: options.Out = None,
    seed: options.Seed = 0,
) -> None:
    """Ask the tasks of public benchmarks in several arms and score them side by side."""
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise UsageError("there is no task. Name some with --tasks, for example --tasks passkey.")
    checks.at_least("--limit", limit, 1)
    checks.at_least("--max-tokens", max_tokens, 2)
    checks.one_of("--scoring", scoring, SCORINGS)
    checks.file_to_read("--prompts", prompts)
    shared: dict[str, Any] = {
        "model": model,
        "adapter": adapter,
        "window": window,
        "sinks": sinks,
        "sink_positions": sink_positions,
        "arms": arms,
        "out": out,
        "seed": seed,
    }
    options.arm_names(arms)
    checks.span(window, sinks, sink_positions)
    from ahn.evaluation.asking.sets import Way, check_sets
    from ahn.evaluation.benchmarks.prompts import read_prompts

    templates = {} if prompts is None else read_prompts(prompts.expanduser())
    way = Way("paper" if scoring == "paper" else "official", templates, max_tokens, bool(chat))
    with notes().status("Reading the records ..."):
        sets = check_sets(names, data, way, limit)
    run = options.open_run(
        "run",
        **shared,
        tasks=[each.target.name for each in sets],
        limit=limit,
        max_tokens=max_tokens,
        scoring=scoring,
        prompts={name: hashlib.sha256(template.encode()).hexdigest() for name, template in templates.items()},
        chat=chat,
        records={each.target.name: each.checksum for each in sets},
    )
    _run(run, sets, way, chat)


def _run(run: Run, sets: Sequence[QuestionSet], way: Way, chat: bool | None) -> None:
    """The part that needs the model."""
    import dataclasses

    loaded = run.load()
    from ahn import prompts
    from ahn.evaluation.asking import show
    from ahn.evaluation.asking.results import results
    from ahn.evaluation.asking.run import Asking, ask
    from ahn.evaluation.report import Report, environment

    way = dataclasses.replace(way, chat=prompts.has_chat(loaded.tokenizer) if chat is None else chat)
    asking = Asking(loaded.model, loaded.tokenizer, run.arms, way)
    with notes().status("Counting tokens ..."):
        lengths = asking.lengths(sets)
    total = len(run.arms) * sum(sum(counts) for counts in lengths.values())
    with run.working(), work_bar(notes(), total, "tokens", "read") as progress:
        folder = None if run.out is None else run.out / PREDICTIONS
        records = ask(asking, sets, lengths, run.journal, progress, folder)
    found = results(records, run.arms, way.scoring)
    output().print(_table(found, run.arms))
    if run.out is not None:
        report = Report("run", run.settings, {"benchmarks": found}, environment(loaded.model, run.settings["seed"]))
        figure = show.figure(found)
        run.finish(report, show.page(report, figure), {"scores": figure})


def _table(found: Results, arms: Sequence[str]) -> Table:
    """A row for every set, and below them the averages; a column for every arm."""
    from rich import box
    from rich.table import Table

    from ahn.evaluation.asking.show import set_name

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, show_edge=False)
    table.add_column("set", no_wrap=True)
    for name in ("items", *arms):
        table.add_column(name, justify="right", no_wrap=True)
    for each in found["sets"]:
        scores = [f"{each['scores'][arm]['score']:.2f}" for arm in arms]
        table.add_row(set_name(each), f"{each['items']:,}", *scores)
    table.add_section()
    for each in found["averages"]:
        length = "" if each["length"] is None else f", {each['length']}"
        name = f"average of {each['sets']} of {each['of']}{length}"
        table.add_row(name, "", *(f"{each['scores'][arm]:.2f}" for arm in arms), style="bold")
    return table
