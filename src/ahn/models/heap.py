"""Memory that was freed, and that the allocator of the C library keeps for later."""

from __future__ import annotations

import ctypes
from typing import Any


def trim_heap() -> None:
    """Gives freed memory back to the system, where the C library can (glibc).

    Loading frees much that is small, such as the strings of a tokenizer. What is loaded next is large, and has no use
    for gaps between small things.
    """
    trim: Any = None
    try:
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    except (OSError, TypeError):  # no C library that is open by no name, as on Windows
        return
    if trim is not None:
        trim(ctypes.c_size_t(0))
