"""The screen of the demo: a table that grows on a terminal, plain lines elsewhere, and the answers."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ahn.attachment import attachment_of
from ahn.cli.terminal import megabytes

if TYPE_CHECKING:
    from ahn.cli.comparison import ComparedMode, Comparison
    from ahn.cli.loading import Loaded

_BETWEEN_LINES = 10.0  # seconds
_SIDE_BY_SIDE = 100  # columns of a terminal


class Screen:
    """Where the demo is shown.

    Args:
        console: Standard output, a terminal or not.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live: Live | None = None
        self._last = time.monotonic()

    def opening(self, comparison: Comparison, title: str, fact: str = "") -> None:
        """Says what will happen."""
        loaded, attachment = comparison.loaded, attachment_of(comparison.loaded.model)
        name = loaded.name
        self.line(
            f"{name} reads {title}: {comparison.total:,} tokens. It was trained on texts of up to "
            f"{attachment.trained_context:,}. Window {loaded.config.window:,}, sinks {loaded.config.sinks} "
            f"({loaded.config.sink_positions})."
        )
        if loaded.adapter is not None:
            self.line(f"Memory: {loaded.config.memory}, weights from {loaded.adapter}.")
        else:
            self.line(
                f"Memory: {loaded.config.memory}, untrained (no adapter): ahn says exactly what window says, and only "
                "its cost shows.",
                "yellow",
            )
        if any("+" in mode.name and ":" not in mode.name for mode in comparison.modes):
            self.line(f"Anchors: chosen {_chosen_by(loaded)}.")
        if fact:
            self.line(f'Hidden near its beginning: "{fact}"')

    @contextlib.contextmanager
    def live(self, comparison: Comparison) -> Iterator[None]:
        """Shows the table while it grows, on a terminal."""
        if not self.console.is_terminal:
            yield
            return
        with Live(console=self.console, auto_refresh=False, transient=True) as self._live:
            self.update(comparison)
            yield
        self._live = None

    def update(self, comparison: Comparison) -> None:
        """Shows how far every mode has come."""
        if self._live is not None:
            self._live.update(Group(table(comparison), Text(_progress(comparison), "dim")), refresh=True)
        elif time.monotonic() - self._last >= _BETWEEN_LINES and not self.console.is_terminal:
            self._last = time.monotonic()
            self.line(_progress(comparison))

    def table(self, comparison: Comparison) -> None:
        """The table as it is now, for good."""
        self.console.print(table(comparison))

    def remarks(self, comparison: Comparison) -> None:
        """What the table cannot say by itself."""
        read, total = comparison.read_tokens, comparison.total
        if comparison.spans:
            self.line(
                f"Perplexity is over the same tokens for every mode in a column: those past the first "
                f"{comparison.exact:,} (sinks + window), which all modes read alike."
            )
        else:
            self.line(f"Nothing was scored: up to sinks + window = {comparison.exact:,} tokens all modes read alike.")
        full = comparison.full
        if full is not None and full.limit < comparison.limit and full.done:
            self.line(f"Full attention was stopped after {full.limit:,} tokens: {_why(comparison)}.")
        if read < total:
            seconds = sum(mode.reader.seconds / mode.reader.tokens for mode in comparison.modes if mode.name != "full")
            about = f", in about {max(1, round(seconds * total / 60))} min" if seconds else ""
            self.line(f"Read {read:,} of {total:,} tokens; --tokens all reads all{about}.")

    @contextlib.contextmanager
    def thinking(self) -> Iterator[None]:
        """While the answers are written."""
        with self.console.status("Answering ...") if self.console.is_terminal else contextlib.nullcontext():
            yield

    def answers(self, comparison: Comparison, question: str, gone: str = "") -> None:
        """The answers beside one another, or below one another where that is too narrow; after a fact that is gone."""
        self.console.print()
        self.line(f"Question: {question}", "bold")
        if gone:
            self.line(
                "The hidden sentence has left the window. A state of fixed size does not bring it back word for word; "
                "anchors are tokens that were kept exactly because something in them stood out when they were read."
            )
        modes = comparison.modes
        if self.console.width >= _SIDE_BY_SIDE:
            shown = Table(*[mode.name for mode in modes], box=box.SIMPLE_HEAD, pad_edge=False, expand=True)
            for column in shown.columns:
                column.ratio, column.header_style = 1, "bold"
            shown.add_row(*[Text(mode.answer) for mode in modes])
        else:
            shown = Table("mode", "answer", box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
            for mode in modes:
                shown.add_row(mode.name, Text(mode.answer))
        self.console.print(shown)

    def line(self, text: str, style: str = "") -> None:
        """A sentence, wrapped at words on a terminal and left whole elsewhere."""
        self.console.print(Text(text, style), soft_wrap=not self.console.is_terminal)


def table(comparison: Comparison) -> Table:
    """One row for every mode."""
    spans = comparison.spans
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    shown.add_column("mode", no_wrap=True)
    headers = ["tokens", "tokens/s", "cache\nMB", "full cache\nMB", *(f"perplexity\n{a:,}-{b:,}" for a, b in spans)]
    for header in headers:
        shown.add_column(header, justify="right", no_wrap=True)
    for mode in comparison.modes:
        shown.add_row(mode.name, *_cells(mode, spans))
    return shown


def _cells(mode: ComparedMode, spans: list[tuple[int, int]]) -> list[str]:
    reader = mode.reader
    speed = f"{reader.tokens / reader.seconds:,.0f}" if reader.seconds else "-"
    scores = (mode.perplexity(*span) for span in spans)
    return [
        f"{reader.tokens:,}",
        speed,
        megabytes(mode.reader.cache_bytes),
        megabytes(mode.full_bytes),
        *("-" if score is None else f"{score:.2f}" for score in scores),
    ]


def _chosen_by(loaded: Loaded) -> str:
    """What chooses the anchors, for a sentence."""
    return "by key_diff, which needs no weights" if loaded.scores is None else f"with weights from {loaded.scores}"


def _progress(comparison: Comparison) -> str:
    parts = [
        f"{mode.name} {mode.reader.tokens:,} ({megabytes(mode.reader.cache_bytes)} MB)" for mode in comparison.modes
    ]
    deadline = comparison.limits.deadline
    end = f"{comparison.limit:,} tokens"
    if deadline is not None:
        end = f"the answer in {max(0, deadline - time.monotonic()):.0f} s"
    return f"read {', '.join(parts)}; up to {end}"


def _why(comparison: Comparison) -> str:
    if comparison.limits.deadline is not None:
        return "its cache grows with the text; with --tokens it goes on to its trained context"
    return "with question and answer its trained context is full, or its cache has 2 GB"
