"""How many threads a kernel works with, where something else takes cores away for a while."""

from __future__ import annotations

import time
from collections.abc import Callable

from ahn.native.team import FIRST_PAUSE, LONGEST_PAUSE, Team, times_interrupted


class Machine:
    """A clock, and a count of the times that a core was taken away."""

    def __init__(self) -> None:
        self.now, self.times = 0.0, 0


def counts(disturbed: Callable[[int, int], int], calls: int, most: int, seconds: float = 0.01) -> list[int]:
    """Threads of every call, where call number n with c threads loses a core `disturbed(n, c)` times."""
    machine, seen = Machine(), []
    team = Team(lambda: machine.times, lambda: machine.now)

    def work(threads: int) -> None:
        machine.now += seconds
        machine.times += disturbed(len(seen), threads)
        seen.append(threads)

    for _ in range(calls):
        team.run(most, work)
    return seen


def test_a_quiet_machine_has_all_threads_always() -> None:
    assert set(counts(lambda call, threads: call % 2, 1000, 2)) == {2}


def test_what_runs_long_may_lose_a_core_more_often() -> None:
    assert set(counts(lambda call, threads: 10, 100, 2, seconds=0.5)) == {2}
    assert counts(lambda call, threads: 40, 100, 2, seconds=0.5)[1] == 1


def test_a_core_that_is_taken_costs_a_thread_and_its_return_brings_it_back() -> None:
    busy = range(100, 2100)
    seen = counts(lambda call, threads: 5 if call in busy and threads == 2 else 0, 4000, 2)
    assert set(seen[:101]) == {2}
    assert seen[101:2100].count(2) < 0.02 * 2000
    assert set(seen[2100 + LONGEST_PAUSE :]) == {2}


def test_several_cores_that_are_taken() -> None:
    seen = counts(lambda call, threads: max(0, threads - 5) * 5, 2000, 8)
    assert seen[1000:].count(5) > 0.9 * 1000
    assert max(seen[1000:]) == 6


def test_the_first_trial_comes_soon() -> None:
    seen = counts(lambda call, threads: 5 if call == 0 else 0, 50, 2)
    assert seen == [2] + [1] * FIRST_PAUSE + [2] * (49 - FIRST_PAUSE)


def test_one_thread_is_not_watched() -> None:
    machine = Machine()
    team = Team(lambda: machine.times, lambda: machine.now)
    assert team.run(1, lambda threads: 7 * threads) == 7
    assert team.count == 1
    assert team.run(4, lambda threads: threads) == 4


def test_the_system_counts() -> None:
    before = times_interrupted()
    end = time.process_time() + 0.05
    while time.process_time() < end:
        pass
    assert times_interrupted() >= before >= 0
