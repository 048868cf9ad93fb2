"""Time per token and cache against the context, as a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ahn._home import new_figure, tidy, write_figure
from ahn.speed.measure import Speed, Timing


def plot_speed(speed: Speed, title: str, files: Sequence[Path]) -> None:
    """Draws what a token takes to write and to read, and the cache, in every arm.

    Args:
        speed: What was measured.
        title: Stands above.
        files: Where to write; each suffix says how, `.png` or `.svg`.
    """
    figure = new_figure(13, 4)
    decoding, reading, cache = figure.subplots(1, 3)
    _panel(decoding, speed.decoding, lambda row: 1e3 * row.seconds.median, "Writing one token", "ms")
    _panel(reading, speed.reading, lambda row: 1e3 * row.seconds.median, "Reading, per token", "ms")
    _panel(cache, speed.decoding, lambda row: row.cache_bytes / 1e6, "Cache", "MB")
    for panel, rows in ((decoding, speed.decoding), (reading, speed.reading)):
        _spread(panel, rows)
    figure.suptitle(title)
    for file in files:
        write_figure(file, figure)


def _arms(rows: Sequence[Timing]) -> list[str]:
    return list(dict.fromkeys(row.arm for row in rows))


def _panel(panel: Any, rows: Sequence[Timing], value: Callable[[Timing], float], title: str, unit: str) -> None:
    for number, arm in enumerate(_arms(rows)):
        own = [row for row in rows if row.arm == arm]
        panel.plot([row.context for row in own], [value(row) for row in own], marker="o", color=f"C{number}", label=arm)
    panel.set(title=title, xlabel="tokens read before", ylabel=unit)
    panel.set_ylim(bottom=0)
    panel.xaxis.set_major_formatter(lambda tokens, _: f"{tokens:,.0f}")
    tidy(panel)
    panel.legend()


def _spread(panel: Any, rows: Sequence[Timing]) -> None:
    """Quartiles as bands."""
    for number, arm in enumerate(_arms(rows)):
        own = [row for row in rows if row.arm == arm]
        low, high = ([1e3 * getattr(row.seconds, end) for row in own] for end in ("low", "high"))
        panel.fill_between([row.context for row in own], low, high, color=f"C{number}", alpha=0.15, linewidth=0)
