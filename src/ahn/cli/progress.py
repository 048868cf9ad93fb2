"""How far a reading has come: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ahn.cli.terminal import megabytes, say

if TYPE_CHECKING:
    from rich.console import Console

    from ahn.reading import Progress, Reader

_BETWEEN_LINES = 10.0  # seconds


@contextlib.contextmanager
def reading_bar(console: Console, total: int) -> Iterator[Callable[[Progress], None]]:
    """Shows the reading of `total` tokens; the function that it gives is to be called after every chunk."""
    if console.is_terminal:
        with _bar(console, total) as show:
            yield show
        return
    last = time.monotonic()

    def line(progress: Progress) -> None:
        nonlocal last
        if progress.tokens < total and time.monotonic() - last >= _BETWEEN_LINES:
            last = time.monotonic()
            say(f"read {progress.tokens:,} of {total:,} tokens, {_rates(progress)}", console=console)

    yield line


@contextlib.contextmanager
def _bar(console: Console, total: int) -> Iterator[Callable[[Progress], None]]:
    from rich import progress

    columns: list[Any] = [
        "Reading",
        progress.BarColumn(),
        progress.TextColumn("{task.completed:,.0f}/{task.total:,.0f} tokens  {task.fields[rates]}"),
        progress.TimeRemainingColumn(),
    ]
    with progress.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total, rates="")
        yield lambda now: bar.update(task, completed=now.tokens, rates=_rates(now))


def summary(model: Any, reader: Reader) -> str:
    """One line on a reading that is done."""
    from ahn.reading import full_cache_bytes

    now, seen = reader.progress, reader.cache.get_seq_length()
    full = megabytes(full_cache_bytes(model, seen))
    return f"read {now.tokens:,} tokens in {now.seconds:.1f} s, {_rates(now)} (full attention: {full} MB)"


def _rates(now: Progress) -> str:
    return f"{now.tokens / max(now.seconds, 1e-9):,.0f} tokens/s, cache {megabytes(now.cache_bytes)} MB"
