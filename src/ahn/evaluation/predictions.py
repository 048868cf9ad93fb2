"""Predictions in JSONL files: this library's own, and those of the benchmarks' official scripts.

`docs/evaluation.md` describes the form of a line.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from ahn.evaluation.benchmarks import find, find_in_file_name
from ahn.evaluation.benchmarks.samples import answers_of
from ahn.evaluation.benchmarks.schema import Sample, Scoring, Target
from ahn.evaluation.errors import AnswerError, EvaluationError, MissingPackageError
from ahn.evaluation.metrics import METRICS
from ahn.evaluation.records import Record, read_records

# Ours first, then what the official scripts write.
_TEXT = ("prediction", "pred")
_ANSWERS = ("answers", "answer", "ground_truth", "label")
_KEYWORDS = ("answer_keywords", "gold_ans")
ANY_TEXT = "a"
"""A prediction that shows whether a record's answers can be scored."""

Locations = dict[tuple[str, int | str], str]
"""Where the first prediction of each record stands, by its task and id."""


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a model wrote for a record, with what is needed to score it.

    Attributes:
        where: File and line.
        target: Task and length.
        id: The record's own; without one the number of the line.
        text: What the model wrote.
        answers: Those of the record.
        keywords: Those of the record, where it has any.
    """

    where: str
    target: Target
    id: int | str
    text: str
    answers: tuple[Any, ...]
    keywords: str | None = None

    def score(self, scoring: Scoring = "official") -> float:
        """Its score, 0 to 1.

        Raises:
            EvaluationError: It cannot be scored, which names its place, or a package is missing.
        """
        metric = METRICS[self.target.task.rules(scoring).metric]
        try:
            return metric.score(self.text, self.answers, self.keywords)
        except AnswerError as error:
            raise EvaluationError(f"{self.where}: {error}") from None


def to_record(sample: Sample, text: str) -> dict[str, Any]:
    """A line of a file of predictions, ready for JSON."""
    record = {
        "benchmark": sample.target.benchmark.name,
        "task": sample.target.name,
        "id": sample.id,
        "prediction": text,
        "answers": list(sample.answers),
    }
    return record if sample.keywords is None else {**record, "answer_keywords": sample.keywords}


def from_record(record: Record) -> Prediction:
    """The prediction in a line that `to_record` gave; the line may hold more."""
    where = f"{record['task']}, record {record['id']}"
    return _prediction(record, where, find(record["task"]), 0)


def read_predictions(
    paths: Iterable[str], task: str | None = None, on_left_out: Callable[[str], None] | None = None
) -> Iterator[Prediction]:
    """All predictions in several files.

    Args:
        paths: JSONL files, and folders of them.
        task: Name of the task of lines that name none themselves; the file's name tells it if left out.
        on_left_out: Is told why a file of a folder is left out, which is then no error; a file that is named itself
            must be good.

    Raises:
        EvaluationError: A file is missing, empty or of an unknown task; a line is bad, or a second prediction of the
            same record. Files and lines are named.
    """
    named = None if task is None else find(task)
    first: dict[tuple[str, int | str], str] = {}
    for name in paths:
        path = Path(name).expanduser()
        if path.is_dir():
            yield from _in_folder(name, path, named, first, on_left_out)
        elif path.exists():
            yield from _in_file(path, named, first)
        else:
            raise EvaluationError(f"{name} does not exist. Check the path.")


def _in_folder(
    name: str, folder: Path, named: Target | None, first: Locations, on_left_out: Callable[[str], None] | None
) -> Iterator[Prediction]:
    """The predictions of all files of a folder, or of the good ones."""
    files, good = sorted(folder.glob("*.jsonl")), 0
    if not files:
        raise EvaluationError(f"{name} holds no .jsonl file. Give files of predictions or a folder of them.")
    for file in files:
        known = dict(first)
        try:
            predictions = list(_in_file(file, named, known))
            for each in predictions if on_left_out else ():
                dataclasses.replace(each, text=ANY_TEXT).score()
        except EvaluationError as error:
            if on_left_out is None or isinstance(error, MissingPackageError):
                raise
            on_left_out(str(error))
            continue
        first |= known
        good += 1
        yield from predictions
    if not good:
        raise EvaluationError(f"{name} holds no file that can be scored. Give files of predictions.")


def _in_file(file: Path, named: Target | None, first: Locations) -> Iterator[Prediction]:
    """The predictions of a file; where each record stands first is noted once all of them are good."""
    default = named or find_in_file_name(file.name)
    own: Locations = {}
    for number, (where, record) in enumerate(read_records(file), start=1):
        prediction = _prediction(record, where, _target(record, where, default, named), number)
        key = prediction.target.name, prediction.id
        if key in first:
            name = f"{prediction.target.name} {prediction.id}"
            raise EvaluationError(f"{where}: {name} is in {first[key]} too. Score the files of one model at a time.")
        own.setdefault(key, where)
        yield prediction
    first |= own


def _target(record: Record, where: str, default: Target | None, named: Target | None) -> Target:
    """The task that a line names, or else the default."""
    if "task" not in record:
        if default is None:
            raise EvaluationError(
                f"{where}: neither the line nor the file's name tells the task. Name it, for example with "
                "--task passkey or --task cmrc_mixup_16k."
            )
        return default
    try:
        target = find(str(record["task"]))
    except EvaluationError as error:
        raise EvaluationError(f"{where}: {error}") from None
    if named is not None and named != target:
        raise EvaluationError(f"{where}: the line is of {target.name}, not of {named.name}. Leave --task out.")
    if record.get("benchmark", target.benchmark.name) != target.benchmark.name:
        raise EvaluationError(f"{where}: {target.name} belongs to {target.benchmark.name}. Correct the benchmark.")
    return target


def _prediction(record: Record, where: str, target: Target, number: int) -> Prediction:
    text, answers = _field(record, _TEXT, where), _field(record, _ANSWERS, where)
    if not isinstance(text, str):
        raise EvaluationError(f"{where}: the prediction is no text, but {type(text).__name__}. Correct it.")
    keywords = next((record[name] for name in _KEYWORDS if record.get(name) is not None), None)
    if not isinstance(keywords, str | None):
        raise EvaluationError(f"{where}: the keywords are no text, but {type(keywords).__name__}. Correct them.")
    answers, id = answers_of(answers, record.get("options"), target, where), record.get("id")
    return Prediction(where, target, id if isinstance(id, int | str) else number, text, answers, keywords)


def _field(record: Record, names: tuple[str, ...], where: str) -> Any:
    """The first of these fields that a line has."""
    for name in names:
        if name in record:
            return record[name]
    others = " nor ".join(f'"{name}"' for name in names[1:])
    raise EvaluationError(f'{where}: the line has neither "{names[0]}" nor {others}. Correct it or leave it out.')
