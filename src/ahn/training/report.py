"""What a training achieved: perplexity of held-out text in the three modes, and the curve of its loss."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ahn
from ahn._home import new_figure, write_figure, write_text
from ahn.config import Mode
from ahn.errors import ConfigError
from ahn.generation import read
from ahn.training.sampling import Span

MODES: tuple[Mode, ...] = ("full", "window", "ahn")
TABLE, PLOT = "report.json", "loss.png"


@dataclasses.dataclass(frozen=True)
class Report:
    """How well the three modes predict held-out text, beyond the tokens that all of them keep.

    Attributes:
        nll: Mean negative log-likelihood in nats by mode; "ahn+128" is the memory with 128 anchors.
        tokens: Tokens scored.
        span: Window and sinks.
    """

    nll: dict[str, float]
    tokens: int
    span: Span

    @property
    def gap_closed(self) -> float:
        """The share of the window's loss against full attention that the memory wins back; NaN without a loss."""
        return self.share_closed("ahn")

    def share_closed(self, mode: str) -> float:
        """The same for another mode.

        Args:
            mode: A key of `nll`.
        """
        gap = self.nll["window"] - self.nll["full"]
        return (self.nll["window"] - self.nll[mode]) / gap if gap > 0 else math.nan

    def summary(self) -> str:
        """What memory and anchors win back, as a sentence; nothing where the window loses nothing."""
        if math.isnan(self.gap_closed):
            return ""
        shares = [("the memory", self.gap_closed)]
        shares += [
            (f"with {mode[4:]} anchors", self.share_closed(mode)) for mode in self.nll if mode.startswith("ahn+")
        ]
        return f"{', '.join(f'{name} wins back {share:.0%}' for name, share in shares)} of what the window loses"

    def rows(self) -> list[tuple[str, str, str]]:
        """Mode, nats per token and perplexity, as a table shows them."""
        return [(mode, f"{nll:.4f}", f"{math.exp(nll):.3f}") for mode, nll in self.nll.items()]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "window": self.span.window,
            "sinks": self.span.sinks,
            "tokens": self.tokens,
            "nll": self.nll,
            "perplexity": {mode: math.exp(nll) for mode, nll in self.nll.items()},
            "gap_closed": self.gap_closed,
        }


def evaluate(
    model: nn.Module, sequences: Iterable[torch.Tensor], span: Span, limit: int, anchors: int = 0
) -> Report | None:
    """Reads held-out sequences in every mode.

    Args:
        model: A model with a memory attached.
        sequences: Token ids, `[T]` each.
        span: Window and sinks.
        limit: Tokens to read at most in each mode; at least one sequence is read.
        anchors: Anchors to read with in one mode more, where the window is long enough for any.

    Returns:
        The report, or `None` if no sequence is longer than sinks and window.
    """
    chosen: list[torch.Tensor] = []
    for ids in sequences:
        if ids.numel() > sum(span) + 1:
            if chosen and sum(each.numel() for each in chosen) + ids.numel() > limit:
                break
            chosen.append(ids)
    if not chosen:
        return None
    nll: dict[str, float] = {}
    runs: dict[str, tuple[Mode, int]] = {mode: (mode, 0) for mode in MODES}
    if anchors and _serves(model, span, anchors):
        runs[f"ahn+{anchors}"] = ("ahn", anchors)
    for name, (mode, count) in runs.items():
        with ahn.mode(model, mode, window=span.window, sinks=span.sinks, anchors=count):
            scores = torch.cat([read(model, ids).nll[sum(span) :] for ids in chosen])
        nll[name] = float(scores.double().mean())
    return Report(nll, scores.numel(), span)


def _serves(model: nn.Module, span: Span, anchors: int) -> bool:
    """Whether a window is long enough to choose anchors."""
    try:
        with ahn.mode(model, "ahn", window=span.window, sinks=span.sinks, anchors=anchors):
            return True
    except ConfigError:
        return False


def write_report(report: Report, file: Path, more: Mapping[str, Any]) -> None:
    """Writes a report, with more facts beside it, as JSON."""
    text = json.dumps({**report.to_dict(), **more}, indent=2)
    write_text(file, text.replace("NaN", "null") + "\n")


def plot_losses(curves: Mapping[str, Sequence[Mapping[str, float]]], file: Path) -> None:
    """Draws the loss of each stage over its steps.

    Args:
        curves: By stage, the lines of its log.
        file: The PNG to write.
    """
    figure = new_figure(5 * max(1, len(curves)), 3.6)
    panels = figure.subplots(1, max(1, len(curves)), squeeze=False)[0]
    for panel, (stage, lines) in zip(panels, curves.items()):
        for key, label in (("loss", "training"), ("eval_loss", "held out")):
            points = [(line["step"], line[key]) for line in lines if key in line]
            if points:
                panel.plot(*zip(*points), label=label, linewidth=1 if key == "loss" else 2)
        panel.set(title=stage, xlabel="step", ylabel="share unexplained" if stage == "transfer" else "loss")
        panel.grid(alpha=0.3)
        panel.legend()
    write_figure(file, figure, dpi=120)
