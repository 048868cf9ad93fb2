"""`ahn eval recall`: is a fact found again, split by where it is when it is asked for."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ahn.cli import checks
from ahn.cli.evaluation import options
from ahn.cli.evaluation.options import open_run
from ahn.cli.terminal import UsageError, notes, output, say
from ahn.cli.texts import reference
from ahn.evaluation import arm_names
from ahn.evaluation.recall.tasks import TASKS

if TYPE_CHECKING:
    from ahn.cli.loading import Loaded
    from ahn.evaluation.recall.plan import Plan, Settings

EXAMPLES = """Examples:

ahn eval recall --window 256 --lengths 1024 --items 1  [dim]# a first look[/dim]

ahn eval recall --tasks number,multi_key --lengths 2048,4096 --out recall

ahn eval recall --tasks capacity --facts 4,8,16,32,64 --arms full,window,ahn

ahn eval recall --arms full,window+64,ahn+64,ahn+64:random,ahn+64:oracle  [dim]# oracle: told which tokens to keep[/dim]
"""
ARMS = ",".join(arm_names.ARMS)


def command(
    tasks: Annotated[str, typer.Option(help=f"Joined by commas: {', '.join(TASKS)}.")] = "number,capacity",
    lengths: Annotated[str, typer.Option(help="Tokens of the prompts, joined by commas.")] = "1024,2048,4096",
    depths: Annotated[int, typer.Option(help="Depths of a needle, evenly spread over the text.")] = 5,
    items: Annotated[int, typer.Option(help="Texts of each task, length and depth or number of facts.")] = 2,
    values: Annotated[
        int, typer.Option(help="Values asked for by multi_value, multi_query, variables and capacity.")
    ] = 4,
    facts: Annotated[str, typer.Option(help="Numbers of facts that capacity hides, joined by commas.")] = "4,8,16,32",
    distractors: Annotated[int, typer.Option(help="Wrong values that a right one is ranked among.")] = 9,
    haystack: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Text around needles.  [dim]\\[default: Python's reference][/dim]"),
    ] = None,
    arms: options.Arms = ARMS,
    window: options.Window = options.WINDOW,
    sinks: options.Sinks = options.SINKS,
    sink_positions: options.SinkPositions = options.SINK_POSITIONS,
    adapter: options.Adapter = None,
    model: options.Model = options.MODEL,
    out: options.Out = None,
    seed: options.Seed = 0,
) -> None:
    """Hide facts in a text and ask for them: sinks, window and what was evicted are scored apart."""
    names = checks.several_of("--tasks", tasks, tuple(TASKS))
    tokens, numbers = _numbers("--lengths", lengths), _numbers("--facts", facts)
    counts = {"--depths": depths, "--items": items, "--values": values, "--distractors": distractors}
    for option, value in counts.items():
        checks.at_least(option, value, 1)
    title = "Python's reference" if haystack is None else "a file"
    text = reference() if haystack is None else checks.text_file("--haystack", haystack)
    own: dict[str, Any] = {
        "tasks": names,
        "lengths": tokens,
        "depths": depths,
        "items": items,
        "values": values,
        "facts": numbers,
        "distractors": distractors,
    }
    run = open_run(
        "recall",
        model=model,
        adapter=adapter,
        window=window,
        sinks=sinks,
        sink_positions=sink_positions,
        arms=arms,
        out=out,
        seed=seed,
        haystack=f"{title}, SHA-256 {hashlib.sha256(text.encode()).hexdigest()[:16]}",
        **own,
    )
    from ahn.evaluation.recall.plan import Settings

    lists = {"tasks", "lengths", "facts"}
    chosen: dict[str, Any] = {name: tuple(value) if name in lists else value for name, value in own.items()}
    _run(run, Settings(arms=tuple(run.arms), seed=seed, **chosen), text)


def _run(run: options.Run, settings: Settings, text: str) -> None:
    """The part that needs the library: loads, plans, reads, reports."""
    loaded = run.load()
    from ahn.attachment import attachment_of
    from ahn.cli.evaluation import recall_report
    from ahn.cli.terminal import work_bar
    from ahn.evaluation.recall.run import measure

    if loaded.adapter is None and "ahn" in run.arms:
        say("the memory is untrained: ahn answers as window does", "yellow")
    plan = _plan(loaded, run, settings, text)
    say(
        f"texts: {len(plan.places):,}, arms: {len(settings.arms)}, {plan.tokens:,} tokens to read, and the questions",
        console=notes(),
    )
    with run.working(), work_bar(notes(), plan.tokens, "tokens", "read") as show:
        records = measure(loaded.model, plan, run.journal, show)
    trained = attachment_of(loaded.model).trained_context
    found = recall_report.Found(settings, records, plan.left_out, trained)
    recall_report.show(output(), found, run.settings)
    if run.out is not None:
        run.finish(*recall_report.written(found, run.settings, loaded.model))


def _plan(loaded: Loaded, run: options.Run, settings: Settings, text: str) -> Plan:
    from ahn.attachment import attachment_of
    from ahn.evaluation.recall.haystack import sentences
    from ahn.evaluation.recall.items import Builder
    from ahn.evaluation.recall.plan import Plan

    limit, longest = attachment_of(loaded.model).position_limit, max(settings.lengths)
    if limit is not None and longest >= limit:
        raise UsageError(f"--lengths {longest} is too long for a model of {limit:,} positions. Give shorter ones.")
    builder = Builder(loaded.tokenizer, run.settings["window"], run.settings["sinks"])
    with notes().status("Hiding needles ..."):
        return Plan(settings, builder, sentences(text))


def _numbers(option: str, given: str) -> list[int]:
    """The numbers in "1024,2048", in rising order, each once."""
    words = checks.words(given)
    if not words or not all(word.isdecimal() and int(word) >= 1 for word in words):
        raise UsageError(f"{option} must be whole numbers of at least 1 joined by commas, not '{given}'.")
    return sorted({int(word) for word in words})
