"""How many threads a kernel works with, against a clock that says what each number of them would take."""

from __future__ import annotations

from collections.abc import Callable

from ahn.native.team import WINDOW, Team


class Clock:
    """Time that stands still but for what the kernel takes."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now


def counts(takes: Callable[[int, int], int], windows: int, most: int) -> list[int]:
    """Threads of every call, where call number n with c threads takes `takes(n, c)` nanoseconds."""
    clock, seen = Clock(), []
    team = Team(clock)

    def work(threads: int) -> int:
        clock.now += takes(len(seen), threads)
        seen.append(threads)
        return 0

    for _ in range(windows * WINDOW):
        team.run(most, work)
    return seen


def test_a_quiet_machine_has_all_threads_nearly_always() -> None:
    seen = counts(lambda call, threads: 1000 // threads, 1000, 2)
    assert seen.count(1) < 0.01 * len(seen)


def test_a_core_that_is_taken_costs_a_thread_and_its_return_brings_it_back() -> None:
    busy = range(300 * WINDOW, 600 * WINDOW)
    seen = counts(lambda call, threads: (900 if threads == 2 else 700) if call in busy else 1000 // threads, 1000, 2)
    assert seen[320 * WINDOW : 600 * WINDOW].count(1) > 0.9 * 280 * WINDOW
    assert seen[640 * WINDOW :].count(2) > 0.9 * 360 * WINDOW


def test_several_cores_that_are_taken() -> None:
    seen = counts(lambda call, threads: 100 * abs(threads - 5) + 1000, 400, 8)
    assert seen[-100 * WINDOW :].count(5) > 0.8 * 100 * WINDOW


def test_one_thread_is_not_timed() -> None:
    clock = Clock()
    team = Team(clock)
    assert team.run(1, lambda threads: 7 * threads) == 7
    assert team.count == 1
    assert team.run(4, lambda threads: threads) == 4
