"""How far a reading has come: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ahn.cli.terminal import megabytes, say

if TYPE_CHECKING:
    from rich.console import Console

    from ahn.generation import Progress, Reader

_BETWEEN_LINES = 10.0  # seconds


@contextlib.contextmanager
def reading_bar(console: Console, total: int) -> Iterator[Callable[[Progress], None]]:
    """Shows the reading of `total` tokens; the function that it gives is to be called after every chunk."""
    with work_bar(console, total, "tokens", "read") as show:
        yield lambda now: show(now.tokens, _rates(now))


@contextlib.contextmanager
def work_bar(console: Console, total: int, unit: str, verb: str = "done") -> Iterator[Callable[..., None]]:
    """Shows how much of some work is done: a bar with the time left on a terminal, a line now and then elsewhere.

    Args:
        console: Where to show it.
        total: How much there is to do.
        unit: What is counted: "tokens".
        verb: What is done to it: "read".

    Yields:
        A function of what is done by now and, if wanted, a remark, to be called after every step. What it is told first
        was done before: the time left is guessed from what comes after it.
    """
    if console.is_terminal:
        with _bar(console, total, unit) as show:
            yield show
        return
    last = time.monotonic()

    def line(done: int, remark: str = "") -> None:
        nonlocal last
        if done < total and time.monotonic() - last >= _BETWEEN_LINES:
            last = time.monotonic()
            end = f", {remark}" if remark else ""
            say(f"{verb} {done:,} of {total:,} {unit}{end}", console=console)

    yield line


@contextlib.contextmanager
def _bar(console: Console, total: int, unit: str) -> Iterator[Callable[..., None]]:
    from rich import progress

    columns: list[Any] = [
        progress.BarColumn(),
        progress.TextColumn(f"{{task.completed:,.0f}}/{{task.total:,.0f}} {unit}  {{task.fields[remark]}}"),
        progress.TimeRemainingColumn(),
    ]
    with progress.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total, remark="")
        yield lambda done, remark="": bar.update(task, completed=done, remark=remark)


def summary(model: Any, reader: Reader) -> str:
    """One line on a reading that is done."""
    from ahn.generation import full_cache_bytes

    now, seen = reader.progress, reader.cache.get_seq_length()
    full = megabytes(full_cache_bytes(model, seen))
    return f"read {now.tokens:,} tokens in {now.seconds:.1f} s, {_rates(now)} (full attention: {full} MB)"


def _rates(now: Progress) -> str:
    return f"{now.tokens / max(now.seconds, 1e-9):,.0f} tokens/s, cache {megabytes(now.cache_bytes)} MB"
