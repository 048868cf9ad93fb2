"""With how many threads a kernel of many steps works.

Its threads wait for each other several times in every layer. Where something else takes a core, one of them is late
every time, and fewer threads are faster. Nothing says so but the time itself: now and then a few calls run with one
thread more or fewer, and the faster number stays.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")

WINDOW = 32
"""Calls whose time is taken together; about one token of a small model."""
_SELDOM, _OFTEN, _SOON = 256, 16, 2  # windows between trials: with all threads, with fewer, after one that was faster
_SLOW = 1.5  # times as slow as the fastest window: then something else must be running
_GAIN = 0.95


class Team:
    """The number of threads.

    Args:
        clock: Nanoseconds.

    Attributes:
        count: Threads of the next call.
    """

    def __init__(self, clock: Callable[[], int] = time.perf_counter_ns) -> None:
        self._clock = clock
        self._taken = self._calls = 0
        self._begin(1)

    def run(self, most: int, work: Callable[[int], Result]) -> Result:
        """Calls a kernel with a number of threads, and learns from the time that it takes.

        Args:
            most: Threads that there may be.
            work: The kernel.

        Returns:
            What it returns.
        """
        if most != self._most:
            self._begin(most)
        if most == 1:
            return work(1)
        start = self._clock()
        result = work(self.count)
        self._taken += self._clock() - start
        self._calls += 1
        if self._calls == WINDOW:
            self._judge(self._taken)
            self._taken = self._calls = 0
        return result

    def _begin(self, most: int) -> None:
        self._most = self.count = most
        self._settled: int | None = None  # the number to go back to, during a trial
        self._usual, self._fastest = 0, 0
        self._taken = self._calls = 0
        self._wait, self._step = _SOON, -1

    def _judge(self, taken: int) -> None:
        """Ends a window."""
        if self._settled is not None:
            self._wait = _SELDOM if self._settled == self._most else _OFTEN
            if taken > _GAIN * self._usual:
                self.count, self._step = self._settled, -self._step
            else:
                self._wait = _SOON
            self._settled = None
            return
        self._usual = taken
        self._fastest = min(self._fastest or taken, taken) + self._fastest // 1000  # what was fast once is forgotten
        self._wait -= 1
        is_slow = self.count == self._most and taken > _SLOW * self._fastest and self._wait < _SELDOM - _OFTEN
        if self._wait <= 0 or is_slow:
            self._settled = self.count
            if not 1 <= self.count + self._step <= self._most:
                self._step = -self._step
            self.count += self._step
