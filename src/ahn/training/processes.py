"""The end of processes that trained together."""

from __future__ import annotations

import gc

from torch import distributed


def part() -> None:
    """Leaves the process group, if there is one. Every process does this last.

    Without it threads of the group may outlive the interpreter, and abort a process that has finished its work
    (github.com/pytorch/pytorch/pull/179291). References to the group are dropped first.
    """
    gc.collect()
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
