"""The commands of `ahn`, one file each."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.main import get_command

from ahn.cli import bench, chat, convert, cost, demo, evaluation, generate, inspect, merge, probe, serve, train

app = typer.Typer(
    name="ahn",
    help="A fixed-size long-term memory for any pretrained decoder language model.",
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS = {
    "demo": demo,
    "generate": generate,
    "serve": serve,
    "chat": chat,
    "inspect": inspect,
    "cost": cost,
    "bench": bench,
    "convert": convert,
    "merge": merge,
    "probe": probe,
}
for name, module in COMMANDS.items():
    app.command(name, epilog=module.EXAMPLES)(module.command)
app.add_typer(train.app, name="train")
app.add_typer(evaluation.app, name="eval")


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """A fixed-size long-term memory for any pretrained decoder language model."""
    if version:
        from ahn import __version__

        typer.echo(f"ahn {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def command() -> Any:
    """The whole command line as one command."""
    return get_command(app)
