"""Arguments are checked before anything is loaded: each function says what is wrong and what would be right.

A folder is written whole, in place of an older one if the user said so.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ahn.cli.terminal import UsageError

MODES = ("ahn", "window", "full")
PLOTS = (".png", ".svg")
_LONGEST_NAME = 255


def at_least(option: str, value: float | None, least: float) -> None:
    """Checks a number that may be left out."""
    if value is not None and not value >= least:
        raise UsageError(f"{option} must be at least {least}, not {value}.")


def one_of(option: str, value: str | None, known: tuple[str, ...]) -> None:
    """Checks a word that may be left out."""
    if value is not None and value not in known:
        raise UsageError(f"{option} must be {', '.join(known[:-1])} or {known[-1]}, not '{value}'.")


def setting(option: str, value: Any, facts: Mapping[str, Any]) -> None:
    """Checks a value that may be left out against the metadata of its setting, see `ahn.config.setting`."""
    if facts["least"] is not None:
        at_least(option, value, facts["least"])
    if facts["choices"]:
        one_of(option, value, facts["choices"])


def words(text: str) -> list[str]:
    """The words in "ahn, window,full", each once."""
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def mode(option: str, name: str | None) -> None:
    """Checks a mode that may be left out, `ahn` with a number of anchors where wanted: "ahn+64"."""
    from ahn.evaluation.arm_names import find_arm

    if name is None:
        return
    method, _, added = name.partition("+")
    if method not in MODES or (added and method != "ahn"):
        raise UsageError(f"{option} must be {', '.join(MODES)} or ahn+64 (so many anchors), not '{name}'.")
    find_arm(name)


def modes(option: str, text: str) -> list[str]:
    """Modes joined by commas, each once."""
    chosen = words(text)
    for name in chosen or [""]:
        mode(option, name)
    return chosen


def folder_to_write(path: Path, source: str, force: bool) -> None:
    """Checks that a folder may be written: it is new or empty, or holds a checkpoint that `--force` gives up."""
    _check_length("the folder to write", path)
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file. Name a folder to write.")
    if os.path.exists(source) and path.exists() and path.samefile(source):
        raise UsageError(f"{path} is the source itself. Name another folder to write.")
    if not path.is_dir() or not any(path.iterdir()):
        return
    if not force:
        raise UsageError(f"{path} is not empty. Name another folder, or replace it with --force.")
    if not any((path / name).is_file() for name in ("ahn_config.json", "config.json")):
        raise UsageError(f"{path} holds other things than a checkpoint, so --force does not replace it. Name another.")


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to write that becomes `target` when all went well; only then what was there before is gone."""
    if not target.is_dir() or not any(target.iterdir()):
        yield target
        return
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield work / "new"
        target.rename(work / "old")
        try:
            (work / "new").rename(target)
        except OSError:
            (work / "old").rename(target)
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def file_to_write(option: str, path: Path | None, inputs: Iterable[str | None] = ()) -> None:
    """Checks that a file can be written where it is wanted.

    Args:
        option: The option that names it.
        path: The file; `None` for none.
        inputs: Names of files that are read, none of which it may be.
    """
    if path is None:
        return
    _check_length(option, path)
    if path.is_dir():
        raise UsageError(f"{option} {path} is a folder. Name a file in it.")
    if path.exists() and not path.is_file():
        raise UsageError(f"{option} {path} is no regular file. Name another one.")
    if path.exists() and any(Path(name).exists() and path.samefile(name) for name in inputs if name is not None):
        raise UsageError(f"{option} {path} is read too, and would be lost. Name another file.")
    if not path.parent.is_dir():
        raise UsageError(f"{option}: there is no folder {path.parent}. Make it first.")


def _check_length(option: str, path: Path) -> None:
    """Checks that no part of a path is longer than file systems take."""
    if any(len(os.fsencode(part)) > _LONGEST_NAME for part in path.parts):
        raise UsageError(f"{option}: a name of more than {_LONGEST_NAME} bytes cannot be written. Take a shorter one.")


def plots_to_write(paths: Iterable[Path]) -> list[Path]:
    """Checks the files of `--plot`: their suffixes, their folders, and what draws them; their full paths."""
    files = [path.expanduser() for path in paths]
    for path in files:
        if path.suffix.lower() not in PLOTS:
            raise UsageError(f"--plot {path} must end in {' or '.join(PLOTS)}.")
        file_to_write("--plot", path)
        if find_spec("matplotlib") is None:
            raise UsageError("--plot needs matplotlib. Install it: pip install 'ahn[train]'")
    return files


def file_to_read(option: str, path: Path | None) -> None:
    """Checks that a file is there."""
    if path is not None and not os.path.isfile(path):
        what = "is a folder" if os.path.isdir(path) else "does not exist"
        raise UsageError(f"{option} {path} {what}. Check the path.")


def adapter(name: str | None) -> None:
    """Checks that an adapter given by its path is there; other names are looked up later."""
    if name is None:
        return
    path = Path(name).expanduser()
    if os.path.isfile(path):
        raise UsageError(f"--adapter {name} is a file. Give the folder that holds it and its config.")
    looks_local = path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1
    if looks_local and name != "none" and not os.path.isdir(path):
        raise UsageError(f"--adapter {name} does not exist. Give a folder, a hub id owner/name, or none.")


def text_file(option: str, name: str) -> str:
    """The text in a file, or on standard input for "-".

    Args:
        option: How the user named it, for messages.
        name: Path of the file, or "-".

    Raises:
        UsageError: There is no such file, or it is empty, binary or not UTF-8.
    """
    if name == "-":
        if sys.stdin is None or sys.stdin.isatty():
            raise UsageError(f"{option} - reads standard input, which is the keyboard here. Pipe a text into it.")
        where, data = "standard input", sys.stdin.buffer.read()
    else:
        path = Path(name).expanduser()
        file_to_read(option, path)
        where, data = f"{option} {name}", path.read_bytes()
    if not data.strip():
        raise UsageError(f"{where} is empty. Give a text.")
    if b"\0" in data:
        raise UsageError(f"{where} is binary. Give plain text in UTF-8.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        remedy = "Convert it, for example with: iconv -f latin1 -t utf-8"
        raise UsageError(f"{where} is not UTF-8 (byte {error.start:,}). {remedy}.") from None


def evicts(option: str, tokens: int, exact: int, remedy: str) -> None:
    """Checks that something leaves the window of a text.

    Args:
        option: The option that says how long the text is.
        tokens: Its tokens.
        exact: Sinks and window.
        remedy: What to do about the text.

    Raises:
        UsageError: Nothing does.
    """
    if tokens <= exact:
        raise UsageError(
            f"{option} {tokens:,} do not pass sinks + window = {exact:,}, so that nothing is evicted. "
            f"{remedy}, or take a smaller --window."
        )
