"""What the library writes: the folder of what it makes once, and files and figures, each whole or not at all."""

from __future__ import annotations

import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from ahn.errors import ModelError, OutputError

_DONE = ".complete"


def home() -> Path:
    """Folder in which the library keeps what it makes once: `AHN_HOME`, or `ahn` in the user's cache directory.

    Returns:
        `$AHN_HOME`, else `$XDG_CACHE_HOME/ahn`, else `~/.cache/ahn`. It need not exist yet.
    """
    if chosen := os.environ.get("AHN_HOME"):
        return Path(chosen).expanduser().absolute()
    cache = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(cache) if os.path.isabs(cache) else Path.home() / ".cache") / "ahn"


def make_once(
    folder: Path,
    make: Callable[[Path], None],
    *,
    doing: str,
    needed_bytes: int,
    is_whole: Callable[[Path], bool] = lambda folder: True,
) -> Path:
    """Makes a folder unless it is there, so that no process ever sees half of it.

    It is written beside its final place and renamed. Of several processes one makes it and the others wait. A process
    may be killed at any moment: what it left is removed by the next one.

    Args:
        folder: The folder to make.
        make: Fills the empty folder that it is given.
        doing: What to tell the user on standard error while it is made, such as "Converting X (once, about 10 s)".
        needed_bytes: Free disk space that it takes.
        is_whole: Whether a folder that was made earlier can be used as it is; if not, it is made anew.

    Returns:
        The folder, complete.

    Raises:
        ModelError: The place is not writable or the disk is full; `make` may raise others.
    """
    if (folder / _DONE).is_file() and is_whole(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder, doing):
            if not ((folder / _DONE).is_file() and is_whole(folder)):
                _make(folder, make, doing, needed_bytes)
    except (OSError, NotImplementedError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ModelError(
            f"{folder.parent} cannot be written: {reason}. "
            f"Set AHN_HOME to a folder that is writable and has {needed_bytes >> 20} MB free."
        ) from None
    return folder


@contextmanager
def replaced_file(path: str | os.PathLike[str], inputs: Iterable[str | os.PathLike[str]] = ()) -> Iterator[Path]:
    """Yields an empty file beside another one, whose place it takes at the end, once it is on the disk.

    Where `path` is a link, the file that it points to is replaced. If anything fails, what was there stays as it was
    and nothing else is left.

    Args:
        path: The file to write.
        inputs: Files that are read meanwhile, none of which this may be.

    Raises:
        OutputError: It is no regular file, or one of the inputs; or the place is not writable or the disk full.
    """
    target = Path(os.path.realpath(path))
    try:
        _check_replaceable(target, path, inputs)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=".ahn-", suffix=".part")
        os.close(handle)
        part = Path(name)
        try:
            yield part
            part.chmod(stat.S_IMODE(target.stat().st_mode) if target.exists() else 0o666 & ~umask())
            flush(part)
            os.replace(part, target)
            with suppress(OSError):  # some file systems have no such thing
                flush(target.parent)
        finally:
            part.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise OutputError(
            f"cannot write {os.fspath(path)}: {reason}; name a place that is writable and has space"
        ) from None


def _check_replaceable(target: Path, path: str | os.PathLike[str], inputs: Iterable[str | os.PathLike[str]]) -> None:
    """Checks that a file is a regular one, if it is there, and none of the inputs."""
    if not target.exists():
        return
    if not target.is_file():
        kind = "a folder" if target.is_dir() else "no regular file"
        raise OutputError(f"cannot write {os.fspath(path)}: it is {kind}; name a file")
    if any(os.path.exists(other) and target.samefile(other) for other in inputs):
        raise OutputError(f"cannot write {os.fspath(path)}: it is what is read; name another file")


def write_text(path: str | os.PathLike[str], text: str, inputs: Iterable[str | os.PathLike[str]] = ()) -> None:
    """Writes a text in UTF-8 as `replaced_file` does.

    Args:
        path: The file to write.
        text: What it shall hold.
        inputs: As for `replaced_file`.

    Raises:
        OutputError: As for `replaced_file`.
    """
    with replaced_file(path, inputs) as part:
        part.write_text(text, encoding="utf-8")


def new_figure(width: float, height: float) -> Any:
    """An empty figure of matplotlib that needs no screen.

    Args:
        width: Inches.
        height: Inches.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def tidy(panel: Any) -> None:
    """Gives a panel of a figure a faint grid and no frame at the top and the right."""
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)


def write_figure(path: str | os.PathLike[str], figure: Any, dpi: int = 150) -> None:
    """Writes a figure of matplotlib as `replaced_file` does.

    Args:
        path: The file to write; its ending names the format.
        figure: The figure.
        dpi: Dots per inch.

    Raises:
        OutputError: As for `replaced_file`.
    """
    with replaced_file(path) as part:
        figure.savefig(part, dpi=dpi, format=Path(path).suffix.removeprefix(".") or None)


def flush(path: Path) -> None:
    """Waits until a file, or what a folder lists, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def umask() -> int:
    """The rights that new files of this process do not get."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


@contextmanager
def _lock(folder: Path, doing: str) -> Iterator[None]:
    """Lets one process in; the operating system frees the lock when a process dies, however it dies."""
    lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _tell(f"Waiting for another process: {doing}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _make(folder: Path, make: Callable[[Path], None], doing: str, needed_bytes: int) -> None:
    for stale in [*folder.parent.glob(f".{folder.name}.*"), folder]:
        shutil.rmtree(stale, ignore_errors=True)
    free = shutil.disk_usage(folder.parent).free
    if free < needed_bytes:
        raise OSError(f"only {free >> 20} MB are free")
    _tell(doing)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        make(part)
        (part / _DONE).touch()
        part.chmod(0o755)
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _tell(text: str) -> None:
    sys.stderr.write(f"{text} ...\n")
    sys.stderr.flush()
