"""`ahn bench`: how fast a model reads and writes in each arm on this machine, next to what the hardware allows."""

from __future__ import annotations

import dataclasses
import itertools
import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ahn.cli import checks
from ahn.cli.loading import ModelSettings
from ahn.cli.options import from_fields
from ahn.cli.terminal import UsageError, log, megabytes, notes, output
from ahn.config import setting
from ahn.evaluation.tables import ResultTable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ahn.cli.loading import Loaded
    from ahn.speed import Speed, Timing

_LLAMA = "llama.cpp"

EXAMPLES = """Examples:

ahn bench  [dim]# some minutes[/dim]

ahn bench --contexts 2048,32768 --arms full,window,ahn,ahn+64 --plot speed.png

ahn bench --arms llama.cpp,ahn --quantize int4  [dim]# the same 4-bit weights in both[/dim]

ahn bench --model ./my-model --adapter ./my-memory --window 4096 --json speed.json
"""


@dataclasses.dataclass(frozen=True)
class BenchSettings:
    """What is timed, how often, and where the numbers go."""

    arms: tuple[str, ...] = setting(
        ("full", "window", "ahn"),
        "Ways of reading, joined by commas, llama.cpp among them; compared with the first.",
        joined=True,
    )
    contexts: str = setting("2048,8192", "Numbers of tokens read before, joined by commas.")
    rounds: int = setting(5, "How often each has its turn.", least=1)
    plot: tuple[Path, ...] = setting((), "Draw it to a .png or .svg file; may be given several times.")
    json: Path | None = setting(None, "Write the numbers to this file.")


@from_fields
def command(settings: BenchSettings, source: ModelSettings) -> None:
    """Time reading and writing, several ways to read (arms) side by side, next to the floor that the hardware sets."""
    contexts = _contexts(settings.contexts)
    _check_arms(settings.arms)
    checks.file_to_write("--json", settings.json)
    plots = checks.plots_to_write(settings.plot)
    from ahn.cli import loading
    from ahn.cli.terminal import work_bar

    loaded = loading.load(source)
    from ahn import native
    from ahn.speed import llama, measure

    if llama.NAME in settings.arms:
        llama.find_gguf(loaded.model)

    done, total = itertools.count(1), 2 * (settings.rounds + 1) * len(contexts)
    with work_bar(notes(), total, "rounds", "timed") as update:
        speed = measure(
            loaded.model.eval(), settings.arms, contexts, settings.rounds, on_round=lambda: update(next(done))
        )
    if loaded.model.device.type == "cpu" and (reason := native.why_not()) is not None:
        log(f"measured without the kernels in C, which are faster: {reason}", "yellow")
    title = f"{loaded.name}, sinks {loaded.config.sinks:,}, window {loaded.config.window:,}, {loaded.config.memory}"
    _print_tables(speed, title, settings.rounds)
    if plots:
        from ahn.speed.plot import plot_speed

        plot_speed(speed, title, plots)
    if settings.json is not None:
        _write(settings.json, speed, loaded, settings, contexts)
    for path in [*plots, *filter(None, [settings.json])]:
        log(f"wrote {path}", console=notes())


def _write(path: Path, speed: Speed, loaded: Loaded, settings: BenchSettings, contexts: list[int]) -> None:
    """Writes the numbers, and what they were measured with."""
    from ahn._home import write_text
    from ahn.evaluation.report import environment, plain

    chosen = {"arms": settings.arms, "contexts": contexts, "rounds": settings.rounds}
    facts = {
        "environment": environment(loaded.model),
        "model": loaded.name,
        "settings": {**chosen, **dataclasses.asdict(loaded.config)},
        **dataclasses.asdict(speed),
    }
    write_text(path, json.dumps(plain(facts), indent=1) + "\n")


def _check_arms(arms: Sequence[str]) -> None:
    from ahn.evaluation.arm_names import find_arm

    if _LLAMA in arms and find_spec("xllamacpp") is None:
        raise UsageError("--arms llama.cpp needs a package that is not installed. Install it: pip install 'ahn[bench]'")
    for name in [arm for arm in arms if arm != _LLAMA] or [""] * (not arms):
        if find_arm(name).method == "tail":
            raise UsageError(
                "--arms: tail begins its text anew again and again, which has no time per token. Leave it out."
            )


def _contexts(text: str) -> list[int]:
    words = checks.words(text)
    if not words or not all(word.isdecimal() and int(word) > 0 for word in words):
        raise UsageError(f"--contexts must be numbers of at least 1 joined by commas, as in 2048,8192, not '{text}'.")
    return sorted(map(int, words))


def _print_tables(speed: Speed, title: str, rounds: int) -> None:
    """The tables for people."""
    from rich.text import Text

    screen, machine = output(), speed.machine
    screen.print(Text(title), soft_wrap=True)
    screen.print(
        Text(
            f"This machine copies {machine.bandwidth / 1e9:.1f} GB/s and multiplies {machine.flops / 1e9:,.0f} "
            f"GFLOP/s, which sets the floor. Medians over rounds ({rounds}) in which the arms take turns."
        ),
        soft_wrap=True,
    )
    _table("Writing one token", speed.decoding).print(screen)
    _table(f"Reading {speed.chunk:,} tokens, time per token", speed.reading).print(screen)


def _table(what: str, rows: Sequence[Timing]) -> ResultTable:
    columns = ["after", "arm", "ms", "floor", "tokens/s", f"x {rows[0].arm}", "cache, MB"]
    return ResultTable(columns, [_cells(row) for row in rows], what)


def _cells(row: Timing) -> list[Any]:
    seconds = row.seconds.median
    return [
        f"{row.context:,}",
        row.arm,
        f"{1e3 * seconds:.1f}",
        f"{1e3 * row.floor:.1f}",
        f"{1 / seconds:.1f}",
        f"{row.of_first.median:.2f}",
        megabytes(row.cache_bytes),
    ]
