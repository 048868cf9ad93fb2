"""What was read before, by its tokens: a text that begins as another did is read from where they part.

A state cannot be rolled back, so caches are kept where a conversation can come back to. Those used last stay in memory.
With a folder all of them are files too, written by a thread of its own: a server that is killed finds them again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from ahn.cache import HippocampalCache
from ahn.errors import CacheError, OutputError
from ahn.serving.keys import PrefixKey, prefix_keys

_log = logging.getLogger("ahn.serving")
_WAITING_FILES = 8


class Found(NamedTuple):
    """The longest beginning of a text that was read before.

    Attributes:
        length: Its tokens.
        cache: A cache that has read them, for the caller alone.
    """

    length: int
    cache: HippocampalCache


@dataclass
class StoreSize:
    """What a store holds.

    Attributes:
        in_memory: Caches in memory.
        memory_bytes: Their bytes.
        on_disk: Caches in files.
        disk_bytes: Their bytes.
    """

    in_memory: int = 0
    memory_bytes: int = 0
    on_disk: int = 0
    disk_bytes: int = 0


class PrefixStore:
    """Caches by what they have read, the least recently used of which go first.

    One thread may find and keep; any may ask for the size.

    Args:
        model: The model, with a memory attached.
        most_bytes: Bytes of all caches in memory.
        folder: Where to write them, or `None`.
        disk_bytes: Bytes of all files, those of documents apart.

    Raises:
        OutputError: Another server uses the folder, whose files it would not count.
    """

    def __init__(self, model: Any, most_bytes: int, folder: Path | None = None, disk_bytes: int = 0) -> None:
        self._model = model
        self._most = most_bytes
        self._folder = folder
        self._disk_most = disk_bytes
        self._memory: OrderedDict[PrefixKey, tuple[HippocampalCache, int]] = OrderedDict()
        self._files: OrderedDict[PrefixKey, int] = OrderedDict()
        self._unwritten: dict[PrefixKey, HippocampalCache] = {}
        self._lock = threading.RLock()
        self._writing: queue.Queue[tuple[PrefixKey, HippocampalCache] | None] = queue.Queue(_WAITING_FILES)
        self._writer: threading.Thread | None = None
        self._claim: list[FileLock] = []
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self._claim.append(_claimed(folder))
            self._find_files(folder)
            self._writer = threading.Thread(target=self._write, name="ahn-store", daemon=True)
            self._writer.start()

    @property
    def size(self) -> StoreSize:
        """What it holds now."""
        with self._lock:
            memory_bytes = sum(size for _, size in self._memory.values())
            return StoreSize(len(self._memory), memory_bytes, len(self._files), sum(self._files.values()))

    def find(self, root: str, tokens: Sequence[int]) -> Found | None:
        """The longest stored beginning of a text, one token short of the whole at most.

        Args:
            root: The document that it follows; empty without one.
            tokens: Its tokens, those of the document left out.
        """
        with self._lock:
            known = {key for key in self._known() if key.root == root}
        lengths = sorted({key.length for key in known if key.length < len(tokens)})
        for key in reversed(list(prefix_keys(root, tokens, lengths))):
            if key in known and (cache := self._get(key)) is not None:
                return Found(key.length, cache)
        return None

    def keep(self, root: str, tokens: Sequence[int], cache: HippocampalCache) -> None:
        """Keeps a cache that has read these tokens after its document. The caller must not change it any more."""
        (key,) = prefix_keys(root, tokens, [len(tokens)])
        with self._lock:
            if key in self._known():
                return
            if self._folder is not None:
                self._unwritten[key] = cache
        self._hold(key, cache)
        if self._folder is not None:
            self._writing.put((key, cache))

    def has(self, root: str, tokens: Sequence[int]) -> bool:
        """Whether it holds the cache of exactly these tokens."""
        (key,) = prefix_keys(root, tokens, [len(tokens)])
        with self._lock:
            return key in self._known()

    def roots(self) -> set[str]:
        """Documents of which it holds anything."""
        with self._lock:
            return {key.root for key in self._known() if key.root}

    def forget(self, root: str) -> None:
        """Drops a document's caches and those of every conversation about it."""
        with self._lock:
            for entries in (self._memory, self._unwritten):
                for key in [key for key in entries if key.root == root]:
                    del entries[key]
            for key in [key for key in self._files if key.root == root]:
                self._remove_file(key)

    def flush(self) -> None:
        """Waits until all files are written."""
        if self._writer is not None:
            self._writing.join()

    def close(self) -> None:
        """Writes what is left and stops."""
        if self._writer is not None:
            self._writing.put(None)
            self._writer.join()
            self._writer = None
        while self._claim:
            self._claim.pop().release()

    def _known(self) -> set[PrefixKey]:
        return {*self._memory, *self._files, *self._unwritten}

    def _get(self, key: PrefixKey) -> HippocampalCache | None:
        with self._lock:
            if key in self._memory:
                self._memory.move_to_end(key)
                return self._memory[key][0].fork()
            if key in self._unwritten:
                return self._unwritten[key].fork()
        path = self._path(key)
        try:
            cache = HippocampalCache.load(path, self._model)
        except CacheError:  # damaged, or gone: what it held is read anew
            self._remove_file(key)
            return None
        with self._lock, contextlib.suppress(OSError):
            self._files.move_to_end(key)
            os.utime(path)
        self._hold(key, cache)
        return cache.fork()

    def _hold(self, key: PrefixKey, cache: HippocampalCache) -> None:
        """Holds a cache in memory and lets go of those that were not used for the longest time."""
        with self._lock:
            self._memory[key] = cache, cache.nbytes
            self._memory.move_to_end(key)
            total = sum(size for _, size in self._memory.values())
            for other in list(self._memory):
                # A document without a file would be lost.
                if total > self._most and (other.length or other in self._files) and other != key:
                    total -= self._memory.pop(other)[1]
            if total > self._most and (key.length or key in self._files):
                del self._memory[key]

    def _path(self, key: PrefixKey) -> Path:
        return (self._folder or Path()) / key.file_name

    def _find_files(self, folder: Path) -> None:
        files = [(file.stat(), key) for file in folder.glob("*.cache") if (key := PrefixKey.of_file(file.name))]
        self._files.update((key, stat.st_size) for stat, key in sorted(files, key=lambda each: each[0].st_mtime))

    def _write(self) -> None:
        while (item := self._writing.get()) is not None:
            key, cache = item
            try:
                if key in self._unwritten:
                    self._write_file(key, cache)
            except (CacheError, OutputError, OSError) as error:
                # It stays in memory: a full disk is no reason to stop answering.
                _log.warning("a session is not kept over a restart: %s", error)
            finally:
                with self._lock:
                    self._unwritten.pop(key, None)
                self._writing.task_done()
        self._writing.task_done()

    def _write_file(self, key: PrefixKey, cache: HippocampalCache) -> None:
        cache.save(self._path(key))
        with self._lock:
            self._files[key] = self._path(key).stat().st_size
            if key in self._unwritten:
                self._drop_old_files()
            else:  # forgotten meanwhile
                self._remove_file(key)

    def _drop_old_files(self) -> None:
        total = sum(size for key, size in self._files.items() if key.length)
        for key in [key for key in self._files if key.length]:
            if total <= self._disk_most:
                return
            total -= self._files[key]
            self._remove_file(key)

    def _remove_file(self, key: PrefixKey) -> None:
        with self._lock, contextlib.suppress(OSError):
            self._files.pop(key, None)
            self._path(key).unlink()


def _claimed(folder: Path) -> FileLock:
    """A lock on a folder, which the operating system frees when the process dies, however it dies."""
    lock = FileLock(f"{folder}.lock", thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise OutputError(f"another server uses {folder}; end it, or name another --session-dir") from None
    return lock
