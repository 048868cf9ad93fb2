"""`ahn eval prompts`: the published prompts of the benchmarks, made ready for `ahn eval run --prompts`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from ahn._home import write_text
from ahn.cli import checks
from ahn.cli.options import from_fields
from ahn.cli.terminal import UsageError, log, output
from ahn.config import setting

EXAMPLES = """Examples:

ahn eval prompts LVEval/config.py LongBench/config/dataset2prompt.json --out prompts.json

ahn eval prompts InfiniteBench/src/prompt.py --variant yarn_mistral --out prompts.json
"""


@dataclasses.dataclass(frozen=True)
class PromptSettings:
    """Which files are converted."""

    files: tuple[str, ...] = setting(
        help="LV-Eval's config.py, LongBench's dataset2prompt.json, InfiniteBench's prompt.py.",
        argument=True,
        metavar="FILE",
    )
    out: Path | None = setting(None, "The file to write, in JSON.", unset="prompts.json")
    variant: str | None = setting(None, "Which templates of a file that has several: gpt4, yarn_mistral, ...")


@from_fields
def command(settings: PromptSettings) -> None:
    """Convert the prompts that benchmarks publish, so that scores can be set beside published ones."""
    from ahn.evaluation.benchmarks.official_prompts import read_official_prompts

    target = (settings.out or Path("prompts.json")).expanduser()
    checks.file_to_write("--out", target, settings.files)
    templates: dict[str, str] = {}
    for name in settings.files:
        published = read_official_prompts(Path(name).expanduser(), settings.variant)
        if twice := sorted(published.templates.keys() & templates.keys()):
            raise UsageError(f"{name} has a template of {twice[0]}, as a file before it. Name one of them.")
        templates |= published.templates
        for reason in dict.fromkeys(published.left_out.values()):
            names = ", ".join(task for task, each in published.left_out.items() if each == reason)
            log(f"left out: {names} ({reason})", "yellow")
    write_text(target, json.dumps(templates, indent=1, ensure_ascii=False) + "\n", settings.files)
    log(f"wrote templates of {len(templates)} tasks to {target}", console=output())
