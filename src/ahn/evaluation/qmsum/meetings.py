"""Meetings with their questions, from a folder of QMSum's JSON files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ahn.evaluation.errors import EvaluationError


@dataclasses.dataclass(frozen=True)
class Query:
    """A question about a meeting.

    Attributes:
        question: The question, or what to sum up.
        answer: The gold answer.
        evidence: First and last turn, from 0, of each part of the meeting that the answer rests on; empty for a
            question about the whole meeting.
    """

    question: str
    answer: str
    evidence: tuple[tuple[int, int], ...] = ()


@dataclasses.dataclass(frozen=True)
class Meeting:
    """A meeting.

    Attributes:
        name: Name of its file, without the suffix.
        turns: What was said, each turn as a line "speaker: words".
        queries: The questions about it, those about the whole meeting last.
    """

    name: str
    turns: tuple[str, ...]
    queries: tuple[Query, ...]


def read_meetings(folder: Path, limit: int | None = None) -> list[Meeting]:
    """The meetings of a folder, in the order of their names.

    Args:
        folder: With a `.json` file for each meeting, in the form in which QMSum is published.
        limit: Meetings at most; all if `None`.

    Raises:
        EvaluationError: There is no such folder, it holds no meeting, or a file is no meeting, which is named.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise EvaluationError(f"{folder} {what}. Give the folder with QMSum's JSON files.")
    files = sorted(folder.glob("*.json"))
    if not files:
        raise EvaluationError(f"{folder} holds no .json file. Give the folder with QMSum's JSON files.")
    return [_meeting(file) for file in files[:limit]]


def checksum(meetings: Sequence[Meeting]) -> str:
    """SHA-256 of meetings, in hexadecimal."""
    found = hashlib.sha256()
    for meeting in meetings:
        found.update(repr(meeting).encode(errors="surrogatepass"))
    return found.hexdigest()


def _meeting(file: Path) -> Meeting:
    try:
        record = json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise EvaluationError(f"{file} cannot be read ({error.strerror}). Check its permissions.") from None
    except UnicodeDecodeError:
        raise EvaluationError(f"{file} is not UTF-8. Convert it with iconv.") from None
    except (ValueError, RecursionError) as error:
        raise EvaluationError(f"{file} is no JSON ({error}). Correct it.") from None
    turns = tuple(
        f"{_text(turn, 'speaker', f'{file}, turn {number}')}: {_text(turn, 'content', f'{file}, turn {number}')}\n"
        for number, turn in enumerate(_list(record, "meeting_transcripts", str(file)))
    )
    specific = _list(record, "specific_query_list", str(file))
    general = _list(record, "general_query_list", str(file))
    queries = [
        *(_query(each, f"{file}, specific query {number}", len(turns)) for number, each in enumerate(specific, 1)),
        *(_query(each, f"{file}, general query {number}", None) for number, each in enumerate(general, 1)),
    ]
    if not turns or not queries:
        raise EvaluationError(f"{file} holds no {'turn' if not turns else 'query'}. Take it out of the folder.")
    return Meeting(file.stem, turns, tuple(queries))


def _query(record: Any, where: str, turns: int | None) -> Query:
    question, answer = (_text(record, name, where) for name in ("query", "answer"))
    if not answer.strip():
        raise EvaluationError(f"{where}: its answer is empty. Correct it or leave it out.")
    if turns is None:
        return Query(question, answer)
    spans = tuple(_span(each, where, turns) for each in _list(record, "relevant_text_span", where))
    if not spans:
        raise EvaluationError(f'{where}: "relevant_text_span" is empty. Make it a general query or leave it out.')
    return Query(question, answer, spans)


def _span(span: Any, where: str, turns: int) -> tuple[int, int]:
    try:
        first, last = (int(each) for each in span)
    except (TypeError, ValueError):
        raise EvaluationError(f"{where}: the span {span!r} is no pair of turns. Correct it.") from None
    if not 0 <= first <= last < turns:
        raise EvaluationError(f"{where}: the span {first} to {last} is not within the {turns} turns. Correct it.")
    return first, last


def _list(record: Any, name: str, where: str) -> list[Any]:
    value = record.get(name) if isinstance(record, dict) else None
    if not isinstance(value, list):
        raise EvaluationError(f'{where}: there is no list "{name}". Give meetings in the form of QMSum.')
    return value


def _text(record: Any, name: str, where: str) -> str:
    value = record.get(name) if isinstance(record, dict) else None
    if not isinstance(value, str):
        raise EvaluationError(f'{where}: there is no text "{name}". Give meetings in the form of QMSum.')
    return value
