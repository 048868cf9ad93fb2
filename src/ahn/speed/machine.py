"""What the hardware can do: how fast it copies memory and multiplies matrices."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ahn.speed.turns import timed

_COPIED = 2**28  # bytes, far more than any cache holds
_SIDE = 2048
_TRIES = 7


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
