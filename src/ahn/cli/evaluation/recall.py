"""`ahn eval recall`: is a fact found again, split by where it is when it is asked for."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ahn.cli import checks
from ahn.cli.evaluation.runs import Run, RunOptions, open_run
from ahn.cli.loading import ModelSettings
from ahn.cli.options import from_fields
from ahn.cli.terminal import UsageError, log, notes, output
from ahn.cli.texts import reference
from ahn.evaluation.page import Page
from ahn.evaluation.recall.tasks import EVICTED, TASKS, RecallSettings
from ahn.evaluation.tables import ResultTable, with_interval

if TYPE_CHECKING:
    from ahn.evaluation.recall.items import ItemMaker

EXAMPLES = """Examples:

ahn eval recall --window 256 --lengths 1024 --items 1  [dim]# a first look[/dim]

ahn eval recall --tasks multi_key,capacity --facts 4,8,16,32,64 --lengths 2048,4096 --out recall

ahn eval recall --arms full,window+64,ahn+64,ahn+64:random,ahn+64:oracle  [dim]# oracle: told which tokens to keep[/dim]
"""
Rows = list[dict[str, Any]]
COLUMNS = ("task", "tokens", "facts", "span", "arm", "texts", "values", "in the answer", "ranked first", "mean rank")


@from_fields
def command(settings: RecallSettings, source: ModelSettings, options: RunOptions) -> None:
    """Hide facts in a text and ask for them: sinks, window and what was evicted are scored apart."""
    for task in settings.tasks or ("",):
        checks.one_of("--tasks", task, tuple(TASKS))
    lengths, facts = _numbers("--lengths", settings.lengths), _numbers("--facts", settings.facts)
    checks.evicts("--lengths", max(lengths), source.sinks + source.window, "Read longer texts")
    settings = dataclasses.replace(settings, lengths=lengths, facts=facts, seed=options.seed)
    text = reference() if settings.haystack is None else checks.text_file("--haystack", settings.haystack)
    checksum = hashlib.sha256(text.encode()).hexdigest()[:16]
    own = {name: value for name, value in vars(settings).items() if name not in ("arms", "seed")}
    own["haystack"] = ("a file" if settings.haystack else "Python's reference") + f", SHA-256 {checksum}"
    run = open_run("recall", source, options, settings.arms, **own)
    loaded = run.load()
    from ahn.attachment import attachment_of
    from ahn.evaluation.recall.findings import measure
    from ahn.evaluation.recall.items import ItemMaker
    from ahn.models.text import sentences

    if loaded.adapter is None and "ahn" in run.arms:
        log("the memory is untrained: ahn answers as window does", "yellow")
    limit, longest = attachment_of(loaded.model).position_limit, max(lengths)
    if limit is not None and longest >= limit:
        raise UsageError(f"--lengths {longest} is too long for a model of {limit:,} positions. Give shorter ones.")
    with notes().status("Hiding needles ..."):
        maker = ItemMaker(settings, loaded.tokenizer, source.window, source.sinks, sentences(text))
    count = f"texts: {len(maker.specs):,}, arms: {len(settings.arms)}"
    log(f"{count}, {maker.tokens:,} tokens to read, and the questions", console=notes())
    with run.reading(maker.tokens) as progress:
        records = measure(loaded.model, maker, run.journal, progress)
    _report(run, loaded.model, maker, records)


def _report(run: Run, model: Any, maker: ItemMaker, records: Rows) -> None:
    """Prints the results, and writes them where they are wanted."""
    from ahn.attachment import attachment_of
    from ahn.evaluation.recall.findings import cells, moved_and_dropped, verdicts

    rows, settings = cells(records), maker.settings
    moved, dropped = moved_and_dropped(records)
    sentences, trained_context = verdicts(rows, settings), attachment_of(model).trained_context
    log(f"window {maker.window:,}, sinks {maker.sinks:,}; spans are those when the question begins", console=output())
    for table in _tables(rows, settings):
        table.print(output())
    were = {number: " was" if number == 1 else "s were" for number in (moved, dropped)}
    notices = [f"{moved:,} needle{were[moved]} moved by some sentences, out of the border of two spans."]
    if dropped:
        notices.append(f"{dropped:,} value{were[dropped]} dropped: no place is clear of the border of two spans.")
    notices += [f"{number:,} facts do not fit into {length:,} tokens." for length, number in maker.left_out]
    if "full" in settings.arms and max(settings.lengths) > trained_context:
        notices.append(f"full reads more than the {trained_context:,} tokens that the model was trained on.")
    for sentence in (*sentences, *notices):
        style = "" if sentence in notices else "bold red" if "NONE" in sentence else "bold"
        log(sentence, style, console=output())
    if run.out is not None:
        left_out = [{"length": length, "facts": number} for length, number in maker.left_out]
        results = {"cells": rows, "verdicts": sentences, "chance": settings.chance}
        results |= {"moved_needles": moved, "dropped_values": dropped, "left_out": left_out}
        run.finish(results, _page(run, maker, records, rows, [*sentences, *notices]), model)


def _tables(rows: Rows, settings: RecallSettings) -> list[ResultTable]:
    """A row for every task, length and span, a column for every arm; zeros of evicted needles stand out."""
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
    scores = (lambda cell: f"{cell['hits']}/{cell['values']}", lambda cell: f"{100 * cell['first']['share']:.0f}")
    return [
        ResultTable(
            ["task", "tokens", "span", *settings.arms],
            [[*line, *(score(cells[arm]) for arm in settings.arms)] for line, cells in lines.items()],
            title,
            settings.arms,
            zeros,
            [row for row in range(1, len(names)) if names[row] != names[row - 1]],
        )
        for title, score in zip(titles, scores)
    ]


def _page(run: Run, maker: ItemMaker, records: Rows, rows: Rows, sentences: list[str]) -> Page:
    from ahn.evaluation.recall.findings import capacity_curve, heat_map

    settings, page = maker.settings, Page(f"Recall by span: {run.source.model}")
    page.text(
        f"Window {maker.window:,}, sinks {maker.sinks:,}. A needle is evicted if it had left the window when the "
        "question began, and in the window if it is there until the answer ends."
    )
    page.heading("Evicted needles")
    page.text(*sentences)
    for task in settings.tasks:
        counts = TASKS[task].counts_facts
        if not counts or any(cell["facts"] for cell in rows):
            page.heading(task)
            figure = capacity_curve(rows, settings) if counts else heat_map(task, records, settings)
            page.figure(f"recall_{task}", figure, f"{task}: {TASKS[task].title}")
    page.heading("All cells")
    names = ("task", "length", "facts", "label", "arm", "contexts", "values")
    shares = [[with_interval(*cell[part].values()) for part in ("found", "first")] for cell in rows]
    lines = [[*(cell[name] for name in names), *share, cell["mean_rank"]] for cell, share in zip(rows, shares)]
    caption = f"Shares with 95 % bootstrap intervals over texts; chance of ranking first: {settings.chance:.2f}"
    page.table(ResultTable(COLUMNS, lines, caption))
    return page


def _numbers(option: str, words: Iterable[Any]) -> tuple[int, ...]:
    """Numbers in rising order, each once."""
    texts = [str(word) for word in words]
    if not texts or not all(text.isdecimal() and int(text) >= 1 for text in texts):
        raise UsageError(f"{option} must be whole numbers of at least 1 joined by commas, not '{','.join(texts)}'.")
    return tuple(sorted(map(int, set(texts))))
