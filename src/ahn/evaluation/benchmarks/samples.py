"""The records of a benchmark: from a folder of JSONL files, or through the `datasets` library."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ahn.errors import one_line
from ahn.evaluation.benchmarks import find
from ahn.evaluation.benchmarks.schema import Fields, Hub, Sample, Target
from ahn.evaluation.errors import AnswerError, EvaluationError
from ahn.evaluation.libraries import library
from ahn.evaluation.metrics.choices import with_letter
from ahn.evaluation.records import Record, read_records


def load_samples(name: str, source: str | None = None) -> Iterator[Sample]:
    """The records of a set.

    Args:
        name: Of the task, with its length where it has several: "passkey", "cmrc_mixup_16k".
        source: A folder that holds `<name>.jsonl`, or the id of a dataset on the hub of the same form as the
            benchmark's own, which is the default.

    Raises:
        EvaluationError: There is no such task, folder, file or dataset; a record is bad, which is named.
    """
    target = find(name)
    benchmark, hub, fields = target.benchmark, target.benchmark.hub, target.benchmark.fields
    if benchmark.lengths and target.length is None:
        known = ", ".join(f"{name}_{length}" for length in benchmark.lengths)
        raise EvaluationError(f"{name} has several lengths. Name one: {known}.")
    records = _hub_records(hub, hub.id, target, fields) if source is None else _records(source, hub, target, fields)
    return (_sample(record, fields, target, where, number) for number, (where, record) in enumerate(records))


def _records(source: str, hub: Hub, target: Target, fields: Fields) -> Iterable[tuple[str, Record]]:
    folder = Path(source).expanduser()
    if folder.is_dir():
        file = folder / f"{target.name}.jsonl"
        if not file.is_file():
            raise EvaluationError(f"{source} holds no {file.name}. Give the folder with the benchmark's JSONL files.")
        return read_records(file)
    if folder.exists():
        raise EvaluationError(f"{source} is a file. Give the folder with {target.name}.jsonl.")
    if source.count("/") != 1 or source.startswith((".", "~", "/")):
        raise EvaluationError(f"there is no folder {source}. Give one with {target.name}.jsonl or a hub id.")
    return _hub_records(hub, source, target, fields)


def _hub_records(hub: Hub, dataset: str, target: Target, fields: Fields) -> Iterable[tuple[str, Record]]:
    datasets = library("datasets", f"loading {dataset}")
    split = hub.split.format(set=target.name)
    options: dict[str, Any] = {}
    if hub.config is not None:
        options["name"] = hub.config.format(set=target.name)
    if hub.file is not None:
        options["data_files"] = {split: hub.file.format(set=target.name)}
    if hub.answers_as_text:
        options["features"] = _features(datasets, fields)
    try:
        rows = datasets.load_dataset(dataset, split=split, **options)
    except Exception as error:  # the hub's client and every file format have errors of their own
        reason = one_line(error)[:200]
        raise EvaluationError(
            f"{dataset}: {target.name} cannot be loaded ({type(error).__name__}: {reason}). "
            "Download it and give the folder of its JSONL files."
        ) from None
    return ((f"{dataset}, {target.name}, record {number}", row) for number, row in enumerate(rows))


def _features(datasets: Any, fields: Fields) -> Any:
    """Types of a record's fields. Numbers are read as text, or one with a decimal point would change the others."""
    text = datasets.Value("string")
    known = {"id": datasets.Value("int64"), fields.context: text, fields.question: text}
    return datasets.Features({**known, **dict.fromkeys((fields.answers, fields.options), datasets.Sequence(text))})


def _sample(record: Record, fields: Fields, target: Target, where: str, number: int) -> Sample:
    copied = fields.question_in_copies
    if copied is not None and copied in record and fields.question not in record:
        record = {**record, fields.question: record[copied]}
    if missing := [name for name in fields.required if name not in record]:
        named = " and no ".join(f'"{name}"' for name in missing)
        raise EvaluationError(f"{where}: the record has no {named}. Correct it or leave it out.")
    options, own = _options(record, fields, where), record.get("id")
    return Sample(
        where=where,
        target=target,
        id=own if isinstance(own, int | str) else number,
        context=_text(record, fields.context, where),
        question=_text(record, fields.question, where),
        answers=answers_of(record[fields.answers], options, target, where),
        keywords=_text(record, key, where) if (key := fields.keywords) and record.get(key) is not None else None,
        options=options,
    )


def answers_of(value: Any, options: Any, target: Target, where: str) -> tuple[Any, ...]:
    """The answers of a record, or its only one; of a choice, the right one of the options with its letter.

    Raises:
        EvaluationError: The answer is none of the options.
    """
    answers = value if isinstance(value, list) else [value]
    if not (target.task.choice and isinstance(options, list | tuple)):
        return tuple(answers)
    try:
        return tuple(with_letter(answers, options))
    except AnswerError as error:
        raise EvaluationError(f"{where}: {error}") from None


def _text(record: Record, name: str, where: str) -> str:
    value = record[name]
    if not isinstance(value, str):
        raise EvaluationError(f'{where}: "{name}" is no text, but {type(value).__name__}. Correct it.')
    return value


def _options(record: Record, fields: Fields, where: str) -> tuple[str, ...]:
    options = (record.get(fields.options) if fields.options else None) or ()
    if not isinstance(options, list | tuple) or not all(isinstance(option, str) for option in options):
        raise EvaluationError(f'{where}: "{fields.options}" is no list of texts. Correct it.')
    return tuple(options)
