"""How much memory a process holds."""

from __future__ import annotations

import os
import sys

import torch


def resident_bytes(device: torch.device) -> int:
    """Bytes that this process holds now: resident memory on a CPU, allocated tensors on a CUDA device.

    Where the system does not tell what is resident now (no /proc), it is the most that was resident so far; 0 where it
    tells nothing.

    Args:
        device: Where the model is.
    """
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        with open("/proc/self/statm", encoding="ascii") as pages:
            return int(pages.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return _peak_bytes()


def _peak_bytes() -> int:
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
