"""`ahn train anchors`: which tokens will questions look back at?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from ahn.cli.options import from_fields
from ahn.cli.terminal import UsageError, log, notes, output
from ahn.training.anchor_settings import AnchorSettings

if TYPE_CHECKING:
    from ahn.training.anchors import AnchorReport

EXAMPLES = """Examples:

ahn train anchors --data texts --out my-anchors  [dim]# half an hour on a laptop[/dim]

ahn train anchors --data texts --out my-anchors --scores asked --documents 240  [dim]# trains nothing[/dim]

ahn train anchors --model Qwen/Qwen2.5-0.5B-Instruct --data texts --out anchors
"""


@from_fields
def command(values: Annotated[dict[str, Any], AnchorSettings]) -> None:
    """Make the scores for anchors that need weights: which tokens will be needed once they have left the window?"""
    if "data" not in values:
        raise UsageError("there is nothing to hide facts in. Name a file, a folder or a dataset with --data.")
    if "out" not in values:
        raise UsageError("there is no folder to write to. Name one with --out.")
    from ahn.cli.loading import quiet
    from ahn.training.anchors import check_anchor_settings, train_anchors

    settings = AnchorSettings.from_dict(values)
    check_anchor_settings(settings)
    quiet()
    with notes().status("Reading ..."):
        report = train_anchors(settings, log)
    _print_report(report, settings.left_out)
    log(f"wrote {settings.out}: load it with ahn.load_anchors(model, {settings.out!r})", console=output())


def _print_report(report: AnchorReport, left_out: str) -> None:
    """Who votes, how well each layer foresees, and which facts are kept."""
    from rich.table import Table

    from ahn.training.anchors.run import KEPT

    if report.asked:
        layers = ", ".join(f"{layer} ({count})" for layer, count in sorted(report.asked.items()))
        log(f"asked: layers that vote, and their queries: {layers}", console=output())
    if report.layers:
        learned = Table("layer", title="learned: variance explained on held-out tokens, linear / vote")
        learned.title_justify = "left"
        for of in ("what questions need", "what the text reads again"):
            learned.add_column(of)
        for layer, questions in report.layers.items():
            learned.add_row(str(layer), *(f"{ridge:.2f} / {net:.2f}" for ridge, net in (questions, report.text[layer])))
        output().print(learned)
    among = " / ".join(map(str, KEPT))
    shares = Table("fact", "n", title=f"Share of a fact's tokens among {among} anchors, held-out texts")
    shares.title_justify, shares.caption_justify = "left", "left"
    shares.caption = "n: facts of this kind.  *: a kind that no score was made with."
    for score in report.shares_kept:
        shares.add_column(score, no_wrap=True)
    for kind, count in report.facts.items():
        by_score = (by_kind.get(kind, []) for by_kind in report.shares_kept.values())
        cells = [" / ".join(f"{share:.2f}" for share in each) for each in by_score]
        shares.add_row(f"{kind}*" if kind == left_out else kind, str(count), *cells)
    output().print(shares)
