"""The finished items of a long evaluation, on the disk as soon as they are there, so that a stop costs one item."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ahn.evaluation.errors import EvaluationError
from ahn.evaluation.report import plain


class Journal:
    """Items by key, kept in a JSONL file whose first line holds the settings they were made with.

    Args:
        path: The file; made with the first item if it is not there. `None` keeps the items in this object only.
        settings: Settings that an item depends on, by name.

    Raises:
        EvaluationError: The file was begun with other settings, cannot be read, or is no journal.

    Attributes:
        done: Finished items by key, as JSON gives them back.
    """

    def __init__(self, path: str | os.PathLike[str] | None, settings: Mapping[str, Any]) -> None:
        self.done: dict[str, dict[str, Any]] = {}
        self._path = None if path is None else Path(path)
        self._settings: dict[str, Any] = json.loads(json.dumps(plain(settings)))
        self._pinned: dict[str, Any] = {}
        self._whole = 0  # bytes of the file that hold whole lines
        self._begun = False
        if self._path is not None:
            self._read(self._path)

    def pin(self, name: str, value: Any) -> None:
        """Adds a setting that is known only later, such as a checksum of the weights that were loaded.

        Args:
            name: Its name.
            value: Its value, as for `plain`.

        Raises:
            EvaluationError: The file was begun with another value.
        """
        if self._begun and self._path is not None:
            check_settings(self._path, {name: self._pinned.get(name)}, {name: value})
        self._pinned[name] = plain(value)

    def add(self, key: str, record: Mapping[str, Any]) -> None:
        """Keeps an item. What a kill left of a line is overwritten.

        Args:
            key: Its name, unique among the items.
            record: What it gave, as for `plain`.

        Raises:
            EvaluationError: The file cannot be written.
        """
        entry = json.loads(json.dumps(plain(record)))
        lines: list[dict[str, Any]] = [] if self._begun else [{"settings": self._settings, "pinned": self._pinned}]
        lines.append({"key": key, "record": entry})
        if self._path is not None:
            self._append(self._path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
        self._begun = True
        self.done[key] = entry

    def _append(self, path: Path, data: bytes) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("r+b" if path.exists() else "xb") as file:
                file.truncate(self._whole)
                file.seek(self._whole)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise EvaluationError(
                f"{path} cannot be written ({error.strerror}). Make room or name another folder."
            ) from None
        self._whole += len(data)

    def _read(self, path: Path) -> None:
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise EvaluationError(f"{path} cannot be read ({error.strerror}). Name another folder.") from None
        self._whole = data.rfind(b"\n") + 1
        for number, line in enumerate(data[: self._whole].splitlines()):
            entry = _entry(line, "settings" if number == 0 else "record", f"{path}, line {number + 1}")
            if number == 0:
                check_settings(path, entry["settings"], self._settings)
                self._pinned = entry.get("pinned", {})
                self._begun = True
            else:
                self.done[str(entry.get("key"))] = entry["record"]


def check_settings(path: str | os.PathLike[str], before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Checks that what is to go on is what was begun.

    Args:
        path: The file, for the message.
        before: Settings that it was begun with, as JSON gives them back.
        now: Those of this run.

    Raises:
        EvaluationError: They differ; the first difference is named.
    """
    now = plain(now)
    for name in [*before, *(name for name in now if name not in before)]:
        if before.get(name) != now.get(name):
            raise EvaluationError(
                f"{path} was begun with {name} = {_shown(before.get(name))}, not {_shown(now.get(name))}; "
                "go on with the same settings or name another folder."
            )


def _entry(line: bytes, part: str, where: str) -> dict[str, Any]:
    try:
        entry: Any = json.loads(line)
    except (ValueError, RecursionError):
        entry = None
    parts = {part: None, "pinned": {}, **entry} if isinstance(entry, dict) else {part: None}
    if not isinstance(parts[part], dict) or not isinstance(parts["pinned"], dict):
        raise EvaluationError(f"{where}: it is no line of a journal. Name another folder, or remove the file.")
    return parts


def _shown(value: Any) -> str:
    """A setting in a message, shortened; one that is missing reads "nothing"."""
    if value is None:
        return "nothing"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
