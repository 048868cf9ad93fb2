"""Interleaved timing, so that what else the machine does hits all that is compared, and what the hardware can do."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

_COPIED = 2**28  # bytes, far more than any cache holds
_SIDE = 2048
_TRIES = 7


class Spread(NamedTuple):
    """Times of one thing over all rounds, in seconds.

    Attributes:
        median: Median.
        low: Lower quartile.
        high: Upper quartile.
    """

    median: float
    low: float
    high: float


def interleave(
    cases: Mapping[str, Callable[[], float]], rounds: int, on_round: Callable[[], None] | None = None
) -> dict[str, list[float]]:
    """Seconds of each case in each round, in which the cases take turns.

    Args:
        cases: By name, what prepares itself, does the work and says how many seconds the work took.
        rounds: Turns of each case. One more round goes before, which is not counted.
        on_round: Called after every round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        for name, case in cases.items():
            taken = case()
            if number:
                seconds[name].append(taken)
        if on_round is not None:
            on_round()
    return seconds


def timed(work: Callable[[], object]) -> float:
    """Seconds that something takes, work that it left to a GPU included."""
    _wait()
    start = time.perf_counter()
    work()
    _wait()
    return time.perf_counter() - start


def spread(seconds: list[float]) -> Spread:
    """Median and quartiles."""
    if len(seconds) == 1:
        return Spread(*seconds * 3)
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return Spread(median, low, high)


def ratio(slower: list[float], faster: list[float]) -> Spread:
    """How many times as long one thing takes as another: median and quartiles of the ratio of each round."""
    return spread([a / b for a, b in zip(slower, faster, strict=True)])


class Machine(NamedTuple):
    """The floor of every time: bytes over bandwidth, FLOPs over rate.

    Attributes:
        bandwidth: Bytes read and written per second when memory is copied.
        flops: FLOPs per second in a product of two square matrices of 2,048.
    """

    bandwidth: float
    flops: float


def measure_machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """Measures both, the best of several tries.

    Args:
        device: Where.
        dtype: Of the matrices.
    """
    source = torch.ones(_COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    matrix = torch.randn(_SIDE, _SIDE, device=device).to(dtype)
    copying = min(timed(lambda: target.copy_(source)) for _ in range(_TRIES))
    multiplying = min(timed(lambda: matrix @ matrix) for _ in range(_TRIES))
    return Machine(2 * _COPIED / copying, 2 * _SIDE**3 / multiplying)


def _wait() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
