"""`ahn eval run`: public benchmarks, asked in several arms and scored side by side."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ahn.cli import checks
from ahn.cli.evaluation import options, run_tables
from ahn.cli.evaluation.by_arms import print_by_arms
from ahn.cli.evaluation.options import Run
from ahn.cli.evaluation.score import SCORINGS
from ahn.cli.terminal import UsageError, notes, output, work_bar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from ahn.cli.loading import Loaded
    from ahn.evaluation.benchmarks.question_sets import PromptRules, QuestionSet
    from ahn.evaluation.benchmarks.summary import Results

EXAMPLES = """Examples:

ahn eval run --tasks passkey,kv_retrieval --data infinitebench --out passkey

ahn eval run --tasks cmrc_mixup_16k --data lveval --max-tokens 8000 --limit 20

ahn eval run --tasks longbook_qa_eng --data infinitebench --scoring paper

ahn eval run --tasks niah_single_1 --metadata '{"max_seq_lengths": [4096]}'  [dim]# by lm-evaluation-harness[/dim]
"""
PREDICTIONS = "predictions"
HARNESS = ("longbench_", "niah_", "ruler", "babilong")
"""How names of tasks begin that lm-evaluation-harness surely has."""


def command(
    tasks: Annotated[
        str, typer.Option(help="Names of tasks, ours or those of lm-evaluation-harness, joined by commas.")
    ],
    data: Annotated[
        str | None, typer.Option(help="Folder of the JSONL files, or a hub id.  [dim]\\[default: the hub's own][/dim]")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="First records of each task that are asked.  [dim]\\[default: all][/dim]")
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of a prompt at most, by the benchmark's rule.  [dim]\\[default: no limit][/dim]"),
    ] = None,
    scoring: Annotated[
        str, typer.Option(metavar="official|paper", help="The benchmark's rules or, for En.QA and Zh.QA, the paper's.")
    ] = "official",
    prompts: Annotated[Path | None, typer.Option(help="JSON or YAML with templates of your own.")] = None,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="The chat template.  [dim]\\[default: if there is one][/dim]"),
    ] = None,
    metadata: Annotated[
        str | None, typer.Option(help="JSON for tasks of lm-evaluation-harness that make their data, such as RULER's.")
    ] = None,
    arms: options.Arms = "full,window,ahn",
    model: options.Model = options.MODEL,
    adapter: options.Adapter = None,
    window: options.Window = options.WINDOW,
    sinks: options.Sinks = options.SINKS,
    sink_positions: options.SinkPositions = options.SINK_POSITIONS,
    out: options.Out = None,
    seed: options.Seed = 0,
) -> None:
    """Ask the tasks of public benchmarks in several arms and score them side by side."""
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise UsageError("there is no task. Name some with --tasks, for example --tasks passkey.")
    checks.at_least("--limit", limit, 1)
    checks.at_least("--max-tokens", max_tokens, 2)
    checks.one_of("--scoring", scoring, SCORINGS)
    checks.file_to_read("--prompts", prompts)
    shared: dict[str, Any] = {
        "model": model,
        "adapter": adapter,
        "window": window,
        "sinks": sinks,
        "sink_positions": sink_positions,
        "arms": arms,
        "out": out,
        "seed": seed,
    }
    options.arm_names(arms)
    checks.span(window, sinks, sink_positions)
    values = _metadata(metadata)
    from ahn.evaluation.benchmarks.prompts import read_prompts
    from ahn.evaluation.benchmarks.question_sets import PromptRules, check_sets

    ours, theirs = _sorted(names)
    templates = {} if prompts is None else read_prompts(prompts.expanduser())
    prompting = PromptRules("paper" if scoring == "paper" else "official", templates, max_tokens, bool(chat))
    with notes().status("Reading the records ..."):
        sets = check_sets(ours, data, prompting, limit)
        harness_tasks = _harness_tasks(theirs, data, model, values) if theirs else []
    run = options.open_run(
        "run",
        **shared,
        tasks=[*(each.target.name for each in sets), *theirs],
        limit=limit,
        max_tokens=max_tokens,
        scoring=scoring,
        prompts={name: hashlib.sha256(template.encode()).hexdigest() for name, template in templates.items()},
        chat=chat,
        metadata=values,
        records={each.target.name: each.checksum for each in sets},
    )
    _run(run, sets, prompting, chat, harness_tasks)


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


def _harness_tasks(names: Sequence[str], data: str | None, model: str, metadata: dict[str, Any]) -> list[Any]:
    from ahn.cli.loading import quiet
    from ahn.evaluation.benchmarks import BENCHMARKS
    from ahn.evaluation.harness.tasks import load_tasks
    from ahn.models import resolve

    quiet()
    known = [task for benchmark in BENCHMARKS.values() for task in benchmark.tasks]
    return load_tasks(names, data, {"tokenizer": resolve(model), **metadata}, known)  # type: ignore[no-any-return]


def _run(
    run: Run, sets: Sequence[QuestionSet], prompting: PromptRules, chat: bool | None, harness_tasks: Sequence[Any]
) -> None:
    """The part that needs the model."""
    loaded = run.load()
    from ahn.evaluation.benchmarks import page as show
    from ahn.evaluation.report import EvaluationReport, environment
    from ahn.models import prompts

    prompting = dataclasses.replace(prompting, chat=prompts.has_chat(loaded.tokenizer) if chat is None else chat)
    found: dict[str, Any] = {}
    if sets:
        found["benchmarks"] = _ask(run, loaded, sets, prompting)
        print_by_arms(output(), run.arms, partial(run_tables.scores, found["benchmarks"]))
    if harness_tasks:
        found["harness"] = _evaluate(run, loaded, harness_tasks, prompting)
        print_by_arms(output(), run.arms, partial(run_tables.harness, found["harness"]))
    if run.out is not None:
        report = EvaluationReport("run", run.settings, found, environment(loaded.model, run.settings["seed"]))
        figures = {"scores": show.figure(found["benchmarks"])} if sets else {}
        run.finish(report, show.page(report, figures.get("scores")), figures)


def _ask(run: Run, loaded: Loaded, sets: Sequence[QuestionSet], prompting: PromptRules) -> Results:
    """Our own tasks in every arm."""
    from ahn.evaluation.benchmarks.runner import BenchmarkRunner, run_benchmarks
    from ahn.evaluation.benchmarks.summary import results

    runner = BenchmarkRunner(loaded.model, loaded.tokenizer, run.arms, prompting)
    with notes().status("Counting tokens ..."):
        lengths = runner.lengths(sets)
    total = len(run.arms) * sum(sum(counts) for counts in lengths.values())
    with run.working(), work_bar(notes(), total, "tokens", "read") as progress:
        records = run_benchmarks(
            runner, sets, lengths, run.journal, progress, None if run.out is None else run.out / PREDICTIONS
        )
    return results(records, run.arms, prompting.scoring)


def _evaluate(run: Run, loaded: Loaded, tasks: Sequence[Any], prompting: PromptRules) -> list[dict[str, Any]]:
    """Tasks of lm-evaluation-harness in every arm."""
    from ahn.evaluation.harness.model import HarnessModel
    from ahn.evaluation.harness.run import evaluate

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
