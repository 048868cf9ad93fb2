"""Lines of JSONL files as records, a bad one named by its file and line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ahn.evaluation.errors import EvaluationError

Record = Mapping[str, Any]


def read_records(file: Path) -> Iterator[tuple[str, Record]]:
    """The records of a file, each with its place: "file, line 3". Empty lines are skipped.

    Args:
        file: JSONL in UTF-8, each line an object.

    Raises:
        EvaluationError: It cannot be read, holds no record, or a line is bad, which is named.
    """
    number, empty = 0, True
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    empty = False
                    where = f"{file}, line {number}"
                    yield where, _record(line, where, "utf-8-sig" if number == 1 else "utf-8")
    except OSError as error:
        raise EvaluationError(f"{file} cannot be read ({error.strerror}). Check its permissions.") from None
    if empty:
        raise EvaluationError(f"{file} is empty. Give a file with a JSON object in every line.")


def _record(line: bytes, where: str, encoding: str) -> Record:
    try:
        record = json.loads(line.decode(encoding).strip())
    except UnicodeDecodeError:
        raise EvaluationError(f"{where}: it is not UTF-8. Convert the file with iconv.") from None
    except json.JSONDecodeError as error:
        raise EvaluationError(f"{where}: it is no JSON ({error.msg}, column {error.colno}). Correct it.") from None
    except RecursionError:
        raise EvaluationError(f"{where}: it is nested too deeply. Correct it.") from None
    if not isinstance(record, dict):
        raise EvaluationError(f"{where}: it is no JSON object, but {type(record).__name__}. Correct it.")
    return record
