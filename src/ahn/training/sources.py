"""Where texts come from: files, folders, JSONL, and anything that the `datasets` library reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ahn.errors import AHNError, one_line
from ahn.models.text import TEXT_FILES, json_lines

RECORD_FILES = (".jsonl", ".ndjson")
_TABLES = (".parquet", ".arrow", ".csv")


class DataError(AHNError, ValueError):
    """Data to train on cannot be found or read; the message names the place."""


@dataclasses.dataclass(frozen=True)
class Document:
    """A text, or a conversation.

    Attributes:
        where: The file and line, or the dataset and record, that it comes from.
        text: The text, or `None` for a conversation.
        messages: The conversation, each message with a "role" and a "content"; empty for a text.
    """

    where: str
    text: str | None = None
    messages: tuple[Mapping[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class DataQuery:
    """What of a dataset of the `datasets` library is wanted; files and folders of text do not look at it.

    Attributes:
        split: Name of the split.
        name: Name of the configuration, or `None` for the only one.
        streaming: Whether to read it while training instead of downloading it first.
    """

    split: str = "train"
    name: str | None = None
    streaming: bool = False


def documents(sources: Iterable[str], query: DataQuery | None = None) -> Iterator[Document]:
    """All documents in several places, one after the other.

    Args:
        sources: Text files, JSONL files (each line an object with "text" or "messages"), folders of such files, or
            names and folders of the `datasets` library.
        query: What to take of a dataset.

    Raises:
        DataError: A place does not exist or holds nothing of use; a record is bad. Files and lines are named.
    """
    for source in sources:
        path = Path(source).expanduser()
        if path.is_dir() and (files := find_files(path)):
            for file in files:
                yield from _file_documents(file)
        elif path.is_file():
            yield from _file_documents(path)
        else:
            yield from _dataset_documents(source, path, query or DataQuery())


def check_places(sources: Iterable[str]) -> None:
    """Checks that all places could hold data, without reading it.

    Raises:
        DataError: A path does not exist, or a folder holds no file of use.
    """
    for source in sources:
        path = Path(source).expanduser()
        if path.is_dir():
            if not find_files(path) and not _is_dataset(path):
                kinds = ", ".join((*TEXT_FILES, *RECORD_FILES))
                raise DataError(f"{source} holds no file to train on. Give a folder of {kinds} files or a dataset.")
        elif not path.exists() and not _could_be_a_name(source):
            raise DataError(f"{source} does not exist. Give a file, a folder, or the name of a dataset.")


def find_files(folder: Path) -> list[Path]:
    """Files of text and of records in a folder and the folders in it, in the order of their names."""
    return sorted(path for path in folder.rglob("*") if path.suffix in TEXT_FILES + RECORD_FILES and path.is_file())


def _file_documents(file: Path) -> Iterator[Document]:
    if file.suffix in RECORD_FILES:
        yield from (to_document(record, where) for where, record in json_lines(file, DataError))
        return
    text = _decoded(file)
    if "\0" in text:
        raise DataError(f"{file} is binary. Give plain text in UTF-8.")
    yield Document(str(file), text)


def _decoded(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 (byte {error.start:,}). Convert it with iconv.") from None
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}). Check its permissions.") from None


def to_document(record: Any, where: str) -> Document:
    """A document from a record.

    Args:
        record: An object with "text", a string, or "messages", a list of objects with "role" and "content".
        where: Its place, for messages.

    Raises:
        DataError: It is no such object.
    """
    if not isinstance(record, Mapping) or not ({"text", "messages"} & record.keys()):
        raise DataError(f'{where}: the record has neither "text" nor "messages". Correct it or leave it out.')
    if isinstance(record.get("text"), str):
        return Document(where, record["text"])
    messages = record.get("messages")
    if not isinstance(messages, list):
        what = "messages" if "messages" in record else "text"
        kind = "list" if what == "messages" else "string"
        raise DataError(f'{where}: "{what}" is no {kind}, but {type(record.get(what)).__name__}. Correct it.')
    for number, message in enumerate(messages, start=1):
        good = isinstance(message, Mapping) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        if not good:
            raise DataError(f'{where}: message {number} has no "role" and "content" that are strings. Correct it.')
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"{where}: no message is the assistant's, so there is nothing to learn. Leave it out.")
    return Document(where, None, tuple(messages))


def _dataset_documents(source: str, path: Path, query: DataQuery) -> Iterator[Document]:
    for number, record in enumerate(_dataset(source, path, query)):
        yield to_document(record, f"{source}, record {number}")


def _dataset(source: str, path: Path, query: DataQuery) -> Iterable[Any]:
    try:
        import datasets
    except ImportError:
        raise DataError(f"{source} needs the library datasets: pip install 'ahn[train]'.") from None
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(str(path))
            records: Iterable[Any] = loaded[query.split] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            name = str(path) if path.is_dir() else source
            records = datasets.load_dataset(name, query.name, split=query.split, streaming=query.streaming)
    except Exception as error:  # the hub's client and every file format have errors of their own
        reason = f"{type(error).__name__}: {one_line(error)[:200]}"
        if not path.exists() and isinstance(error, (ConnectionError, FileNotFoundError)):
            raise DataError(
                f"{source} is neither a file or folder here nor a dataset that can be reached ({reason}). "
                "Check the name and the connection."
            ) from None
        raise DataError(f"{source} cannot be loaded as a dataset ({reason}).") from None
    return records


def _is_dataset(path: Path) -> bool:
    marks = ("state.json", "dataset_dict.json")
    return any((path / mark).is_file() for mark in marks) or any(
        each.suffix in _TABLES or each.name.endswith(".json.gz") for each in path.rglob("*")
    )


def _could_be_a_name(source: str) -> bool:
    """Whether this could name a dataset on the hub: `name` or `owner/name`."""
    parts = source.split("/")
    return (
        len(parts) <= 2
        and all(parts)
        and not source.startswith((".", "~", "/"))
        and Path(parts[-1]).suffix not in TEXT_FILES + RECORD_FILES + _TABLES
    )
