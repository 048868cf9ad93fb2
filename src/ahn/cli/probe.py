"""`ahn probe`: what the memory has kept of a text, as coloured text in the terminal and as a page."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ahn.cli import checks
from ahn.cli.loading import ModelChoice, ModelSettings
from ahn.cli.options import from_fields
from ahn.cli.terminal import UsageError, log, notes, output
from ahn.config import same_setting, setting

if TYPE_CHECKING:
    import torch

    from ahn.cli.loading import Loaded
    from ahn.cli.probe_report import Probe

EXAMPLES = """Examples:

ahn probe  [dim]# a short story that comes with it[/dim]

ahn probe notes.txt --html probe.html --json probe.json

ahn probe book.txt --adapter my-memory --window 128 --tokens 1000
"""


@dataclass(frozen=True)
class ProbeSettings(ModelChoice):
    """What is read, what is measured on it, and where that goes."""

    file: str | None = setting(
        None, "A text; - for standard input.", argument=True, metavar="FILE", unset="a short story"
    )
    window: int = same_setting(ModelSettings, "window", default=64)
    sinks: int = same_setting(ModelSettings, "sinks", default=4)
    sink_positions: None = None
    tokens: int = setting(400, "Tokens of the text that are read, from its beginning.")
    positions: Literal["all", "last"] = setting(
        "all", "Where the loss counts: beyond sinks and window, or in the last window.", choices=("all", "last")
    )
    top: int = setting(12, "Tokens in the table.", least=1)
    html: Path | None = setting(None, "Write a page with text, table and plots to this file.")
    json: Path | None = setting(None, "Write every number to this file.")
    memory_figures: Path | None = setting(None, "Folder for the plots of state and gates, as PNG files.")
    seed: int = setting(0, "Of all random numbers.", least=0)


@from_fields
def command(settings: ProbeSettings) -> None:
    """Show which evicted tokens the memory has not kept, how full its state is, and what its gates do."""
    checks.evicts("--tokens", settings.tokens, settings.sinks + settings.window, "Read more")
    targets = (settings.html, settings.json, settings.memory_figures)
    html, json, folder = (None if path is None else path.expanduser() for path in targets)
    _check_targets(html, json, folder, settings.file)
    text = None if settings.file is None else checks.text_file("FILE", settings.file)
    from ahn.cli import loading
    from ahn.cli.texts import lighthouse

    loading.seed(settings.seed)
    loaded = loading.load(settings)
    title = "standard input" if settings.file == "-" else Path(settings.file or "a short story").name
    ids = loaded.tokenizer(lighthouse() if text is None else text, return_tensors="pt", verbose=False).input_ids[0]
    probe = _measure(loaded, title, ids, settings)
    from ahn.cli import probe_report

    probe_report.print_probe(probe, settings.top, output())
    report = probe_report.make_report(probe, settings.seed)
    if json is not None:
        report.write(json)
    page = probe_report.make_page(probe, report, settings.top) if html or folder else None
    if page is not None and html is not None:
        page.write(html)
    if page is not None and folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        page.write_figures(folder)
    for path in (json, html, folder):
        if path is not None:
            log(f"wrote {path}", console=output())


def _check_targets(html: Path | None, json: Path | None, folder: Path | None, text: str | None) -> None:
    """Checks that everything can be written before anything is read."""
    checks.file_to_write("--html", html, [text])
    checks.file_to_write("--json", json, [text])
    if html is not None and json is not None and html.absolute() == json.absolute():
        raise UsageError(f"--html and --json both name {html}. Name two files.")
    if folder is not None and folder.exists() and not folder.is_dir():
        raise UsageError(f"--memory-figures {folder} is a file. Name a folder.")
    if (html or folder) and find_spec("matplotlib") is None:
        raise UsageError("--html and --memory-figures need matplotlib. Install it: pip install 'ahn[eval]'")


def _measure(loaded: Loaded, title: str, ids: torch.Tensor, settings: ProbeSettings) -> Probe:
    """Reads the beginning of a text, as teacher, as student with gradients, and once more for the states."""
    from ahn.cli.probe_report import Probe
    from ahn.evaluation.probing import token_gradients, trace_state

    read, window, sinks, positions = ids[: settings.tokens], settings.window, settings.sinks, settings.positions
    with notes().status(f"Reading {read.numel():,} tokens of {title}: the gradients ..."):
        gradients = token_gradients(loaded.model, read, window=window, sinks=sinks, positions=positions)
    with notes().status("Reading them again: the states ..."):
        trace = trace_state(loaded.model, read, window=window, sinks=sinks)
    return Probe(loaded, title, sinks, window, positions, read.tolist(), ids.numel(), gradients, trace)
