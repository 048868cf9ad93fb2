"""Tasks of lm-evaluation-harness: with data from the hub, made on the spot or from a folder, asked in several arms."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ahn.errors import one_line
from ahn.evaluation.errors import EvaluationError
from ahn.evaluation.libraries import library
from ahn.evaluation.records import read_records

LONGBENCH = "longbench_"
_FIELDS = ("context", "question", "answers", "all_classes", "length")
_NEEDED = ("context", "question", "answers")


def load_tasks(
    names: Sequence[str], data: str | None, metadata: Mapping[str, Any], others: Sequence[str] = (), seed: int = 0
) -> list[Any]:
    """Tasks with all their records. Those that make their data at random make the same for the same seed.

    Args:
        names: Names of tasks, groups or tags, as the harness knows them.
        data: A folder with `<task>.jsonl` for tasks `longbench_<task>`, in LongBench's own form; others do not look at
            it. The tasks' own sources if `None`.
        metadata: What tasks that make their data look at, such as `tokenizer` and `max_seq_lengths`.
        others: Further names that the caller knows, for messages.
        seed: Of the random numbers that a task makes its data from; each task begins with it.

    Returns:
        Tasks of the harness.

    Raises:
        EvaluationError: The harness is missing, does not know a name, or cannot load a task's data; a record is bad,
            which is named.
    """
    library("lm_eval", "a task of lm-evaluation-harness")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.tasks import TaskManager

    manager = TaskManager(metadata=dict(metadata))
    for name in names:
        if name not in manager.task_index:
            close = difflib.get_close_matches(name, others, n=1)
            close = close or difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f"Did you mean '{close[0]}'?" if close else "`lm_eval ls tasks` lists those of the harness."
            raise EvaluationError(f"there is no task '{name}'. {hint}")
    tasks = []
    for name in names:
        with _seeded(seed):
            tasks += _loaded(manager, name, data)
    return tasks


def checksums(tasks: Sequence[Any]) -> dict[str, str]:
    """SHA-256 of the records of each task, in hexadecimal, by its name.

    Args:
        tasks: As `load_tasks` gives them.
    """
    sums = {}
    for task in tasks:
        checksum = hashlib.sha256()
        for record in task.eval_docs:
            checksum.update(json.dumps(record, sort_keys=True, default=repr).encode(errors="surrogatepass"))
        sums[str(task.config.task)] = checksum.hexdigest()
    return sums


def evaluate(models: Mapping[str, Any], tasks: Sequence[Any], limit: int | None, chat: bool) -> list[dict[str, Any]]:
    """Asks tasks in every arm.

    Args:
        models: A `HarnessModel` for each arm, by its name.
        tasks: As `load_tasks` gives them.
        limit: Records of a task at most.
        chat: Whether contexts go into the tokenizer's chat template.

    Returns:
        A row for every metric of every task: `task`, `metric`, `items`, `scores` by arm and `errors` by arm, as the
        harness gives them; the standard error is `None` where it has none.
    """
    from lm_eval import simple_evaluate

    reports = {
        arm: simple_evaluate(
            model=model,
            tasks=list(tasks),
            limit=limit,
            apply_chat_template=chat,
            bootstrap_iters=1000,
            log_samples=False,
        )
        for arm, model in models.items()
    }
    first = next(iter(reports.values()))
    rows: list[dict[str, Any]] = []
    for task, metrics in first["results"].items():
        for metric in [name for name, value in metrics.items() if _is_score(name, value)]:
            name, _, filtered = metric.partition(",")
            by_arm = {arm: report["results"][task] for arm, report in reports.items()}
            scores = {arm: float(values[metric]) for arm, values in by_arm.items()}
            if set(scores.values()) == {-1.0}:  # RULER's mark for a length that was not asked
                continue
            errors = {arm: _number(values.get(f"{name}_stderr,{filtered}")) for arm, values in by_arm.items()}
            items = first["n-samples"][task]["effective"] if task in first.get("n-samples", {}) else None
            rows.append({"task": task, "metric": name, "items": items, "scores": scores, "errors": errors})
    return rows


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Random numbers of Python and numpy from a seed; those of the caller go on afterwards."""
    states = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _loaded(manager: Any, name: str, data: str | None) -> list[Any]:
    local = data is not None and name.startswith(LONGBENCH)
    specification = _local(manager, name, Path(str(data)).expanduser()) if local else name
    try:
        return list(manager.load([specification])["tasks"].values())
    except Exception as error:  # every task's data has errors of its own
        reason = one_line(error)[:200]
        remedy = (
            f"Download it before, or give a folder of LongBench's files with --data for {LONGBENCH}<task>"
            if name.startswith(LONGBENCH)
            else "Install or download what it needs before"
        )
        raise EvaluationError(f"{name} cannot be loaded ({type(error).__name__}: {reason}). {remedy}.") from None


def _local(manager: Any, name: str, folder: Path) -> dict[str, Any]:
    """The harness' own settings of a task, with the records of a file in place of those of the hub."""
    from lm_eval.tasks._yaml_loader import load_yaml

    file = folder / f"{name.removeprefix(LONGBENCH)}.jsonl"
    if not file.is_file():
        raise EvaluationError(f"{folder} holds no {file.name}. Give the folder with LongBench's JSONL files.")
    records = [_record(record, where) for where, record in read_records(file)]
    try:
        settings: dict[str, Any] = load_yaml(manager.task_index[name].yaml_path)
    except Exception as error:  # the settings import the task's metrics, which need packages of their own
        reason = one_line(error)[:200]
        raise EvaluationError(f"{name} cannot be loaded ({reason}). Run: pip install 'lm_eval[longbench]'") from None

    def dataset(**_: Any) -> Any:
        datasets = library("datasets", f"{name} from a folder")
        return {settings["test_split"]: datasets.Dataset.from_list(records)}

    return {**settings, "dataset_path": "json", "custom_dataset": dataset}


def _record(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A record with the names that the harness' copy of LongBench has."""
    if "question" not in record and "input" in record:
        record = {**record, "question": record["input"]}
    if missing := [name for name in _NEEDED if name not in record]:
        raise EvaluationError(f'{where}: the record has no "{missing[0]}". Correct it or leave it out.')
    return {name: record[name] for name in _FIELDS if name in record}


def _is_score(name: str, value: object) -> bool:
    return "," in name and "_stderr," not in name and isinstance(value, (int, float))


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None
