"""Writing a folder whole, in place of an older one if the user said so."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replaced(target: Path) -> Iterator[Path]:
    """A place to write that becomes `target` when all went well; what was there before is then gone, and not sooner."""
    if not target.is_dir() or not any(target.iterdir()):
        yield target
        return
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield work / "new"
        target.rename(work / "old")
        try:
            (work / "new").rename(target)
        except OSError:
            (work / "old").rename(target)
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
