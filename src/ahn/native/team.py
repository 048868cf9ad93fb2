"""With how many threads a kernel of many steps works.

Its threads wait for each other several times in every layer. Where something else takes a core, one of them is late
every time, and fewer threads are faster by far. The system counts how often it has taken a core away from this process;
on a quiet machine that is nearly never.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

try:
    import resource
except ImportError:  # Windows, where there are no kernels
    resource = None  # type: ignore[assignment]

Result = TypeVar("Result")

USUAL_TIMES, USUAL_RATE = 4, 30.0
"""Times in a call, and more of them a second, that a core may be taken away. On two cores a call of 18 ms lost one 0 to
2 times; with one core taken, calls of 160 to 700 ms did 18 to 120 times."""
FIRST_PAUSE, LONGEST_PAUSE = 16, 256
"""Calls with fewer threads before one more is tried again; the pause doubles each time that this fails."""


def times_interrupted() -> int:
    """How often the system took a core away from this process while it had work to do."""
    return 0 if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


class Team:
    """The number of threads.

    Args:
        interrupted: How often a core was taken away so far.
        clock: Seconds.

    Attributes:
        count: Threads of the next call.
    """

    def __init__(
        self, interrupted: Callable[[], int] = times_interrupted, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._interrupted, self._clock = interrupted, clock
        self._begin(1)

    def run(self, most: int, work: Callable[[int], Result]) -> Result:
        """Calls a kernel with a number of threads, and notes whether all of them could work.

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
        times, start = self._interrupted(), self._clock()
        result = work(self.count)
        times, seconds = self._interrupted() - times, self._clock() - start
        self._judge(times > USUAL_TIMES + USUAL_RATE * seconds)
        return result

    def _begin(self, most: int) -> None:
        self._most = self.count = most
        self._pause = self._left = FIRST_PAUSE

    def _judge(self, is_disturbed: bool) -> None:
        """Takes one thread fewer where one was late; tries one more after a pause without."""
        if is_disturbed and self.count > 1:
            self.count -= 1
            self._left, self._pause = self._pause, min(2 * self._pause, LONGEST_PAUSE)
            return
        self._left -= 1
        if self._left == 0 and self.count < self._most:
            self.count += 1
            self._left = FIRST_PAUSE
        elif self._left == 0:
            self._pause = self._left = FIRST_PAUSE
