"""What every command shows and how it ends: consoles, numbers with their units, progress, one line for an error."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ahn.errors import AHNError, one_line

if TYPE_CHECKING:
    from rich.console import Console

    from ahn.generation import Progress, Reader

WRONG_INPUT = 2
FAILED = 1
INTERRUPTED = 130
_BETWEEN_LINES = 10.0  # seconds
_WRONG_FILES = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


class UsageError(Exception):
    """An argument that cannot work; the message says the remedy."""


@dataclass
class ExitStatus:
    """How a command ended; `status` is the exit status of the process."""

    status: int = 0


def output() -> Console:
    """The console for results, on standard output."""
    from ahn.cli.console import SafeConsole

    return SafeConsole(highlight=False, markup=False)


def notes() -> Console:
    """The console for progress, notes and errors, on standard error."""
    from ahn.cli.console import SafeConsole

    return SafeConsole(stderr=True, highlight=False, markup=False)


def log(text: str, style: str = "", console: Console | None = None) -> None:
    """Prints one line as it is: no markup, no wrapping."""
    (console or notes()).print(text, style=style or None, markup=False, soft_wrap=True)


def megabytes(count: float) -> str:
    """Bytes in MB, 10^6 bytes: "48.7", "5,220"."""
    value = count / 1e6
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"


@contextlib.contextmanager
def reading_bar(console: Console, total: int) -> Iterator[Callable[[Progress], None]]:
    """Shows the reading of `total` tokens; the function that it gives is to be called after every chunk."""
    with work_bar(console, total, "tokens", "read") as update:
        yield lambda now: update(now.tokens, _rates(now))


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
        with _bar(console, total, unit) as update:
            yield update
        return
    last = time.monotonic()

    def line(done: int, remark: str = "") -> None:
        nonlocal last
        if done < total and time.monotonic() - last >= _BETWEEN_LINES:
            last = time.monotonic()
            end = f", {remark}" if remark else ""
            log(f"{verb} {done:,} of {total:,} {unit}{end}", console=console)

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


def prepare_streams() -> None:
    """Lets no text be lost: characters that a stream has no code for, a width of nothing, a stream that is closed."""
    if not os.environ.get("COLUMNS", "80").isdigit() or not int(os.environ.get("COLUMNS", "80")):
        del os.environ["COLUMNS"]
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller, as by `>&-`
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


@contextlib.contextmanager
def reporting() -> Iterator[ExitStatus]:
    """Turns every error into one line on standard error and an exit status; `AHN_DEBUG=1` shows the traceback."""
    outcome = ExitStatus()
    prepare_streams()
    with _one_line_warnings():
        try:
            yield outcome
            sys.stdout.flush()
            if outcome.status == INTERRUPTED:
                log("interrupted", "yellow")
        except KeyboardInterrupt:
            outcome.status = INTERRUPTED
            log("interrupted", "yellow")
        except BrokenPipeError:  # the reader of our output has left, which is its right
            outcome.status = FAILED
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except Exception as error:
            if os.environ.get("AHN_DEBUG", "0") not in ("", "0"):
                raise
            outcome.status, text = _explain(error)
            log(f"error: {text}", "red")


def _explain(error: Exception) -> tuple[int, str]:
    """Exit status and words for an error."""
    if hasattr(error, "format_message"):  # typer's own; which module they live in depends on its version
        context = getattr(error, "ctx", None)
        help_of = context.command_path if context is not None else "ahn"
        return WRONG_INPUT, f"{one_line(error.format_message())} See `{help_of} --help`."
    if isinstance(error, (UsageError, AHNError)):
        return WRONG_INPUT, one_line(error)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        is_wrong = isinstance(error, _WRONG_FILES) or error.errno == errno.ENAMETOOLONG
        return WRONG_INPUT if is_wrong else FAILED, f"{where}{error.strerror or error}"
    name = type(error).__name__
    if isinstance(error, MemoryError) or name == "OutOfMemoryError" or "can't allocate memory" in str(error):
        return FAILED, "out of memory; try a smaller --window or --chunk, or another --mode than full"
    return FAILED, f"unexpected {name}: {one_line(error)} (AHN_DEBUG=1 shows where)"


@contextlib.contextmanager
def _one_line_warnings() -> Iterator[None]:
    """Shows this library's warnings as one line each and those of its dependencies not at all."""

    def print_warning(message: Warning | str, *_: Any, **__: Any) -> None:
        log(f"warning: {one_line(message)}", "yellow")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", category=UserWarning, module=r"ahn\b")
        warnings.showwarning = print_warning
        yield
