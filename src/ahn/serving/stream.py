"""What an answer is made of, and the way from the thread that writes it to the request that waits for it."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator
from typing import Literal, NamedTuple

FinishReason = Literal["stop", "length"]


class TokenChoice(NamedTuple):
    """A token and how likely it was.

    Attributes:
        token: Its id.
        logprob: Its log-probability in nats; `None` for the first token of a text.
        top: The likeliest tokens with theirs, the likeliest first.
    """

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


class Increment(NamedTuple):
    """What one step adds to an answer.

    Attributes:
        choice: Number of the answer among those of its request.
        text: More text; may be empty.
        tokens: Its tokens, where log-probabilities were asked for.
        finish: Why the answer ends here, if it does.
    """

    choice: int
    text: str
    tokens: tuple[TokenChoice, ...] = ()
    finish: FinishReason | None = None


class AnswerStream:
    """Increments on their way: one thread puts them in, one task of asyncio takes them out.

    Args:
        room: Increments that may wait. A slow reader's answer is not written on until it has caught up.
    """

    def __init__(self, room: int = 64) -> None:
        self._room = room
        self._events: deque[Increment | Exception] = deque()
        self._is_closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ready = asyncio.Event()

    @property
    def is_full(self) -> bool:
        """Whether the reader has to catch up first."""
        return len(self._events) >= self._room

    def put(self, event: Increment | Exception) -> None:
        """Sends an increment, or the error that ends the answer."""
        self._events.append(event)
        if isinstance(event, Exception):
            self._is_closed = True
        self._wake()

    def close(self) -> None:
        """Says that nothing follows."""
        self._is_closed = True
        self._wake()

    async def events(self) -> AsyncIterator[Increment]:
        """All increments as they come.

        Raises:
            Exception: The error that ended the answer.
        """
        self._loop = asyncio.get_running_loop()
        while True:
            is_closed = self._is_closed
            while self._events:
                event = self._events.popleft()
                if isinstance(event, Exception):
                    raise event
                yield event
            if is_closed:
                return
            await self._ready.wait()
            self._ready.clear()

    def _wake(self) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # its loop has ended, and with it the request
                self._loop.call_soon_threadsafe(self._ready.set)
