"""One slot of the rings of several layers at once, by the kernels.

Legend of shapes: L layers, B batch, G key/value heads, N places of a ring, K numbers of a place.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ahn import native
from ahn.native.checks import check_shapes

_POINTER = ctypes.c_void_p


class Rings:
    """Rings of several layers that lie in memory alike.

    Args:
        rings: `[B, G, N, K]` each, which are kept.
    """

    def __init__(self, rings: Sequence[Tensor]) -> None:
        self._kernels: Any = native._kernels()
        self._rings = list(rings)
        self._shape = rings[0].shape
        self._addresses = (_POINTER * len(rings))(*(ring.data_ptr() for ring in rings))

    @staticmethod
    def can_hold(rings: Sequence[Tensor]) -> bool:
        """Whether the kernels can work on rings: on a CPU, dense, of one shape and one dtype."""
        shape, dtype = rings[0].shape, rings[0].dtype
        alike = all(ring.shape == shape and ring.dtype is dtype and ring.is_contiguous() for ring in rings)
        plain = all(ring.is_cpu and type(ring) is Tensor and not ring.requires_grad for ring in rings)
        return alike and plain and native.ready()

    def are(self, rings: Sequence[Tensor]) -> bool:
        """Whether these are the rings."""
        return all(mine is other for mine, other in zip(self._rings, rings, strict=True))

    def take(self, slot: int) -> Tensor:
        """A copy of what a slot holds, `[L, B, G, K]`."""
        B, G, N, K = self._shape
        out = self._rings[0].new_empty(len(self._rings), B, G, K)
        arguments = len(self._rings), B * G, N, slot, K * out.element_size()
        self._kernels.ahn_take_slots(*arguments, ctypes.addressof(self._addresses), out.data_ptr())
        return out

    def put(self, slot: int, values: Tensor) -> None:
        """Writes a slot.

        Args:
            slot: The slot.
            values: What it shall hold, `[L, B, G, K]` in their dtype.
        """
        B, G, N, K = self._shape
        check_shapes((values, (len(self._rings), B, G, K)))
        values = values.to(self._rings[0].dtype).contiguous()
        arguments = len(self._rings), B * G, N, slot, K * values.element_size()
        self._kernels.ahn_put_slots(*arguments, values.data_ptr(), ctypes.addressof(self._addresses))
