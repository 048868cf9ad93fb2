"""A revision of this repository in a folder of its own, beside the checkout at hand."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]


def git(*arguments: str) -> str:
    """What a git command says, run in this repository."""
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


@contextmanager
def checked_out(revision: str) -> Iterator[Path]:
    """Yields the folder of a revision, a git worktree that is removed at the end."""
    with tempfile.TemporaryDirectory(prefix="ahn-revision-") as folder:
        place = Path(folder) / "checkout"
        git("worktree", "add", "--quiet", "--detach", str(place), revision)
        try:
            yield place
        finally:
            git("worktree", "remove", "--force", str(place))
