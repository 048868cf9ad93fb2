"""`ahn cost`: parameters, FLOPs and cache bytes of a model with a memory, from its config alone."""

from __future__ import annotations

import dataclasses
import json
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ahn.cli import checks
from ahn.cli.terminal import UsageError, notes, output, say

if TYPE_CHECKING:
    from rich.table import Table

    from ahn.cost import Cost, Counting

EXAMPLES = """Examples:

ahn cost qwen2.5-3b

ahn cost qwen2.5-14b --convention paper  [dim]# as the paper counts[/dim]

ahn cost ./my-model --context 1000000 --window 4096 --sinks 32 --plot cost.png
"""
CONVENTIONS = ("actual", "paper")
DTYPES = ("float32", "bfloat16", "float16", "auto")
MEMORY_POSITIONS = ("rope", "none")
COUNTED = {
    "mixer_flops": "mixers",
    "prefill_flops": "prefill",
    "token_flops": "next token",
    "cache_bytes": "cache",
}
"""Columns of the table that are compared with full attention."""


def command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A built-in name, qwen2.5-3b, -7b or -14b, a folder, or a hub id.")
    ],
    context: Annotated[int, typer.Option(help="Tokens that are read.")] = 128000,
    window: Annotated[int, typer.Option(help="Tokens kept exactly behind the current one.")] = 32640,
    sinks: Annotated[int, typer.Option(help="Tokens kept exactly at the start.")] = 128,
    convention: Annotated[
        str,
        typer.Option(metavar="actual|paper", help="What this library computes and holds, or what the paper counts."),
    ] = "actual",
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16.  [dim]\\[default: the model's own][/dim]")
    ] = None,
    memory_positions: Annotated[
        str | None,
        typer.Option(metavar="rope|none", help="What the memory sees of positions.  [dim]\\[default: rope][/dim]"),
    ] = None,
    plot: Annotated[
        list[Path] | None, typer.Option(help="Draw it to a .png or .svg file; may be given several times.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Count parameters, FLOPs and cache bytes of a model: full, with a window, and with each memory."""
    checks.at_least("--context", context, 1)
    checks.span(window, sinks, None)
    checks.one_of("--convention", convention, CONVENTIONS)
    checks.one_of("--dtype", dtype, DTYPES)
    checks.one_of("--memory-positions", memory_positions, MEMORY_POSITIONS)
    if convention == "paper" and (dtype or memory_positions):
        given = "--dtype" if dtype else "--memory-positions"
        raise UsageError(f"{given} does not go with --convention paper, which counts 4 bytes a number. Leave it out.")
    files = [path.expanduser() for path in plot or []]
    for path in files:
        checks.plot_to_write("--plot", path)
    from ahn.cli.loading import quiet

    quiet()
    with notes().status(f"Measuring {model} ..."):
        from ahn.config import AHNConfig
        from ahn.cost import cost_model

        config = AHNConfig(window=window, sinks=sinks, memory_positions=memory_positions or "rope")  # type: ignore[arg-type]
        counted = cost_model(model, config, convention, dtype)  # type: ignore[arg-type]
        costs = counted.at(context)
        if files:
            from ahn.cost.plot import plot_costs

            plot_costs(counted, context, files)
    if as_json:
        typer.echo(json.dumps(_facts(counted, context, costs), indent=2))
    else:
        _show(counted, context, costs)
    for path in files:
        say(f"wrote {path}", console=notes() if as_json else output())


def _facts(model: Counting, context: int, costs: dict[str, Cost]) -> dict[str, Any]:
    """Plain values, ready for JSON."""
    base, config = model.base, model.base.attachment.config
    return {
        "model": base.name,
        "family": base.family,
        "base_parameters": base.parameters,
        "dtype": str(base.dtype).removeprefix("torch."),
        "layers": len(base.attachment.sites),
        "memory_layers": _served(model),
        "convention": model.name,
        "context": context,
        "window": config.window,
        "sinks": config.sinks,
        "memory_positions": config.memory_positions,
        "number_bytes": model.number_bytes(),
        "ct_slots": model.slots[1],
        "costs": {way: dataclasses.asdict(cost) for way, cost in costs.items()},
        "share_of_full": {
            way: {name: getattr(cost, name) / getattr(costs["full"], name) for name in COUNTED}
            for way, cost in costs.items()
        },
        "notes": model.notes,
    }


def _show(model: Counting, context: int, costs: dict[str, Cost]) -> None:
    """The table for people, with what must be known to read it."""
    from rich.text import Text

    screen, base, config = output(), model.base, model.base.attachment.config
    served, layers = _served(model), len(base.attachment.sites)
    opening = (
        f"{base.name} ({base.family}, {_count(base.parameters)} parameters) reads {context:,} tokens, sinks "
        f"{config.sinks:,}, window {config.window:,}. A memory in {'all' if served == layers else f'{served} of'} "
        f"{layers} layers."
    )
    screen.print(Text(opening), soft_wrap=not screen.is_terminal)
    screen.print("", _table(costs), "", sep="\n")
    for sentence in (_comparison(model, costs), *model.notes):
        screen.print(Text(sentence), soft_wrap=not screen.is_terminal)


def _table(costs: dict[str, Cost]) -> Table:
    """One row for every way to read, in the units of full attention."""
    from rich import box
    from rich.table import Table

    from ahn.cost.formatting import byte_unit, percent, scaled, thousands

    full = costs["full"]
    powers = {name: thousands(getattr(full, name)) for name in COUNTED}
    units = {name: f"e{power} FLOPs" for name, power in powers.items()}
    units["cache_bytes"] = byte_unit(powers["cache_bytes"])
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, show_edge=False, header_style="bold")
    table.add_column("", no_wrap=True)
    table.add_column("added\nparams", justify="right", no_wrap=True)
    for name, title in COUNTED.items():
        table.add_column(f"{title}\n{units[name]}", justify="right", no_wrap=True)
    for way, cost in costs.items():
        cells = []
        for name in COUNTED:
            value, whole = getattr(cost, name), getattr(full, name)
            share = percent(value, whole, digits=1 if value < whole else 0).replace(" ", "")
            cells.append(f"{scaled(value, powers[name])} {share:>5}")
        table.add_row(way, _count(cost.parameters), *cells)
    return table


def _comparison(model: Counting, costs: dict[str, Cost]) -> str:
    """What the first memory saves, in a sentence."""
    from ahn.cost.formatting import byte_unit, percent, scaled, thousands
    from ahn.memories import memory_names

    name, full = memory_names()[0], costs["full"]
    memory, flops, size = costs[name], thousands(full.prefill_flops), thousands(full.cache_bytes)
    return (
        f"{name} instead of full: {scaled(full.prefill_flops, flops)}e{flops} -> "
        f"{scaled(memory.prefill_flops, flops)}e{flops} FLOPs "
        f"({percent(memory.prefill_flops, full.prefill_flops)}) and "
        f"{scaled(full.cache_bytes, size)} -> {scaled(memory.cache_bytes, size)} {byte_unit(size)} "
        f"({percent(memory.cache_bytes, full.cache_bytes)}), for {_count(memory.parameters)} more parameters "
        f"({percent(memory.parameters, model.base.parameters, 2)})."
    )


def _served(model: Counting) -> int:
    return sum(site.memory is not None for site in model.base.attachment.sites)


def _count(number: int) -> str:
    """A number of parameters: "13.0 M", "3.09 B", "544"."""
    from ahn.cost.formatting import fixed

    if number >= 10**9:
        return f"{fixed(Fraction(number, 10**9), 2)} B"
    return f"{fixed(Fraction(number, 10**6), 1)} M" if number >= 10**6 else f"{number:,}"
