"""`ahn train`: a model teaches its memories what full attention would have read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ahn.cli import checks, train_anchors
from ahn.cli.terminal import UsageError, notes, output, say
from ahn.config import AHNConfig
from ahn.memories import memory_names

if TYPE_CHECKING:
    from ahn.training.run import Outcome

EXAMPLES = """Examples:

ahn train --data texts --out my-memory --steps 20  [dim]# a first try on a laptop[/dim]

ahn train --out my-memory --resume  [dim]# go on after a stop, however it came[/dim]

ahn train --base Qwen/Qwen2.5-3B-Instruct --data chats.jsonl --out big --config train.yaml

torchrun --nproc-per-node 8 --no-python ahn train --config train.yaml

ahn train anchors --data texts --out anchors  [dim]# the learned score for anchors[/dim]
"""
_FILE = "train.yaml"


def command(
    context: typer.Context,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Text, JSONL, a folder of them, or a dataset's name; may be given several times."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for weights, settings, checkpoints, table and plot.")] = None,
    base: Annotated[
        str | None, typer.Option(help="A built-in name, a folder, or a hub id.  [dim]\\[default: smollm2-135m][/dim]")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(memory_names())}.  [dim]\\[default: {AHNConfig.memory}][/dim]"),
    ] = None,
    adapter: Annotated[str | None, typer.Option(help="Weights to start from: a folder, name or hub id.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file with any settings; options given here win over it.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what is in --out.")] = False,
    stages: Annotated[
        str | None,
        typer.Option(help="distill, transfer, or transfer,distill.  [dim]\\[default: distill][/dim]"),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of distill.  [dim]\\[default: 500][/dim]")] = None,
    transfer_steps: Annotated[int | None, typer.Option(help="Steps of transfer.  [dim]\\[default: 200][/dim]")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of a sequence.  [dim]\\[default: 1024][/dim]")] = None,
    min_length: Annotated[
        int | None, typer.Option(help="Leave shorter texts out.  [dim]\\[default: half of --length][/dim]")
    ] = None,
    pack: Annotated[bool | None, typer.Option("--pack/--cut", help="Join short texts into full sequences.")] = None,
    window: Annotated[
        int | None, typer.Option(help="Window to evaluate and save with.  [dim]\\[default: 256][/dim]")
    ] = None,
    sinks: Annotated[int | None, typer.Option(help="Sinks likewise.  [dim]\\[default: 32][/dim]")] = None,
    draw: Annotated[
        str | None,
        typer.Option(
            metavar="random|fixed",
            help="Train each sequence with another window and other sinks, or all with these.  "
            "[dim]\\[default: random][/dim]",
        ),
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.  [dim]\\[default: 0.0001][/dim]")] = None,
    batch: Annotated[
        int | None, typer.Option(help="Sequences at once, per process.  [dim]\\[default: 1][/dim]")
    ] = None,
    accumulation: Annotated[
        int | None, typer.Option(help="Batches of a step, per process.  [dim]\\[default: 1][/dim]")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or auto, of the base.  [dim]\\[default: auto][/dim]")
    ] = None,
    checkpointing: Annotated[
        str | None,
        typer.Option(
            metavar="none|attention|layers",
            help="What to compute twice instead of keeping it.  [dim]\\[default: the more, the longer][/dim]",
        ),
    ] = None,
    loss_share: Annotated[
        float | None, typer.Option(help="Share of the positions that the loss looks at.  [dim]\\[default: 1.0][/dim]")
    ] = None,
    teacher_cache: Annotated[
        str | None, typer.Option(help="Folder to keep what the teacher has read, for further trainings.")
    ] = None,
    valid: Annotated[list[str] | None, typer.Option(help="Text for the closing table, as --data.")] = None,
    held_out: Annotated[
        float | None, typer.Option(help="Without --valid: share of the data for it.  [dim]\\[default: 0.02][/dim]")
    ] = None,
    streaming: Annotated[
        bool | None, typer.Option("--streaming/--download", help="Read a dataset while training.")
    ] = None,
    log_every: Annotated[int | None, typer.Option(help="Steps between lines.  [dim]\\[default: 5][/dim]")] = None,
    save_every: Annotated[
        int | None, typer.Option(help="Steps between checkpoints.  [dim]\\[default: 50][/dim]")
    ] = None,
    report_to: Annotated[
        str | None, typer.Option(help="tensorboard, wandb or none.  [dim]\\[default: none][/dim]")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of all random numbers.  [dim]\\[default: 0][/dim]")] = None,
) -> None:
    """Train a memory for a model by self-distillation, the base model being the teacher of itself."""
    given = {name: value for name, value in locals().items() if name not in ("context", "config", "resume")}
    if context.invoked_subcommand is not None:
        return
    options = {name: value for name, value in given.items() if value not in (None, [])}
    checks.file_to_read("--config", config)
    values = _values(options, config, resume)
    _require_extra()
    from ahn.cli.loading import quiet
    from ahn.training.processes import part
    from ahn.training.run import check, train
    from ahn.training.settings import TrainSettings

    settings = TrainSettings.of(values)
    main_process = os.environ.get("RANK", "0") == "0"
    if main_process:
        check(settings, resume)
    quiet()
    outcome = train(settings, resume, say if main_process else None, progress=main_process and notes().is_terminal)
    if main_process:
        _show(outcome)
    part()


app = typer.Typer(rich_markup_mode="rich", context_settings={"help_option_names": ["-h", "--help"]})
app.callback(invoke_without_command=True, epilog=EXAMPLES)(command)
app.command("anchors", epilog=train_anchors.EXAMPLES)(train_anchors.command)


def _values(options: dict[str, Any], config: Path | None, resume: bool) -> dict[str, Any]:
    """Settings of the run to go on with, then those of the file, then those of the command line."""
    _require_yaml()
    from ahn.training.settings import read_yaml

    values: dict[str, Any] = {} if config is None else read_yaml(config)
    if "out" in options:
        options["out"] = str(options["out"])
    if "stages" in options:
        options["stages"] = [stage.strip() for stage in options["stages"].split(",")]
    values |= options
    if not values.get("out"):
        raise UsageError("there is no folder to write to. Name one with --out.")
    saved = Path(str(values["out"])).expanduser() / _FILE
    if resume and saved.is_file():
        values = {**read_yaml(saved), **values}
    if not values.get("data"):
        raise UsageError("there is nothing to train on. Name a file, a folder or a dataset with --data.")
    return values


def _require_yaml() -> None:
    from importlib.util import find_spec

    if find_spec("yaml") is None:
        raise UsageError("training needs some more packages. Install them: pip install 'ahn[train]'")


def _require_extra() -> None:
    """Checks that what training needs is installed."""
    from importlib.util import find_spec

    missing = [name for name in ("accelerate",) if find_spec(name) is None]
    if missing:
        raise UsageError(f"training needs {', '.join(missing)}. Install it: pip install 'ahn[train]'")


def _show(outcome: Outcome) -> None:
    """The closing table, and where everything is."""
    from rich.table import Table

    if (report := outcome.report) is not None:
        span = f"sinks {report.span.sinks}, window {report.span.window}"
        say(f"{report.tokens:,} held-out tokens beyond these: {span}", console=output())
        table = Table()
        for name in ("mode", "nats per token", "perplexity"):
            table.add_column(name, justify="left" if name == "mode" else "right")
        for row in report.rows():
            table.add_row(*row)
        output().print(table)
        if report.gap_closed == report.gap_closed:  # not NaN
            say(f"the memory wins back {report.gap_closed:.0%} of what the window loses", console=output())
    else:
        say("no held-out text is long enough for the closing table", console=output())
    say(f"wrote {outcome.folder}: try it with `ahn generate --adapter {outcome.folder}`", console=output())
