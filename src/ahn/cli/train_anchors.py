"""`ahn train anchors`: which tokens will questions look back at?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ahn.cli.checks import words
from ahn.cli.terminal import UsageError, notes, output, say

if TYPE_CHECKING:
    from ahn.training.anchors import AnchorReport

EXAMPLES = """Examples:

ahn train anchors --data texts --out my-anchors  [dim]# half an hour on a laptop[/dim]

ahn train anchors --data texts --out my-anchors --scores asked --documents 240  [dim]# trains nothing[/dim]

ahn train anchors --base Qwen/Qwen2.5-0.5B-Instruct --data texts --out anchors
"""


def command(
    data: Annotated[
        list[str] | None,
        typer.Option(help="Text, JSONL, a folder of them, or a dataset's name; may be given several times."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the weights.")] = None,
    base: Annotated[str, typer.Option(help="A built-in name, a folder, or a hub id.")] = "smollm2-135m",
    scores: Annotated[str, typer.Option(help="Joined by commas: asked (trains nothing), learned.")] = "asked,learned",
    documents: Annotated[int, typer.Option(help="Texts to read; every sixth is held out.")] = 120,
    length: Annotated[int, typer.Option(help="Tokens of a text with its questions.")] = 1280,
    window: Annotated[int, typer.Option(help="Tokens behind each token that count as near.")] = 256,
    voters: Annotated[int, typer.Option(help="How many layers vote by learned.")] = 3,
    left_out: Annotated[str, typer.Option(help="Kind of fact that only the closing table knows.")] = "fare",
    seed: Annotated[int, typer.Option(help="Of all random numbers.")] = 0,
) -> None:
    """Make the scores for anchors that need weights: which tokens will be needed once they have left the window?"""
    if not data:
        raise UsageError("there is nothing to hide facts in. Name a file, a folder or a dataset with --data.")
    if out is None:
        raise UsageError("there is no folder to write to. Name one with --out.")
    from ahn.cli.loading import quiet
    from ahn.training.anchors import AnchorSettings, check_anchor_settings, train_anchors

    settings = AnchorSettings(
        data=tuple(data),
        out=str(out),
        base=base,
        documents=documents,
        length=length,
        window=window,
        voters=voters,
        left_out=left_out,
        seed=seed,
        scores=tuple(words(scores)),
    )
    check_anchor_settings(settings)
    quiet()
    with notes().status("Reading ..."):
        report = train_anchors(settings, say)
    _show(report, settings.left_out)
    say(f"wrote {out}: load it with ahn.load_anchors(model, {str(out)!r})", console=output())


def _show(report: AnchorReport, left_out: str) -> None:
    """Who votes, how well each layer foresees, and which facts are kept."""
    from rich.table import Table

    from ahn.training.anchors.run import KEPT

    if report.asked:
        layers = ", ".join(f"{layer} ({count})" for layer, count in sorted(report.asked.items()))
        say(f"asked: layers that vote, and their queries: {layers}", console=output())
    if report.layers:
        learned = Table("layer", "linear", "vote", title="learned: variance explained on held-out tokens")
        learned.title_justify = "left"
        for layer, (ridge, explained) in report.layers.items():
            learned.add_row(str(layer), f"{ridge:.2f}", f"{explained:.2f}")
        output().print(learned)
    among = " / ".join(map(str, KEPT))
    kept = Table("fact", "n", title=f"Share of a fact's tokens among {among} anchors, held-out texts")
    kept.title_justify, kept.caption_justify = "left", "left"
    kept.caption = "n: facts of this kind.  *: a kind that no score was made with."
    for score in report.kept:
        kept.add_column(score, no_wrap=True)
    for kind, count in report.facts.items():
        cells = [" / ".join(f"{share:.2f}" for share in by_kind.get(kind, [])) for by_kind in report.kept.values()]
        kept.add_row(f"{kind}*" if kind == left_out else kind, str(count), *cells)
    output().print(kept)
