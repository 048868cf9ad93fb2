"""The commands of `ahn eval`, one file each."""

from __future__ import annotations

import typer

from ahn.cli.evaluation import compare, perplexity, prompts, recall, run, score

app = typer.Typer(
    help="Measure what a model keeps of what it reads.",
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS = {
    "perplexity": perplexity,
    "recall": recall,
    "run": run,
    "prompts": prompts,
    "compare": compare,
    "score": score,
}
for name, module in COMMANDS.items():
    app.command(name, epilog=module.EXAMPLES)(module.command)


@app.callback(invoke_without_command=True)
def start(context: typer.Context) -> None:
    """Measure what a model keeps of what it reads."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
