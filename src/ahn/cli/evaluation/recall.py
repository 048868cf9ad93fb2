"""`ahn eval recall`: is a fact found again, split by where it is when it is asked for."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ahn.cli import checks
from ahn.cli.evaluation import options
from ahn.cli.terminal import UsageError, notes, output, say
from ahn.cli.texts import reference
from ahn.evaluation.arm_names import ARMS
from ahn.evaluation.recall.tasks import TASKS

if TYPE_CHECKING:
    from ahn.cli.loading import Loaded
    from ahn.evaluation.page import Page
    from ahn.evaluation.recall.items import ItemMaker, RecallSettings
    from ahn.evaluation.tables import ResultTable

EXAMPLES = """Examples:

ahn eval recall --window 256 --lengths 1024 --items 1  [dim]# a first look[/dim]

ahn eval recall --tasks number,multi_key --lengths 2048,4096 --out recall

ahn eval recall --tasks capacity --facts 4,8,16,32,64 --arms full,window,ahn

ahn eval recall --arms full,window+64,ahn+64,ahn+64:random,ahn+64:oracle  [dim]# oracle: told which tokens to keep[/dim]
"""
ALL_ARMS = ",".join(ARMS)
COLUMNS = ("task", "tokens", "facts", "span", "arm", "texts", "values", "in the answer", "ranked first", "mean rank")


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
    arms: options.Arms = ALL_ARMS,
    window: options.Window = options.WINDOW,
    sinks: options.Sinks = options.SINKS,
    sink_positions: options.SinkPositions = options.SINK_POSITIONS,
    adapter: options.Adapter = None,
    model: options.Model = options.MODEL,
    out: options.Out = None,
    seed: options.Seed = 0,
) -> None:
    """Hide facts in a text and ask for them: sinks, window and what was evicted are scored apart."""
    own: dict[str, Any] = {
        "tasks": checks.several_of("--tasks", tasks, tuple(TASKS)),
        "lengths": _numbers("--lengths", lengths),
        "depths": depths,
        "items": items,
        "values": values,
        "facts": _numbers("--facts", facts),
        "distractors": distractors,
    }
    for name in ("depths", "items", "values", "distractors"):
        checks.at_least(f"--{name}", own[name], 1)
    title = "Python's reference" if haystack is None else "a file"
    text = reference() if haystack is None else checks.text_file("--haystack", haystack)
    source = f"{title}, SHA-256 {hashlib.sha256(text.encode()).hexdigest()[:16]}"
    shared = options.Shared(model, adapter, arms, window, sinks, sink_positions, out, seed)
    run = options.open_run("recall", shared, haystack=source, **own)
    from ahn.evaluation.recall.items import RecallSettings

    plural: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in own.items()}
    _run(run, RecallSettings(arms=tuple(run.arms), seed=seed, **plural), text)


def _run(run: options.Run, settings: RecallSettings, text: str) -> None:
    """The part that needs the library: loads, makes texts, reads, reports."""
    loaded = run.load()
    from ahn.attachment import attachment_of
    from ahn.evaluation.recall.answering import measure
    from ahn.evaluation.recall.cells import cells, moved_and_dropped, remarks, verdicts

    if loaded.adapter is None and "ahn" in run.arms:
        say("the memory is untrained: ahn answers as window does", "yellow")
    maker = _item_maker(loaded, run, settings, text)
    count = f"texts: {len(maker.specs):,}, arms: {len(settings.arms)}"
    say(f"{count}, {maker.tokens:,} tokens to read, and the questions", console=notes())
    with run.reading(maker.tokens) as progress:
        records = measure(loaded.model, maker, run.journal, progress)
    rows = cells(records)
    sentences = verdicts(rows, settings)
    notices = remarks(records, settings, maker.left_out, attachment_of(loaded.model).trained_context)
    window, sinks = run.settings["window"], run.settings["sinks"]
    say(f"window {window:,}, sinks {sinks:,}; spans are those when the question begins", console=output())
    for table in _tables(rows, settings):
        table.print(output())
    for sentence in sentences:
        say(sentence, "bold red" if "NONE" in sentence else "bold", console=output())
    for sentence in notices:
        say(sentence, console=output())
    if run.out is not None:
        page = _page(run, settings, records, rows, [*sentences, *notices])
        moved, dropped = moved_and_dropped(records)
        left_out = [{"length": length, "facts": number} for length, number in maker.left_out]
        results = {"cells": rows, "verdicts": sentences, "chance": settings.chance}
        results |= {"moved_needles": moved, "dropped_values": dropped, "left_out": left_out}
        run.finish(results, page, loaded.model)


def _item_maker(loaded: Loaded, run: options.Run, settings: RecallSettings, text: str) -> ItemMaker:
    from ahn.attachment import attachment_of
    from ahn.evaluation.recall.items import ItemMaker
    from ahn.evaluation.recall.layout import sentences

    limit, longest = attachment_of(loaded.model).position_limit, max(settings.lengths)
    if limit is not None and longest >= limit:
        raise UsageError(f"--lengths {longest} is too long for a model of {limit:,} positions. Give shorter ones.")
    with notes().status("Hiding needles ..."):
        return ItemMaker(settings, loaded.tokenizer, run.settings["window"], run.settings["sinks"], sentences(text))


def _tables(rows: list[dict[str, Any]], settings: RecallSettings) -> list[ResultTable]:
    """A row for every task, length and span, a column for every arm; zeros of evicted needles stand out."""
    from ahn.evaluation.recall.layout import EVICTED
    from ahn.evaluation.tables import ResultTable

    lines: dict[tuple[str, int, str], dict[str, Any]] = {}
    for cell in rows:
        name = cell["task"] if cell["facts"] is None else f"{cell['task']} {cell['facts']}"
        lines.setdefault((name, cell["length"], cell["label"]), {})[cell["arm"]] = cell
    names = [cells[settings.arms[0]]["task"] for cells in lines.values()]
    zeros = {
        (row, 3 + column): "bold red"
        for row, ((_, _, label), cells) in enumerate(lines.items())
        for column, arm in enumerate(settings.arms)
        if label == EVICTED and not cells[arm]["hits"]
    }
    titles = ("In the answer, of all", f"Ranked first, % (chance {settings.chance:.0%})")
    show = (lambda cell: f"{cell['hits']}/{cell['values']}", lambda cell: f"{100 * cell['first']['share']:.0f}")
    return [
        ResultTable(
            ["task", "tokens", "span", *settings.arms],
            [[*line, *(score(cells[arm]) for arm in settings.arms)] for line, cells in lines.items()],
            title,
            settings.arms,
            zeros,
            [row for row in range(1, len(names)) if names[row] != names[row - 1]],
        )
        for title, score in zip(titles, show)
    ]


def _page(
    run: options.Run,
    settings: RecallSettings,
    records: list[dict[str, Any]],
    rows: list[dict[str, Any]],
    sentences: list[str],
) -> Page:
    from ahn.evaluation.page import Page
    from ahn.evaluation.recall.maps import capacity_curve, heat_map
    from ahn.evaluation.tables import ResultTable, with_interval

    page = Page(f"Recall by span: {run.settings['model']}")
    page.text(
        f"Window {run.settings['window']:,}, sinks {run.settings['sinks']:,}. A needle is evicted if it had left the "
        "window when the question began, and in the window if it is there until the answer ends."
    )
    page.heading("Evicted needles")
    for sentence in sentences:
        page.text(sentence)
    for task in settings.tasks:
        if not TASKS[task].counts_facts or any(cell["facts"] for cell in rows):
            page.heading(task)
            figure = capacity_curve(rows, settings) if TASKS[task].counts_facts else heat_map(task, records, settings)
            page.figure(f"recall_{task}", figure, f"{task}: {TASKS[task].title}")
    page.heading("All cells")
    names = ("task", "length", "facts", "label", "arm", "contexts", "values")
    cells = [
        [
            *(cell[name] for name in names),
            *(with_interval(*cell[part].values()) for part in ("found", "first")),
            cell["mean_rank"],
        ]
        for cell in rows
    ]
    caption = f"Shares with 95 % bootstrap intervals over texts; chance of ranking first: {settings.chance:.2f}"
    page.table(ResultTable(COLUMNS, cells, caption))
    return page


def _numbers(option: str, text: str) -> list[int]:
    """The numbers in "1024,2048", in rising order, each once."""
    words = checks.words(text)
    if not words or not all(word.isdecimal() and int(word) >= 1 for word in words):
        raise UsageError(f"{option} must be whole numbers of at least 1 joined by commas, not '{text}'.")
    return sorted({int(word) for word in words})
