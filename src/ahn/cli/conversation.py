"""A conversation in the terminal: what was read stays in one cache, and each turn reads only what is new."""

from __future__ import annotations

import contextlib
import itertools
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from ahn.cli.terminal import log, notes, reading_bar

if TYPE_CHECKING:
    import torch

    from ahn.cli.loading import Loaded
    from ahn.generation import Reader

EXIT = "/exit"
"""The line that ends a conversation."""


class Conversation:
    """Turns of a person and a model.

    Args:
        loaded: The model.
        reader: What it has read; nothing, or what a saved cache holds.
        answer: Gives the tokens of an answer to what was read, one by one.
        chunk: Tokens to read at a time; `None` for the usual number.
    """

    def __init__(
        self, loaded: Loaded, reader: Reader, answer: Callable[[], Iterator[int]], chunk: int | None = None
    ) -> None:
        self.loaded = loaded
        self.reader = reader
        self.answer = answer
        self.chunk = chunk

    def run(self, text: str, system: str, goes_on: bool) -> None:
        """Talks until the person says `/exit` or has no more to say.

        Args:
            text: A text that the first turn begins with, or nothing.
            system: What the model is told first, or nothing.
            goes_on: Whether the reader has read something before.
        """
        from ahn.models import prompts

        if sys.stdin is not None and sys.stdin.isatty():
            log(f"Ctrl-C stops an answer, {EXIT} ends.", "dim")
        for words in filter(None, itertools.takewhile(lambda words: words != EXIT, typed_lines())):
            if goes_on:
                passage = prompts.follow_up(self.loaded.tokenizer, text, words, chat=True)
            else:
                passage = prompts.passage(self.loaded.tokenizer, text, words, chat=True, system=system)
            self._turn(passage)
            text, goes_on = "", True

    def _turn(self, passage: Any) -> None:
        import torch

        read_all(self.reader, torch.cat((passage.opening, passage.text, passage.closing)), self.chunk)
        with _interrupts() as is_interrupted:
            write_answer(self.loaded, _until(is_interrupted, self.answer()))


def read_all(reader: Reader, ids: torch.Tensor, chunk: int | None) -> None:
    """Reads tokens, with a progress bar on a terminal.

    Args:
        reader: Reads them.
        ids: Token ids, `[T]`.
        chunk: Tokens at a time; `None` for the usual number.
    """
    with reading_bar(notes(), ids.numel()) as update:
        reader.prefill(ids, chunk, update)


def write_answer(loaded: Loaded, ids: Iterable[int]) -> None:
    """Writes an answer while it grows; on a terminal without control characters.

    Args:
        loaded: The model, for its tokenizer.
        ids: Tokens of the answer.
    """
    from ahn.cli.console import printable
    from ahn.generation import stream_text

    shown: Callable[[str], str] = printable if sys.stdout.isatty() else str
    for words in stream_text(loaded.tokenizer, ids):
        sys.stdout.write(shown(words))
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()


def typed_lines() -> Iterator[str]:
    """What the person says, line by line, until there is no more."""
    with contextlib.suppress(EOFError):
        while True:
            yield input("> " if sys.stdin.isatty() else "").strip()


def _until(is_over: Callable[[], bool], ids: Iterator[int]) -> Iterator[int]:
    """Tokens until something happens; the model has then read all that were shown."""
    for token in ids:
        yield token
        if is_over():
            next(ids, None)  # reads the last one
            return


@contextlib.contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Catches Ctrl-C inside the block; the function that it gives says whether it came. A second one is an error."""
    came = threading.Event()

    def note(*_: Any) -> None:
        if came.is_set():
            raise KeyboardInterrupt
        came.set()

    if threading.current_thread() is not threading.main_thread():  # no other thread may handle signals
        yield came.is_set
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield came.is_set
    finally:
        signal.signal(signal.SIGINT, before)
