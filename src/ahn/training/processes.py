"""The end of processes that trained together."""

from __future__ import annotations

import gc

from torch import distributed


def part() -> None:
    """Leaves the group of processes, if there is one; the last thing that each of them does.

    Without it threads of the group may outlive the interpreter, and abort a process whose work is done
    (github.com/pytorch/pytorch/pull/179291). What still refers to the group is let go first.
    """
    gc.collect()
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
