"""`ahn convert`: a memory between this library's format and the published one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from ahn.cli import checks
from ahn.cli.options import from_fields
from ahn.cli.terminal import log, output
from ahn.config import setting

EXAMPLES = """Examples:

ahn convert downloaded-ahn my-adapter

ahn convert my-adapter to-publish --model Qwen/Qwen2.5-3B-Instruct
"""


@dataclasses.dataclass(frozen=True)
class ConvertSettings:
    """From which format to which."""

    source: str = setting(help="Folder or hub id of a memory's weights.", argument=True, metavar="SOURCE")
    target: Path = setting(help="Folder to write.", argument=True, metavar="TARGET")
    to: Literal["adapter", "published"] | None = setting(
        None, "Format to write.", choices=("adapter", "published"), unset="the other one"
    )
    model: str | None = setting(None, "The base model, for what the source does not say about it.", alias="base")
    force: bool = setting(False, "Replace a checkpoint that is there.")


@from_fields
def command(settings: ConvertSettings) -> None:
    """Convert a memory between this library's format and the published one, bit for bit."""
    target = settings.target.expanduser()
    checks.folder_to_write(target, settings.source, settings.force)
    from ahn.checkpoint import convert, describe
    from ahn.cli.loading import quiet

    quiet()
    with checks.whole_folder(target) as folder:
        convert(settings.source, folder, to=settings.to, base=settings.model)
    written = describe(target)
    log(
        f"wrote {target}: {written.kind}, {written.memory} in {len(written.layers)} layers, "
        f"{written.parameters:,} parameters",
        console=output(),
    )
