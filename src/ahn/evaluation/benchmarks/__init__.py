"""The public benchmarks, one file of data each, and how a name finds its task.

A new benchmark is one file with a `Benchmark` and one line in `BENCHMARKS`.
"""

from __future__ import annotations

import difflib
import re

from ahn.evaluation.benchmarks.infinitebench import INFINITEBENCH
from ahn.evaluation.benchmarks.longbench import LONGBENCH
from ahn.evaluation.benchmarks.lveval import LVEVAL
from ahn.evaluation.benchmarks.schema import Target
from ahn.evaluation.errors import EvaluationError

__all__ = ["BENCHMARKS", "find", "find_in_file_name"]

BENCHMARKS = {benchmark.name: benchmark for benchmark in (LVEVAL, INFINITEBENCH, LONGBENCH)}
_LENGTH = re.compile(r"(.+)_(\d+k)")
# What scripts put around the name of a task: `preds_passkey_0-20.jsonl`, `infinitebench_longbook_qa_eng.jsonl`.
_WRAPPED = re.compile(rf"(?:preds?_|(?:{'|'.join(BENCHMARKS)})_)*(.+?)(?:_\d+-\d+)?")


def find(name: str) -> Target:
    """The task of a name, which may end with a length: "passkey", "cmrc_mixup_16k".

    Args:
        name: As the benchmarks write it.

    Raises:
        EvaluationError: No benchmark has such a task, or not at this length.
    """
    split = _LENGTH.fullmatch(name)
    stem, length = (split[1], split[2]) if split else (name, None)
    for benchmark in BENCHMARKS.values():
        if (task := benchmark.tasks.get(stem)) is None:
            continue
        if length is not None and length not in benchmark.lengths:
            known = f"its lengths are {', '.join(benchmark.lengths)}" if benchmark.lengths else "it has no lengths"
            raise EvaluationError(f"{stem} has no length {length}: {known}. Correct the name.")
        return Target(benchmark, task, length)
    names = [each for benchmark in BENCHMARKS.values() for each in benchmark.tasks]
    if close := difflib.get_close_matches(stem, names, n=1):
        raise EvaluationError(f"there is no task '{name}'. Did you mean '{close[0]}'?")
    known = "; ".join(f"{each.title} has {', '.join(each.tasks)}" for each in BENCHMARKS.values())
    raise EvaluationError(f"there is no task '{name}'. {known}.")


def find_in_file_name(name: str) -> Target | None:
    """The task that a file's name tells, or `None` if it tells none.

    Args:
        name: Without the folder; what follows its first dot does not count.
    """
    wrapped = _WRAPPED.fullmatch(name.split(".")[0])
    try:
        return find(wrapped[1]) if wrapped else None
    except EvaluationError:
        return None
