"""`ahn demo`: a small model reads a long text in three modes, and answers a question about it."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from ahn.cli import checks
from ahn.cli.terminal import UsageError, output

EXAMPLES = """Examples:

ahn demo  [dim]# under two minutes[/dim]

ahn demo --tokens all --modes window  [dim]# far past the trained context[/dim]

ahn demo --file book.txt --question "Who tells the story?"
"""
QUESTION = "What does an assert statement do in Python?"
REMARK = (
    "The reference explains it at its very beginning, which has left the window; a model of 135 million parameters "
    "also knows some of it by itself, and answers weakly either way."
)


def command(
    tokens: Annotated[
        str | None,
        typer.Option(metavar="N|all", help="How many tokens to read.  [dim]\\[default: as --seconds allow][/dim]"),
    ] = None,
    seconds: Annotated[
        float, typer.Option(help="Without --tokens: start to answer after this time, loading included.")
    ] = 75.0,
    file: Annotated[
        str | None, typer.Option(help="A text; - for standard input.  [dim]\\[default: Python's reference][/dim]")
    ] = None,
    question: Annotated[str, typer.Option(help="What to ask at the end; empty for nothing.")] = QUESTION,
    modes: Annotated[str, typer.Option(help="Modes to compare, joined by commas.")] = "ahn,window,full",
    window: Annotated[int, typer.Option(help="Tokens of the window.")] = 1024,
    sinks: Annotated[int, typer.Option(help="First tokens that are kept for ever.")] = 32,
    sink_positions: Annotated[
        str, typer.Option(metavar="bounded|absolute", help="How far away the sinks may seem.")
    ] = "bounded",
    adapter: Annotated[
        str | None, typer.Option(help="Folder or hub id of the memory's weights; none for an untrained one.")
    ] = None,
    model: Annotated[str, typer.Option(help="A built-in name, a folder, or a hub id owner/name.")] = "smollm2-135m",
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 48,
    seed: Annotated[int, typer.Option(help="Of the weights of an untrained memory.")] = 0,
) -> None:
    """A small model reads a long text in the modes ahn, window and full, and answers a question about it."""
    started = time.monotonic()
    names = checks.several_of("--modes", modes, checks.MODES)
    checks.span(window, sinks, sink_positions)
    checks.at_least("--seconds", seconds, 1)
    checks.at_least("--max-new-tokens", max_new_tokens, 1)
    checks.adapter(adapter)
    limit = _limit(tokens)
    text = None if file is None else checks.text_file("--file", file)
    from ahn.cli import comparison, loading, show
    from ahn.cli.texts import reference

    screen = show.Screen(output())
    loading.seed(seed)
    loaded = loading.load(model, adapter, window, sinks, sink_positions)
    plan = comparison.Plan(names, limit, started + seconds if tokens is None else None, max_new_tokens)
    remark = REMARK if text is None and question == QUESTION and model == "smollm2-135m" else ""
    title = "Python's language reference" if text is None else "standard input" if file == "-" else str(file)
    comparison.run(loaded, reference() if text is None else text, question, plan, screen, title, remark)


def _limit(tokens: str | None) -> int | None:
    """Most tokens to read, or `None` for all."""
    if tokens is None or tokens in ("all", "0"):
        return None
    if not tokens.isdecimal() or int(tokens) < 2:
        raise UsageError(f"--tokens must be a number of at least 2, or all, not '{tokens}'.")
    return int(tokens)
