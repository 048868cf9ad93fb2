"""`ahn merge`: base weights and memory in one folder of the published format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ahn.cli import checks
from ahn.cli.terminal import log, megabytes, output

EXAMPLES = """Examples:

ahn merge Qwen/Qwen2.5-3B-Instruct my-adapter merged

ahn generate "Hello" --model ./merged
"""


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The base model: name, folder or hub id.")],
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="The memory: a folder or a hub id.")],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="Folder to write.")],
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint that is there.")] = False,
) -> None:
    """Write a base model, its tokenizer and a memory into one folder that --model and ahn.from_pretrained take."""
    target = target.expanduser()
    checks.folder_to_write(target, adapter, force)
    checks.folder_to_write(target, model, force)
    from ahn.checkpoint import merge
    from ahn.cli.loading import quiet

    quiet()
    with checks.whole_folder(target) as folder:
        merge(model, adapter, folder)
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    log(f"wrote {target}: {megabytes(size)} MB", console=output())
