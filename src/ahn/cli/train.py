"""`ahn train`: a model teaches its memories what full attention would have read."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ahn.cli import checks, train_anchors
from ahn.cli.options import from_fields
from ahn.cli.terminal import UsageError, log, notes, output
from ahn.training.settings import FILE, TrainSettings, read_yaml

if TYPE_CHECKING:
    from ahn.training.run import Outcome

EXAMPLES = """Examples:

ahn train --data texts --out my-memory --steps 20  [dim]# a first try on a laptop[/dim]

ahn train --data texts --out both --anchors 0,64,128  [dim]# memory and anchors together[/dim]

ahn train --out my-memory --resume  [dim]# go on after a stop, however it came[/dim]

ahn train --model Qwen/Qwen2.5-3B-Instruct --data chats.jsonl --out big --config train.yaml

torchrun --nproc-per-node 8 --no-python ahn train --config train.yaml

ahn train anchors --data texts --out anchors  [dim]# the learned score for anchors[/dim]
"""


@from_fields
def command(
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Option(help="YAML file with any settings; options given here win over it.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what is in --out.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Load nothing; say how much memory a step takes, from the config alone.")
    ] = False,
    *,
    settings: Annotated[dict[str, Any], TrainSettings],
) -> None:
    """Train a memory for a model by self-distillation, the base model being the teacher of itself."""
    if context.invoked_subcommand is not None:
        return
    checks.file_to_read("--config", config)
    values = _values(settings, config, resume)
    from ahn.cli.loading import quiet

    if dry_run:
        quiet()
        _print_need(TrainSettings.from_dict(values))
        return
    _require_extra("accelerate")
    from ahn.training.processes import part
    from ahn.training.run import check, train

    chosen = TrainSettings.from_dict(values)
    main_process = os.environ.get("RANK", "0") == "0"
    if main_process:
        check(chosen, resume)
    quiet()
    outcome = train(chosen, resume, log if main_process else None, progress=main_process and notes().is_terminal)
    if main_process:
        _print_outcome(outcome)
    part()


app = typer.Typer(rich_markup_mode="rich", context_settings={"help_option_names": ["-h", "--help"]})
app.callback(invoke_without_command=True, epilog=EXAMPLES)(command)
app.command("anchors", epilog=train_anchors.EXAMPLES)(train_anchors.command)


def _values(options: dict[str, Any], config: Path | None, resume: bool) -> dict[str, Any]:
    """Settings of the run to go on with, then those of the file, then those of the command line."""
    _require_extra("yaml")
    values = {**({} if config is None else read_yaml(config)), **options}
    if not values.get("out"):
        raise UsageError("there is no folder to write to. Name one with --out.")
    saved = Path(str(values["out"])).expanduser() / FILE
    if resume and saved.is_file():
        values = {**read_yaml(saved), **values}
    elif resume and not values.get("data"):
        raise UsageError(f"{values['out']} holds nothing to resume. Check the path, or begin a run with --data.")
    if not values.get("data"):
        raise UsageError("there is nothing to train on. Name a file, a folder or a dataset with --data.")
    return values


def _require_extra(package: str) -> None:
    """Checks that a package that training needs is installed."""
    if find_spec(package) is None:
        raise UsageError("training needs some more packages. Install them: pip install 'ahn[train]'")


def _print_need(settings: TrainSettings) -> None:
    """What a process of the training holds, part by part."""
    from rich.table import Table

    from ahn.training.memory_need import memory_need

    need = memory_need(settings)
    table = Table("part", title=f"{settings.model}: {need.tokens:,} tokens at once, {need.step_tokens:,} in a step")
    table.title_justify = "left"
    table.add_column("GB", justify="right")
    for part, size in {**need.parts, "all together": need.total}.items():
        table.add_row(part, f"{size / 1e9:.2f}")
    output().print(table)
    log("Per process. Gaps of the allocator and the workspaces of libraries come on top.", console=output())


def _print_outcome(outcome: Outcome) -> None:
    """The closing table, and where everything is."""
    from rich.table import Table

    if (report := outcome.report) is not None:
        span = f"sinks {report.span.sinks}, window {report.span.window}"
        log(f"{report.tokens:,} held-out tokens beyond these: {span}", console=output())
        table = Table()
        for name in ("mode", "nats per token", "perplexity"):
            table.add_column(name, justify="left" if name == "mode" else "right")
        for row in report.rows():
            table.add_row(*row)
        output().print(table)
        if summary := report.summary():
            log(summary, console=output())
    log(f"wrote {outcome.folder}: try it with `ahn generate --adapter {outcome.folder}`", console=output())
