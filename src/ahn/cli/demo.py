"""`ahn demo`: a small model reads a long text in several modes, and is asked for a fact from its beginning."""

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
FACT = "The secret number of the quiet-harbour is 4815162."
ANCHORS = 64
QUESTION = "What is the secret number of the quiet-harbour?"


def command(
    tokens: Annotated[
        str | None,
        typer.Option(
            metavar="N|all",
            help="How many tokens to read.  "
            "[dim]\\[default: as --seconds allow, at most 4,096 if a fact is hidden][/dim]",
        ),
    ] = None,
    seconds: Annotated[
        float, typer.Option(help="Without --tokens: start to answer after this time, loading included.")
    ] = 75.0,
    file: Annotated[
        str | None, typer.Option(help="A text; - for standard input.  [dim]\\[default: Python's reference][/dim]")
    ] = None,
    question: Annotated[
        str | None,
        typer.Option(help="What to ask at the end; empty for nothing.  [dim]\\[default: for a hidden fact][/dim]"),
    ] = None,
    fact: Annotated[
        str | None,
        typer.Option(help="A sentence to hide near the beginning; none without it where --question is given."),
    ] = None,
    modes: Annotated[
        str | None,
        typer.Option(
            help="Modes to compare, joined by commas; ahn+64 keeps 64 anchors.  "
            "[dim]\\[default: ahn with anchors, ahn, window, full][/dim]"
        ),
    ] = None,
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
    """A small model reads a long text in several modes, and is asked for a fact that was hidden near its beginning."""
    started = time.monotonic()
    names = None if modes is None else checks.modes("--modes", modes)
    checks.span(window, sinks, sink_positions)
    checks.at_least("--seconds", seconds, 1)
    checks.at_least("--max-new-tokens", max_new_tokens, 1)
    checks.adapter(adapter)
    limit = _limit(tokens)
    text = None if file is None else checks.text_file("--file", file)
    from ahn.cli import comparison, loading, show
    from ahn.cli.texts import reference, with_fact

    screen = show.Screen(output())
    loading.seed(seed)
    loaded = loading.load(model, adapter, window, sinks, sink_positions)
    hidden = fact if fact is not None else FACT if question is None else ""
    plan = comparison.Plan(
        names or [f"ahn+{ANCHORS}", "ahn", "window", "full"],
        comparison.IN_A_HURRY if tokens is None and hidden else limit,
        started + seconds if tokens is None else None,
        max_new_tokens,
    )
    title = "Python's language reference" if text is None else "standard input" if file == "-" else str(file)
    whole = reference() if text is None else text
    asked = QUESTION if question is None else question
    comparison.run(loaded, with_fact(whole, hidden) if hidden else whole, asked, plan, screen, title, hidden)


def _limit(tokens: str | None) -> int | None:
    """Most tokens to read, or `None` for all."""
    if tokens is None or tokens in ("all", "0"):
        return None
    if not tokens.isdecimal() or int(tokens) < 2:
        raise UsageError(f"--tokens must be a number of at least 2, or all, not '{tokens}'.")
    return int(tokens)
