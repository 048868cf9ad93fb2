"""`ahn probe`: what the memory has kept of a text, as coloured text in the terminal and as a page."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ahn.cli import checks
from ahn.cli.evaluation.options import MODEL, Adapter, Model, Seed, Sinks, Window
from ahn.cli.terminal import UsageError, notes, output, say

if TYPE_CHECKING:
    import torch

    from ahn.cli.loading import Loaded
    from ahn.cli.probe_report import Probe
    from ahn.evaluation.probing import Positions

EXAMPLES = """Examples:

ahn probe  [dim]# a short story that comes with it[/dim]

ahn probe notes.txt --html probe.html --json probe.json

ahn probe book.txt --adapter my-memory --window 128 --tokens 1000
"""
POSITIONS = ("all", "last")


def command(
    file: Annotated[
        str | None,
        typer.Argument(metavar="FILE", help="A text; - for standard input.  [dim]\\[default: a short story][/dim]"),
    ] = None,
    model: Model = MODEL,
    adapter: Adapter = None,
    window: Window = 64,
    sinks: Sinks = 4,
    tokens: Annotated[int, typer.Option(help="Read so many tokens of the text, from its beginning.")] = 400,
    positions: Annotated[
        str,
        typer.Option(metavar="all|last", help="Where the loss counts: beyond sinks and window, or in the last window."),
    ] = "all",
    top: Annotated[int, typer.Option(help="Tokens in the table.")] = 12,
    html: Annotated[Path | None, typer.Option(help="Write a page with text, table and plots to this file.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write every number to this file.")] = None,
    memory_figures: Annotated[
        Path | None, typer.Option(help="Folder for the plots of state and gates, as PNG files.")
    ] = None,
    seed: Seed = 0,
) -> None:
    """Show which evicted tokens the memory has not kept, how full its state is, and what its gates do."""
    checks.span(window, sinks, None)
    checks.one_of("--positions", positions, POSITIONS)
    checks.at_least("--top", top, 1)
    checks.at_least("--seed", seed, 0)
    checks.adapter(adapter)
    if tokens <= sinks + window:
        raise UsageError(
            f"--tokens {tokens:,} do not pass sinks + window = {sinks + window:,}, so that nothing is evicted. "
            "Read more, or take a smaller --window."
        )
    html, json, folder = (None if path is None else path.expanduser() for path in (html, json, memory_figures))
    _check_targets(html, json, folder)
    text = None if file is None else checks.text_file("FILE", file)
    from ahn.cli import loading
    from ahn.cli.texts import lighthouse

    loading.seed(seed)
    loaded = loading.load(model, adapter, window, sinks)
    title = "a short story" if text is None else "standard input" if file == "-" else Path(str(file)).name
    ids = loaded.tokenizer(lighthouse() if text is None else text, return_tensors="pt", verbose=False).input_ids[0]
    probe = _measure(loaded, title, ids, tokens, window, sinks, "last" if positions == "last" else "all")
    from ahn.cli import probe_report

    probe_report.show(probe, top, output())
    report = probe_report.make_report(probe, seed)
    if json is not None:
        report.write(json)
    if html or folder:
        page = probe_report.make_page(probe, report, top)
        if html is not None:
            page.write(html)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            page.write_figures(folder)
    for path in (json, html, folder):
        if path is not None:
            say(f"wrote {path}", console=output())


def _check_targets(html: Path | None, json: Path | None, folder: Path | None) -> None:
    """Checks that everything can be written before anything is read."""
    checks.file_to_write("--html", html)
    checks.file_to_write("--json", json)
    if html is not None and json is not None and html.absolute() == json.absolute():
        raise UsageError(f"--html and --json both name {html}. Name two files.")
    if folder is not None and folder.exists() and not folder.is_dir():
        raise UsageError(f"--memory-figures {folder} is a file. Name a folder.")
    if (html or folder) and find_spec("matplotlib") is None:
        raise UsageError("--html and --memory-figures need matplotlib. Install it: pip install 'ahn[eval]'")


def _measure(
    loaded: Loaded, title: str, ids: torch.Tensor, tokens: int, window: int, sinks: int, positions: Positions
) -> Probe:
    """Reads the beginning of a text, as teacher, as student with gradients, and once more for the states."""
    from ahn.cli.probe_report import Probe
    from ahn.evaluation.probing import token_gradients, trace_state

    read = ids[:tokens]
    with notes().status(f"Reading {read.numel():,} tokens of {title}: the gradients ..."):
        gradients = token_gradients(loaded.model, read, window=window, sinks=sinks, positions=positions)
    with notes().status("Reading them again: the states ..."):
        trace = trace_state(loaded.model, read, window=window, sinks=sinks)
    return Probe(loaded, title, sinks, window, positions, read.tolist(), ids.numel(), gradients, trace)
