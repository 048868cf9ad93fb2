"""What `ahn probe` found, in the three forms that it comes in: for a terminal, as JSON, as a page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from rich.text import Text

from ahn.evaluation.page import Page
from ahn.evaluation.probing.plots import draw
from ahn.evaluation.probing.shading import STYLE, Scale, ShownToken, coloured_text, show_tokens, strongest, token_texts
from ahn.evaluation.report import EvaluationReport, environment
from ahn.evaluation.tables import ResultTable

if TYPE_CHECKING:
    from rich.console import Console

    from ahn.cli.loading import Loaded
    from ahn.evaluation.probing import Positions, StateTrace, TokenGradients

_SHADES = ("", "#000000 on #fee3c2", "#000000 on #fdbe85", "#000000 on #fd8d3c", "#ffffff on #c24701")
"""Styles of evicted tokens, from the weakest to the strongest, readable on light and dark terminals alike."""

_CONTROLS = dict.fromkeys((code for code in range(32) if chr(code) not in "\t\n"), "\ufffd")
"""What a text must not tell a terminal."""

_STYLES = {"sinks": "underline", "window": "dim underline"}
_COLOUR = "The stronger the colour, the more the student still lacks of an evicted token."
_MEANING = (
    "The loss is the mean divergence of the student (sinks, window and memory) from the teacher (full attention). A "
    "strong colour is a large gradient of this loss with respect to the embedding of an evicted token: the student "
    "still lacks something of it. A weak one: what the loss needs of the token is there."
)
_WAYS = {
    "all": "The loss counts at all positions beyond sinks and window, so that a token also draws a gradient from its "
    "own position and from those that read it while it was in the window. With --positions last they are left out.",
    "last": "The loss counts in the last window alone: an evicted token more than a window before it acts through the "
    "memory, or through tokens that had read it.",
}


@dataclass(frozen=True)
class Probe:
    """What was measured on a text.

    Attributes:
        loaded: The model and its memory.
        title: What the text is called.
        sinks: Number of sinks.
        window: Tokens of the window.
        positions: Where the loss counts.
        ids: The tokens that were read.
        total: Tokens of the whole text.
        gradients: What the loss still lacks of each token.
        trace: State and gates.
    """

    loaded: Loaded
    title: str
    sinks: int
    window: int
    positions: Positions
    ids: list[int]
    total: int
    gradients: TokenGradients
    trace: StateTrace


def print_probe(probe: Probe, top: int, console: Console) -> None:
    """The coloured text on a terminal with colours, and the table and sentences anywhere."""
    tokens, scale = shown(probe)
    for sentence in summary(probe):
        console.print(Text(sentence), soft_wrap=not console.is_terminal)
    console.print()
    if console.is_terminal and console.color_system is not None:
        console.print(_coloured(tokens), end="\n\n")
        console.print(_legend(scale))
        console.print(Text(_COLOUR, "dim"), end="\n\n")
    _table(tokens, top).print(console)


def shown(probe: Probe) -> tuple[list[ShownToken], Scale]:
    """The tokens, and the scale of the evicted ones."""
    evicted = probe.gradients.evicted
    scale = Scale.spanning(probe.gradients.norms[evicted.start : evicted.stop])
    return show_tokens(token_texts(probe.loaded.tokenizer, probe.ids), probe.gradients, scale), scale


def summary(probe: Probe) -> list[str]:
    """What was read, and what was found, in sentences."""
    loaded, evicted, trace = probe.loaded, probe.gradients.evicted, probe.trace
    read = f"{len(probe.ids):,} tokens" if len(probe.ids) == probe.total else f"the first {len(probe.ids):,} tokens"
    memory = f"weights from {loaded.adapter}" if loaded.adapter else "untrained, so that it gives nothing back"
    lines = [
        f"{loaded.name} reads {read} of {probe.title}: sinks {probe.sinks:,}, window {probe.window:,}, "
        f"{len(evicted):,} evicted. Memory: {loaded.config.memory}, {memory}.",
        f"The student is {probe.gradients.loss:.3f} nats per token away from full attention, over "
        f"{probe.gradients.positions:,} positions.",
    ]
    last = trace.fullness[-1]
    decay_text = "" if trace.decay is None else f", decay {float(trace.decay.mean()):.3f} (share kept per token)"
    lines.append(
        f"State: effective rank {float(trace.rank[-1].mean()):.1f} of at most {max(trace.full_rank)} (mean over heads; "
        f"{float(last.min()):.0%} to {float(last.max()):.0%} full). Gates: write strength "
        f"{float(trace.write.mean()):.2g}{decay_text}."
    )
    return lines


def make_report(probe: Probe, seed: int) -> EvaluationReport:
    """Every number.

    Args:
        probe: What was measured.
        seed: Of the weights of an untrained memory.
    """
    tokens, _ = shown(probe)
    trace = probe.trace
    results = {
        "loss": probe.gradients.loss,
        "positions": probe.gradients.positions,
        "tokens": [
            {"position": token.position, "id": number, "text": token.text, "part": token.part, "gradient": token.norm}
            for token, number in zip(tokens, probe.ids)
        ],
        "layers": trace.layers,
        "state": {"tokens_read": trace.tokens, "effective_rank": trace.rank, "full_rank": trace.full_rank},
        "gates": {"write": trace.write, "decay": trace.decay},
    }
    return EvaluationReport("probe", _settings(probe), results, environment(probe.loaded.model, seed))


def make_page(probe: Probe, report: EvaluationReport, top: int) -> Page:
    """Everything on one page.

    Args:
        probe: What was measured.
        report: The report of it.
        top: Tokens in the table.
    """
    tokens, scale = shown(probe)
    page = Page(f"What the memory has kept of {probe.title}")
    page.text(*summary(probe))
    page.heading("Gradient of the loss on every token")
    page.text(_MEANING, _WAYS[probe.positions])
    page.markup(coloured_text(tokens, scale), STYLE)
    page.table(_table(tokens, top))
    page.heading("State and gates")
    for name, (figure, caption) in draw(probe.trace, probe.sinks).items():
        page.figure(name, figure, caption)
    page.heading("Settings")
    page.facts({**report.settings, **report.environment})
    return page


def _table(tokens: list[ShownToken], top: int) -> ResultTable:
    rows = [
        [token.position, words.translate(_CONTROLS), f"{token.norm:.3g}"] for token, words in strongest(tokens, top)
    ]
    columns = ("position", "in the text", "gradient")
    return ResultTable(columns, rows, "The evicted tokens with the largest gradients")


def _settings(probe: Probe) -> dict[str, Any]:
    config = probe.loaded.config
    return {
        "model": probe.loaded.name,
        "adapter": probe.loaded.adapter,
        "memory": config.memory,
        "window": probe.window,
        "sinks": probe.sinks,
        "positions": probe.positions,
        "text": probe.title,
        "tokens": len(probe.ids),
    }


def _coloured(tokens: list[ShownToken]) -> Text:
    parts = Text()
    for token in tokens:
        style = _STYLES.get(token.part) or _SHADES[min(len(_SHADES) - 1, int(token.shade * len(_SHADES)))]
        parts.append(token.text.translate(_CONTROLS), style)
    parts.rstrip()
    return parts


def _legend(scale: Scale) -> Text:
    legend = Text("evicted, gradient: ")
    steps = torch.logspace(0, 1, len(_SHADES) + 1, base=scale.high / scale.low).tolist()
    for step, style in zip(steps, _SHADES):
        legend.append(f" from {scale.low * step:.2g} ", style).append(" ")
    return legend.append("  ").append("sinks", _STYLES["sinks"]).append("  ").append("window", _STYLES["window"])
