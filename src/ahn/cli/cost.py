"""`ahn cost`: parameters, FLOPs and cache bytes of a model with a memory, from its config alone."""

from __future__ import annotations

import dataclasses
import json
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from ahn.cli import checks
from ahn.cli.options import from_fields
from ahn.cli.terminal import UsageError, log, notes, output
from ahn.config import AHNConfig, ExactTokens, MemoryPositions, same_setting, setting

if TYPE_CHECKING:
    from rich.table import Table

    from ahn.cost import Cost, Counting

EXAMPLES = """Examples:

ahn cost qwen2.5-3b

ahn cost qwen2.5-14b --convention paper  [dim]# as the paper counts[/dim]

ahn cost ./my-model --context 1000000 --window 4096 --sinks 32 --plot cost.png
"""
COUNTED = {
    "mixer_flops": "mixers",
    "prefill_flops": "prefill",
    "token_flops": "next token",
    "cache_bytes": "cache",
}
"""Columns of the table that are compared with full attention."""


@dataclasses.dataclass(frozen=True)
class CostSettings:
    """Which model is counted, how, and for how long a text."""

    model: str = setting(
        help="A built-in name, qwen2.5-3b, -7b, -14b, qwen3-8b, a folder, or a hub id.", argument=True, metavar="MODEL"
    )
    context: int = setting(128000, "Tokens that are read.", least=1)
    window: int = same_setting(ExactTokens, "window")
    sinks: int = same_setting(ExactTokens, "sinks")
    convention: Literal["actual", "paper"] = setting(
        "actual", "What this library computes and holds, or what the paper counts.", choices=("actual", "paper")
    )
    dtype: str | None = setting(
        None,
        "float32, bfloat16 or float16.",
        choices=("float32", "bfloat16", "float16", "auto"),
        metavar="DTYPE",
        unset="the model's own",
    )
    memory_positions: MemoryPositions | None = same_setting(
        AHNConfig, "memory_positions", default=None, unset="rope", kw_only=False
    )
    cache_dtype: str | None = same_setting(ExactTokens, "cache_dtype", kw_only=False)
    plot: tuple[Path, ...] = setting((), "Draw it to a .png or .svg file; may be given several times.")
    json: bool = setting(False, "Print JSON instead of a table.")


@from_fields
def command(settings: CostSettings) -> None:
    """Count parameters, FLOPs and cache bytes of a model: full, with a window, and with each memory."""
    if settings.convention == "paper" and (settings.dtype or settings.memory_positions):
        option = "--dtype" if settings.dtype else "--memory-positions"
        raise UsageError(f"{option} does not go with --convention paper, which counts 4 bytes a number. Leave it out.")
    plots = checks.plots_to_write(settings.plot)
    from ahn.cli.loading import quiet

    quiet()
    with notes().status(f"Measuring {settings.model} ..."):
        from ahn.cost import cost_model

        config = AHNConfig(
            window=settings.window,
            sinks=settings.sinks,
            memory_positions=settings.memory_positions or "rope",
            cache_dtype=settings.cache_dtype,  # type: ignore[arg-type]
        )
        counted = cost_model(settings.model, config, settings.convention, settings.dtype)
        costs = counted.at(settings.context)
        if plots:
            from ahn.cost.plot import plot_costs

            plot_costs(counted, settings.context, plots)
    if settings.json:
        typer.echo(json.dumps(_facts(counted, settings.context, costs), indent=2))
    else:
        _print_tables(counted, settings.context, costs)
    for path in plots:
        log(f"wrote {path}", console=notes() if settings.json else output())


def _facts(model: Counting, context: int, costs: dict[str, Cost]) -> dict[str, Any]:
    """Plain values, ready for JSON."""
    base, config = model.base, model.base.attachment.config
    return {
        "model": base.name,
        "family": base.family,
        "base_parameters": base.parameters,
        "dtype": str(base.dtype).removeprefix("torch."),
        "layers": len(base.attachment.layers),
        "memory_layers": _served(model),
        "convention": model.name,
        "context": context,
        "window": config.window,
        "sinks": config.sinks,
        "memory_positions": config.memory_positions,
        "number_bytes": model.number_bytes(),
        "ct_slots": model.slots[1],
        "costs": {method: dataclasses.asdict(cost) for method, cost in costs.items()},
        "share_of_full": {
            method: {name: getattr(cost, name) / getattr(costs["full"], name) for name in COUNTED}
            for method, cost in costs.items()
        },
        "notes": model.notes,
    }


def _print_tables(model: Counting, context: int, costs: dict[str, Cost]) -> None:
    """The table for people, with what must be known to read it."""
    from rich.text import Text

    screen, base, config = output(), model.base, model.base.attachment.config
    served, layers = _served(model), len(base.attachment.layers)
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
    """One row for every method, in the units of full attention."""
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
    for method, cost in costs.items():
        cells = []
        for name in COUNTED:
            value, whole = getattr(cost, name), getattr(full, name)
            share = percent(value, whole, digits=1 if value < whole else 0).replace(" ", "")
            cells.append(f"{scaled(value, powers[name])} {share:>5}")
        table.add_row(method, _count(cost.parameters), *cells)
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
    return sum(layer.memory is not None for layer in model.base.attachment.layers)


def _count(number: int) -> str:
    """A number of parameters: "13.0 M", "3.09 B", "544"."""
    from ahn.cost.formatting import fixed

    if number >= 10**9:
        return f"{fixed(Fraction(number, 10**9), 2)} B"
    return f"{fixed(Fraction(number, 10**6), 1)} M" if number >= 10**6 else f"{number:,}"
