"""What differs between two reports of the same command."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

from ahn.evaluation.errors import EvaluationError
from ahn.evaluation.report import EvaluationReport


@dataclasses.dataclass(frozen=True)
class ReportDifferences:
    """Rows of text, ready for tables.

    Attributes:
        command: The command of both.
        settings: Name and both values of each setting that differs.
        environment: Name and both values of each version and device that differs.
        results: Name, both values, and second minus first of each number.
    """

    command: str
    settings: list[tuple[str, str, str]]
    environment: list[tuple[str, str, str]]
    results: list[tuple[str, str, str, str]]


def compare(first: EvaluationReport, second: EvaluationReport, everything: bool = False) -> ReportDifferences:
    """Compares two reports.

    Args:
        first: A report.
        second: Another of the same command.
        everything: Whether to take equal numbers too, and those inside lists: one for each document or bin.

    Raises:
        EvaluationError: They are of different commands.
    """
    if first.command != second.command:
        raise EvaluationError(
            f"the first report is of {first.command}, the second of {second.command}: their numbers cannot be "
            "compared. Give two reports of the same command."
        )
    before, after = (dict(_leaves(report.results, everything)) for report in (first, second))
    names = [name for name in {**before, **after} if everything or before.get(name) != after.get(name)]
    return ReportDifferences(
        first.command,
        _differences(first.settings, second.settings),
        _differences(first.environment, second.environment),
        [_result(name, before.get(name), after.get(name)) for name in names],
    )


def _leaves(value: Any, lists: bool, name: str = "") -> Iterator[tuple[str, Any]]:
    """All numbers and texts in results, each with the names that lead to it."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from _leaves(each, lists, f"{name} {key}".strip())
    elif isinstance(value, list):
        for number, each in enumerate(value) if lists else ():
            yield from _leaves(each, lists, f"{name} {number}")
    else:
        yield name, value


def _differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    names = dict.fromkeys([*first, *second])
    return [
        (name, _shown(first.get(name)), _shown(second.get(name)))
        for name in names
        if first.get(name) != second.get(name)
    ]


def _result(name: str, first: Any, second: Any) -> tuple[str, str, str, str]:
    difference = _shown(second - first, "+") if _is_number(first) and _is_number(second) else "-"
    return name, _shown(first), _shown(second), difference


def _shown(value: Any, sign: str = "") -> str:
    if value is None:
        return "-"
    if not _is_number(value):
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if float(value).is_integer():
        return f"{int(value):{sign if value else ''},}"
    return f"{value:{sign},.4f}" if abs(value) >= 0.01 else f"{value:{sign}.6g}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
