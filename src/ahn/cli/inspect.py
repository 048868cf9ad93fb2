"""`ahn inspect`: what an adapter, a published folder or a saved cache holds."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ahn.cli.terminal import UsageError, megabytes, output

EXAMPLES = """Examples:

ahn inspect my-adapter

ahn inspect book.cache --json
"""


def command(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Folder or hub id of weights, or a saved cache.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show what an adapter, a published checkpoint or a saved cache holds, without loading a model."""
    file = Path(path).expanduser()
    if not path.strip():
        raise UsageError("there is no path. Give a folder or a file.")
    facts = _cache(file) if os.path.isfile(file) else _checkpoint(path)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    from rich.table import Table

    from ahn.cli.console import printable

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name.replace("_", " "), printable(_shown(name, value)))
    output().print(table)


def _cache(path: Path) -> dict[str, Any]:
    from ahn.cache.storage import describe_cache

    saved = describe_cache(path)
    model, layers = saved["model"], saved["model"]["layers"]
    hidden_size, query_heads, kv_heads, key_size = layers[0][:4]
    return {
        "kind": "cache",
        "seen_tokens": saved["seen_tokens"],
        "rows": saved["rows"],
        "cache_bytes": saved["nbytes"],
        **saved["settings"],
        "memory": model["memory"],
        "memory_positions": model["memory_positions"],
        "layers": [index for index, layer in enumerate(layers) if layer[6]],
        "model_layers": len(layers),
        "hidden_size": hidden_size,
        "query_heads": query_heads,
        "kv_heads": kv_heads,
        "head_size": key_size,
    }


def _checkpoint(path: str) -> dict[str, Any]:
    from dataclasses import asdict

    from ahn.checkpoint import describe

    facts = asdict(describe(path))
    facts["layers"], facts["base_sizes"] = list(facts["layers"]), dict(facts["base_sizes"])
    return facts


def _shown(name: str, value: object) -> str:
    """A value for people: thousands, megabytes, ranges."""
    if value is None:
        return "not known"
    if isinstance(value, dict):
        return ", ".join(f"{key} {each}" for key, each in value.items())
    if isinstance(value, list):
        return _ranges(value)
    if name.endswith("bytes") and isinstance(value, int):
        return f"{value:,} ({megabytes(value)} MB)"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _ranges(numbers: list[int]) -> str:
    """Layer indices, shortened: "0-5, 7 (7)"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    words = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return f"{', '.join(words)} ({len(numbers)})"
