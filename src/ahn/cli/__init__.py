"""The command line, `ahn`. Nothing heavy is imported before a command has checked its arguments."""

from __future__ import annotations

import os
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: Words after `ahn`; those of the process if left out.

    Returns:
        The exit status: 0 done, 1 something failed on the way, 2 wrong arguments or files, 130 interrupted.
    """
    from ahn.cli.terminal import reporting

    # Threads that spin for long while they wait take the cores from each other as soon as another program runs, and
    # those that do not spin at all are slow on a quiet machine. It must be said before torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

    with reporting() as outcome:
        from ahn.cli.app import command

        outcome.status = command().main(arguments, prog_name="ahn", standalone_mode=False) or 0
    return outcome.status
