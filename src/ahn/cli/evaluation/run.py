"""`ahn eval run`: public benchmarks, asked in several arms and scored side by side."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ahn.cli import checks
from ahn.cli.evaluation.runs import Run, RunOptions, check_arms, open_run
from ahn.cli.evaluation.score import SCORING_HELP, SCORINGS
from ahn.cli.loading import ModelSettings
from ahn.cli.options import from_fields
from ahn.cli.terminal import UsageError, notes, output, work_bar
from ahn.config import setting
from ahn.evaluation.arm_names import ARMS_HELP
from ahn.evaluation.benchmarks.schema import Scoring

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from ahn.cli.loading import Loaded
    from ahn.evaluation.benchmarks.question_sets import PromptRules, QuestionSet

EXAMPLES = """Examples:

ahn eval run --tasks passkey,kv_retrieval --data infinitebench --out passkey

ahn eval run --tasks cmrc_mixup_16k --data lveval --max-tokens 8000 --limit 20

ahn eval run --tasks longbook_qa_eng --data infinitebench --scoring paper

ahn eval run --tasks niah_single_1 --metadata '{"max_seq_lengths": [4096]}'  [dim]# by lm-evaluation-harness[/dim]
"""
PREDICTIONS = "predictions"
HARNESS = ("longbench_", "niah_", "ruler", "babilong")
"""How names of tasks begin that lm-evaluation-harness surely has."""


@dataclasses.dataclass(frozen=True)
class BenchmarkSettings:
    """Which records are asked, and how."""

    tasks: tuple[str, ...] = setting(
        help="Names of tasks, ours or those of lm-evaluation-harness, joined by commas.", joined=True
    )
    data: str | None = setting(None, "Folder of the JSONL files, or a hub id.", unset="the hub's own")
    limit: int | None = setting(None, "First records of each task that are asked.", least=1, unset="all")
    max_tokens: int | None = setting(
        None, "Tokens of a prompt at most, by the benchmark's rule.", least=2, unset="no limit"
    )
    scoring: Scoring = setting("official", SCORING_HELP, choices=SCORINGS)
    prompts: Path | None = setting(None, "JSON or YAML with templates of your own.")
    chat: bool | None = setting(None, "The chat template.", names="--chat/--no-chat", unset="if there is one")
    metadata: str | None = setting(
        None, "JSON for tasks of lm-evaluation-harness that make their data, such as RULER's."
    )
    arms: tuple[str, ...] = setting(("full", "window", "ahn"), ARMS_HELP, joined=True)


@from_fields
def command(settings: BenchmarkSettings, source: ModelSettings, options: RunOptions) -> None:
    """Ask the tasks of public benchmarks in several ways to read (arms) and score them side by side."""
    if not settings.tasks:
        raise UsageError("there is no task. Name some with --tasks, for example --tasks passkey.")
    checks.file_to_read("--prompts", settings.prompts)
    check_arms(settings.arms)
    metadata = _metadata(settings.metadata)
    from ahn.evaluation.benchmarks.prompts import read_prompts
    from ahn.evaluation.benchmarks.question_sets import PromptRules, check_sets

    ours, theirs = _sorted(settings.tasks)
    templates = {} if settings.prompts is None else read_prompts(settings.prompts.expanduser())
    prompting = PromptRules(settings.scoring, templates, settings.max_tokens, bool(settings.chat))
    with notes().status("Reading the records ..."):
        sets = check_sets(ours, settings.data, prompting, settings.limit)
        harness_tasks, checksums = _harness_tasks(theirs, settings.data, source.model, metadata, options.seed)
    run = open_run(
        "run",
        source,
        options,
        settings.arms,
        tasks=[*(each.target.name for each in sets), *theirs],
        **{name: getattr(settings, name) for name in ("limit", "max_tokens", "scoring", "chat")},
        prompts={name: hashlib.sha256(template.encode()).hexdigest() for name, template in templates.items()},
        metadata=metadata,
        records={**{each.target.name: each.checksum for each in sets}, **checksums},
    )
    _run(run, sets, prompting, settings.chat, harness_tasks)


def _metadata(text: str | None) -> dict[str, Any]:
    """The object in a JSON text."""
    try:
        values = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise UsageError(f"--metadata is no JSON ({error.msg}, column {error.colno}). Correct it.") from None
    if not isinstance(values, dict):
        raise UsageError("--metadata is no JSON object. Write it like this: '{\"max_seq_lengths\": [4096]}'.")
    return values


def _sorted(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names of our own tasks, and those that lm-evaluation-harness may know."""
    from ahn.evaluation.benchmarks import find
    from ahn.evaluation.errors import EvaluationError

    def is_ours(name: str) -> bool:
        try:
            find(name)
        except EvaluationError as error:
            if find_spec("lm_eval") is None and not name.startswith(HARNESS):
                others = "" if "Did you mean" in str(error) else " More come with pip install 'ahn[eval]'."
                raise EvaluationError(f"{error}{others}") from None
            return False
        return True

    ours = [name for name in names if is_ours(name)]
    return ours, [name for name in names if name not in ours]


def _harness_tasks(
    names: Sequence[str], data: str | None, model: str, metadata: dict[str, Any], seed: int
) -> tuple[list[Any], dict[str, str]]:
    """Tasks of lm-evaluation-harness with the checksums of their records."""
    if not names:
        return [], {}
    from ahn.cli.loading import quiet
    from ahn.evaluation.benchmarks import BENCHMARKS
    from ahn.evaluation.harness.tasks import checksums, load_tasks
    from ahn.models import resolve

    quiet()
    known = [task for benchmark in BENCHMARKS.values() for task in benchmark.tasks]
    tasks = load_tasks(names, data, {"tokenizer": resolve(model), **metadata}, known, seed)
    return tasks, checksums(tasks)


def _run(
    run: Run, sets: Sequence[QuestionSet], prompting: PromptRules, chat: bool | None, theirs: Sequence[Any]
) -> None:
    """The part that needs the model."""
    loaded = run.load()
    from ahn.evaluation.benchmarks import presentation
    from ahn.models import prompts

    prompting = dataclasses.replace(prompting, chat=prompts.has_chat(loaded.tokenizer) if chat is None else chat)
    results: dict[str, Any] = {}
    if sets:
        results["benchmarks"] = _answer_sets(run, loaded, sets, prompting)
        presentation.score_table(results["benchmarks"], run.arms).print(output())
    if theirs:
        results["harness"] = _evaluate(run, loaded, theirs, prompting)
        presentation.harness_table(results["harness"], run.arms).print(output())
    if run.out is not None:
        run.finish(results, presentation.make_page(results, run.arms), loaded.model)


def _answer_sets(run: Run, loaded: Loaded, sets: Sequence[QuestionSet], prompting: PromptRules) -> dict[str, Any]:
    """Our own tasks in every arm."""
    from ahn.evaluation.benchmarks.runner import BenchmarkRunner
    from ahn.evaluation.benchmarks.side_by_side import summarise

    runner = BenchmarkRunner(loaded.model, loaded.tokenizer, run.arms, prompting)
    with notes().status("Counting tokens ..."):
        lengths = runner.lengths(sets)
    total = len(run.arms) * sum(sum(counts) for counts in lengths.values())
    folder = None if run.out is None else run.out / PREDICTIONS
    with run.reading(total) as progress:
        records = runner.run(sets, lengths, run.journal, progress, folder)
    return summarise(records, run.arms, prompting.scoring)


def _evaluate(run: Run, loaded: Loaded, tasks: Sequence[Any], prompting: PromptRules) -> list[dict[str, Any]]:
    """Tasks of lm-evaluation-harness in every arm."""
    from ahn.evaluation.harness.model import HarnessModel
    from ahn.evaluation.harness.tasks import evaluate

    models = {
        arm: HarnessModel(
            mode=arm,
            max_length=prompting.max_tokens,
            model=loaded.model,
            tokenizer=loaded.tokenizer,
            journal=run.journal,
            bar=partial(_requests_bar, arm),
        )
        for arm in run.arms
    }
    with run.working():
        return evaluate(models, tasks, run.settings["limit"], prompting.chat)


def _requests_bar(arm: str, total: int) -> AbstractContextManager[Callable[..., None]]:
    return work_bar(notes(), total, "requests", f"{arm}: answered")
