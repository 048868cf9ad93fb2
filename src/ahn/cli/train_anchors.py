"""`ahn train anchors`: a model learns which tokens questions will look back at."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ahn.cli.terminal import UsageError, notes, output, say

if TYPE_CHECKING:
    from ahn.training.anchors import AnchorReport

EXAMPLES = """Examples:

ahn train anchors --data texts --out my-anchors  [dim]# a quarter of an hour on a laptop[/dim]

ahn train anchors --base Qwen/Qwen2.5-0.5B-Instruct --data texts --out anchors --documents 120
"""


def command(
    data: Annotated[
        list[str] | None,
        typer.Option(help="Text, JSONL, a folder of them, or a dataset's name; may be given several times."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the weights.")] = None,
    base: Annotated[str, typer.Option(help="A built-in name, a folder, or a hub id.")] = "smollm2-135m",
    documents: Annotated[int, typer.Option(help="Texts to read; every sixth is held out.")] = 120,
    length: Annotated[int, typer.Option(help="Tokens of a text with its questions.")] = 1280,
    window: Annotated[int, typer.Option(help="Tokens behind each token that count as near.")] = 256,
    voters: Annotated[int, typer.Option(help="Layers that vote.")] = 3,
    left_out: Annotated[str, typer.Option(help="Kind of fact that only the closing table knows.")] = "fare",
    seed: Annotated[int, typer.Option(help="Of all random numbers.")] = 0,
) -> None:
    """Train the learned score for anchors: which tokens will be needed once they have left the window?"""
    if not data:
        raise UsageError("there is nothing to hide facts in. Name a file, a folder or a dataset with --data.")
    if out is None:
        raise UsageError("there is no folder to write to. Name one with --out.")
    from ahn.cli.loading import quiet
    from ahn.training.anchors import AnchorSettings, check_anchor_settings, train_anchors

    settings = AnchorSettings(
        tuple(data), str(out), base, documents, length, window, voters, left_out=left_out, seed=seed
    )
    check_anchor_settings(settings)
    quiet()
    with notes().status("Reading ..."):
        report = train_anchors(settings, say)
    _show(report, settings.left_out)
    say(f"wrote {out}: load it with ahn.load_anchors(model, {str(out)!r})", console=output())


def _show(report: AnchorReport, left_out: str) -> None:
    """How well each layer foresees, and which facts are kept."""
    from rich.table import Table

    from ahn.training.anchors.run import KEPT

    layers = Table("layer", "linear", "vote", title="Variance explained on held-out tokens", title_justify="left")
    for layer, (ridge, explained) in report.layers.items():
        layers.add_row(str(layer), f"{ridge:.2f}", f"{explained:.2f}")
    kept = Table("fact", "n", title="Share of the fact's tokens kept, held-out texts", title_justify="left")
    kept.caption, kept.caption_justify = "n: facts of this kind.  *: a kind that was not trained on.", "left"
    for score in report.kept:
        for anchors in KEPT:
            kept.add_column(f"{score}\n{anchors}", justify="right")
    for kind, count in report.facts.items():
        cells = [f"{share:.2f}" for by_kind in report.kept.values() for share in by_kind.get(kind, [])]
        kept.add_row(f"{kind}*" if kind == left_out else kind, str(count), *cells)
    for table in (layers, kept):
        output().print(table)
