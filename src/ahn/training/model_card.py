"""The model card of a training: how the memory was trained, and what was measured of it."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ahn.attachment import attachment_of
from ahn.checkpoint.anchors import ANCHORS
from ahn.checkpoint.card import write_card
from ahn.checkpoint.content import BaseInfo, memory_tensors
from ahn.training.report import Report
from ahn.training.settings import FILE, START, TrainSettings


def write_training_card(model: nn.Module, settings: TrainSettings, report: Report | None, folder: Path) -> bool:
    """Writes the card of a trained adapter, unless its folder has a README that somebody else wrote.

    Args:
        model: The model with the trained memory.
        settings: Settings of the training.
        report: The closing table, or `None` if there was nothing to read.
        folder: The adapter's folder.

    Returns:
        Whether a card was written.

    Raises:
        OutputError: The folder cannot be written.
    """
    sections = {"Training": _training(settings)}
    if report is not None:
        sections["Held-out text"] = _results(report)
    return write_card(
        folder,
        attachment_of(model).config,
        BaseInfo.of_model(model),
        parameters=sum(tensor.numel() for tensor in memory_tensors(model).values()),
        source=settings.out,
        anchors=(folder / ANCHORS.config).is_file(),
        sections=sections,
        licence=settings.licence,
        datasets=[source for source in settings.data if not Path(source).expanduser().exists()],
    )


def _training(settings: TrainSettings) -> str:
    """The settings that matter most, and the command that trains it again."""
    sequences = settings.batch * settings.accumulation
    steps = {"transfer": settings.transfer_steps, "distill": settings.steps, START: 0}
    rows = {
        "data": ", ".join(Path(source).name for source in settings.data),
        "steps": ", ".join(f"{steps[stage]} of {stage}" for stage in settings.stages),
        "sequences of a step, per process": f"{sequences} of at most {settings.length} tokens",
        "losses": ", ".join(f"{name} {weight:g}" for name, weight in settings.losses.items()),
        "learning rate": f"{settings.lr:g}",
        "anchors": ", ".join(map(str, settings.anchors)),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"`ahn train --config {FILE}` makes it again.\n\n| setting | value |\n|---|---|\n{table}"


def _results(report: Report) -> str:
    """The closing table."""
    rows = "\n".join(f"| {mode} | {nll} | {perplexity} |" for mode, nll, perplexity in report.rows())
    summary = report.summary()
    summary = f"{summary[:1].upper()}{summary[1:]}. " if summary else ""
    return (
        f"{summary}{report.tokens:,} tokens beyond a window of {report.span.window} and {report.span.sinks} sinks.\n\n"
        f"| mode | nats per token | perplexity |\n|---|---|---|\n{rows}"
    )
