"""Documents that are read once, and from which any number of conversations begin.

Each has a file of facts and one of its text beside the stored caches; its own cache is one of these. A document whose
reading was broken off is read again after a restart.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ahn._home import write_text
from ahn.errors import OutputError, one_line
from ahn.generation import full_cache_bytes
from ahn.models import prompts
from ahn.models.text import text_offsets, text_tokens
from ahn.serving.engine import Engine
from ahn.serving.errors import RequestError
from ahn.serving.reading import PromptReading

_log = logging.getLogger("ahn.serving")

Status = Literal["uploaded", "processed", "error"]


@dataclasses.dataclass
class StoredDocument:
    """A document and how far it has been read.

    Attributes:
        id: Its id, which follows from its text.
        name: Name of its file.
        size: Bytes of its file.
        created: When it came, in seconds of the epoch.
        tokens: Tokens that are read, what comes before the text included.
        read_tokens: Those that have been read.
        seconds: Time since its reading began.
        cache_bytes: Bytes of its cache.
        status: Whether it has been read.
        problem: Why it could not be.
        passages: First and last + 1 character of each passage of which anchors keep something, in their order.
    """

    id: str
    name: str
    size: int
    created: int
    tokens: int
    read_tokens: int = 0
    seconds: float = 0.0
    cache_bytes: int = 0
    status: Status = "uploaded"
    problem: str = ""
    passages: list[tuple[int, int]] = dataclasses.field(default_factory=list)


class DocumentJob:
    """A document that is being read.

    Args:
        shelf: Where it stands.
        document: The document.
        offsets: First and last + 1 character of each token of its text, `[T, 2]`. They are found before it is read,
            because the engine's thread writes answers too.
        reading: The reading of its tokens.
    """

    def __init__(
        self, shelf: DocumentShelf, document: StoredDocument, offsets: np.ndarray, reading: PromptReading
    ) -> None:
        self.reading = reading
        self._shelf = shelf
        self._document = document
        self._offsets = offsets

    @property
    def is_cancelled(self) -> bool:
        """Whether it was deleted meanwhile."""
        return not self._shelf.has(self._document.id)

    def fail(self, error: Exception) -> None:
        """Notes that it cannot be read."""
        self._document.status, self._document.problem = "error", one_line(error)
        self._shelf.save(self._document)

    def noted(self, tokens: int) -> None:
        """Notes how far it is, and keeps its cache at the end."""
        document, cache = self._document, self.reading.cache
        document.read_tokens = self.reading.done
        document.seconds = time.monotonic() - self.reading.begun
        document.cache_bytes = cache.nbytes
        if self.reading.is_done:
            document.passages = self._shelf.passages(
                self._offsets, [token for row in cache.anchor_tokens for token in row]
            )
            self._shelf.engine.store.keep(document.id, [], cache)
            document.status = "processed"
            self._shelf.save(document)


class DocumentShelf:
    """All documents of a server.

    Args:
        engine: What reads them.
        folder: Where their texts are kept over a restart, or `None`.
        most_tokens: Tokens of a document.

    Attributes:
        engine: The same.
    """

    def __init__(self, engine: Engine, folder: Path | None, most_tokens: int) -> None:
        self.engine = engine
        self._folder = folder
        self._most = most_tokens
        self._documents: dict[str, StoredDocument] = {}
        self._texts: dict[str, str] = {}
        self._lock = threading.RLock()

    def has(self, id: str) -> bool:
        """Whether there is a document of this id."""
        return id in self._documents

    def documents(self) -> list[StoredDocument]:
        """All documents, the newest first."""
        with self._lock:
            return sorted(self._documents.values(), key=lambda each: each.created, reverse=True)

    def get(self, id: str) -> StoredDocument:
        """A document by its id.

        Raises:
            RequestError: There is none.
        """
        if (document := self._documents.get(id)) is None:
            raise RequestError(f"there is no document {id!r}; upload it at /v1/files", 404, "document")
        return document

    def ready(self, id: str) -> StoredDocument:
        """A document that has been read.

        Raises:
            RequestError: There is none, or it has not been read.
        """
        document = self.get(id)
        if self._is_lost(document):
            self._read_again(document)
        if document.status == "error":
            raise RequestError(f"the document {id} could not be read: {document.problem}", 409, "document")
        if document.status != "processed":
            done = f"{document.read_tokens:,} of {document.tokens:,} tokens"
            raise RequestError(f"the document {id} is still being read ({done}); ask again later", 409, "document")
        return document

    def text(self, id: str) -> str:
        """A document's text.

        Raises:
            RequestError: There is no such document.
        """
        self.get(id)
        return self._texts[id] if self._folder is None else self._text_file(id).read_text(encoding="utf-8")

    def add(self, name: str, size: int, text: str) -> StoredDocument:
        """Takes in a document and begins to read it; one that was read before is only named.

        Raises:
            RequestError: It is too long, or too many are waiting.
            OutputError: It cannot be kept.
        """
        tokens = self._tokens(text)
        if len(tokens) > self._most:
            raise RequestError(
                f"{name} has {len(tokens):,} tokens, but this server takes {self._most:,}", 413, "file", "too_large"
            )
        id = f"file-{hashlib.sha256(text.encode()).hexdigest()[:24]}"
        with self._lock:
            known = self._documents.get(id)
            if known is not None and known.status != "error" and not self._is_lost(known):
                return known
            document = StoredDocument(id, name, size, int(time.time()), len(tokens))
            if self._folder is None:
                self._texts[id] = text
            else:
                write_text(self._text_file(id), text)
                write_text(self._facts_file(id), json.dumps(dataclasses.asdict(document)))
            self._documents[id] = document
        try:
            self._read(document, text, tokens)
        except RequestError:
            self.delete(id)
            raise
        return document

    def delete(self, id: str) -> None:
        """Forgets a document and all conversations about it.

        Raises:
            RequestError: There is none.
        """
        self.get(id)
        with self._lock:
            self._documents.pop(id, None)
            self._texts.pop(id, None)
            self.engine.store.forget(id)
            if self._folder is not None:
                for file in (self._text_file(id), self._facts_file(id)):
                    file.unlink(missing_ok=True)

    def resume(self) -> None:
        """Finds the documents of before, and reads on those that were not read to the end."""
        for file in sorted(self._folder.glob("file-*.json")) if self._folder is not None else ():
            try:
                facts = json.loads(file.read_text(encoding="utf-8"))
                document = StoredDocument(**facts)
            except (OSError, ValueError, TypeError):
                continue  # it was deleted meanwhile
            self._documents[document.id] = document
            if document.status == "uploaded" or self._is_lost(document):
                self._read_again(document)
        for id in self.engine.store.roots() - self._documents.keys():
            self.engine.store.forget(id)  # deleted while it was being read

    def save(self, document: StoredDocument) -> None:
        """Writes the facts of a document, if they are kept and it was not deleted."""
        with self._lock:
            if self._folder is not None and document.id in self._documents:
                try:
                    write_text(self._facts_file(document.id), json.dumps(dataclasses.asdict(document)))
                except OutputError as error:
                    _log.warning("a document is not kept over a restart: %s", error)

    def full_bytes(self, tokens: int) -> int:
        """Bytes that full attention would hold after so many tokens."""
        return full_cache_bytes(self.engine.model, tokens)

    def passages(self, offsets: np.ndarray, anchors: Iterable[int]) -> list[tuple[int, int]]:
        """First and last + 1 character of the passages that anchors keep, in their order, touching ones joined."""
        before = len(self._opening())
        inside = [token - before for token in anchors if 0 <= token - before < len(offsets)]
        spans = sorted((int(start), int(end)) for start, end in offsets[inside])
        joined: list[tuple[int, int]] = []
        for start, end in spans:
            if joined and start <= joined[-1][1] + 1:
                joined[-1] = joined[-1][0], max(end, joined[-1][1])
            elif end > start:
                joined.append((start, end))
        return joined

    def _is_lost(self, document: StoredDocument) -> bool:
        """Whether it was read, but its cache is gone: damaged on the disk, or never written there."""
        return document.status == "processed" and not self.engine.store.has(document.id, [])

    def _read_again(self, document: StoredDocument) -> None:
        document.status, document.read_tokens = "uploaded", 0
        try:
            text = self.text(document.id)
            self._read(document, text, self._tokens(text))
        except (OSError, ValueError):
            document.status, document.problem = "error", "its text is gone; upload it again"
        except RequestError as error:
            document.status, document.problem = "error", str(error)

    def _read(self, document: StoredDocument, text: str, tokens: list[int]) -> None:
        reading = PromptReading(self.engine.model, self.engine.store, tokens)
        offsets = np.asarray(text_offsets(text, self.engine.tokenizer), dtype=np.int32).reshape(-1, 2)
        self.engine.read(DocumentJob(self, document, offsets, reading))

    def _tokens(self, text: str) -> list[int]:
        return [*self._opening(), *text_tokens(text, self.engine.tokenizer)]

    def _opening(self) -> list[int]:
        """What comes before a document: the beginning of a question, where the model knows questions."""
        tokenizer: Any = self.engine.tokenizer
        opening: list[int] = prompts.passage(tokenizer, "", "", prompts.has_chat(tokenizer)).opening.tolist()
        return opening

    def _text_file(self, id: str) -> Path:
        return (self._folder or Path()) / f"{id}.txt"

    def _facts_file(self, id: str) -> Path:
        return (self._folder or Path()) / f"{id}.json"
