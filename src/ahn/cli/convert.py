"""`ahn convert`: a memory between this library's format and the published one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ahn.cli import checks
from ahn.cli.replacing import replaced
from ahn.cli.terminal import output, say

EXAMPLES = """Examples:

ahn convert downloaded-ahn my-adapter

ahn convert my-adapter to-publish --base Qwen/Qwen2.5-3B-Instruct
"""
FORMATS = ("adapter", "published")


def command(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Folder or hub id of a memory's weights.")],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="Folder to write.")],
    to: Annotated[
        str | None,
        typer.Option(metavar="adapter|published", help="Format to write.  [dim]\\[default: the other one][/dim]"),
    ] = None,
    base: Annotated[str | None, typer.Option(help="The base model, for what the source does not say about it.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint that is there.")] = False,
) -> None:
    """Convert a memory between this library's format and the published one, bit for bit."""
    checks.one_of("--to", to, FORMATS)
    target = target.expanduser()
    checks.folder_to_write(target, source, force)
    from ahn.checkpoint import convert, describe
    from ahn.cli.loading import quiet

    quiet()
    with replaced(target) as place:
        convert(source, place, to=to, base=base)  # type: ignore[arg-type]
    held = describe(target)
    say(
        f"wrote {target}: {held.kind}, {held.memory} in {len(held.layers)} layers, {held.parameters:,} parameters",
        console=output(),
    )
