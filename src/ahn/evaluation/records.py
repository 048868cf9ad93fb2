"""Lines of JSONL files as records, a bad one named by its file and line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ahn.evaluation.errors import EvaluationError
from ahn.models.text import json_lines

Record = Mapping[str, Any]


def read_records(file: Path) -> Iterator[tuple[str, Record]]:
    """The records of a file, each with its place: "file, line 3". Empty lines are skipped.

    Args:
        file: JSONL in UTF-8, each line an object.

    Raises:
        EvaluationError: It cannot be read, holds no record, or a line is bad, which is named.
    """
    empty = True
    for where, record in json_lines(file, EvaluationError):
        if not isinstance(record, dict):
            raise EvaluationError(f"{where}: it is no JSON object, but {type(record).__name__}. Correct it.")
        empty = False
        yield where, record
    if empty:
        raise EvaluationError(f"{file} is empty. Give a file with a JSON object in every line.")
