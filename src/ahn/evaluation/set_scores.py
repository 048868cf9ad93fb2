"""From predictions to the numbers that the benchmarks report: one score per set, and averages over sets."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from ahn import __version__
from ahn.evaluation.benchmarks import BENCHMARKS
from ahn.evaluation.benchmarks.schema import Benchmark, Rules, Scoring, Target
from ahn.evaluation.metrics import METRICS, Metric
from ahn.evaluation.predictions import Prediction
from ahn.evaluation.report import package_version

_PACKAGES = ("jieba", "rouge", "rouge-score")


@dataclasses.dataclass(frozen=True)
class SetScore:
    """The score of a task, at one length where it has several.

    Attributes:
        target: Task and length.
        scoring: Whose rules.
        items: Each record's own id and its score, 0 to 1.
    """

    target: Target
    scoring: Scoring
    items: tuple[tuple[int | str, float], ...]

    @property
    def rules(self) -> Rules:
        """The rules it was scored by."""
        return self.target.task.rules(self.scoring)

    @property
    def metric(self) -> Metric:
        """What was measured."""
        return METRICS[self.rules.metric]

    @property
    def score(self) -> float:
        """Mean over the items, 0 to 100, rounded to two digits as the benchmarks do."""
        return round(100 * sum(score for _, score in self.items) / len(self.items), 2)

    @property
    def facts(self) -> dict[str, Any]:
        """What it is the score of, ready for JSON."""
        names = {"benchmark": self.target.benchmark.name, "task": self.target.task.name, "length": self.target.length}
        return {**names, "metric": self.rules.metric, "items": len(self.items)}


@dataclasses.dataclass(frozen=True)
class Average:
    """The mean over the sets of a benchmark at one length.

    Attributes:
        benchmark: The benchmark.
        length: One of its lengths, or `None`.
        sets: How many sets it is the mean of.
        of: How many sets the benchmark has at this length, for these rules.
        score: Mean of their scores, each set counting alike, rounded to two digits.
    """

    benchmark: Benchmark
    length: str | None
    sets: int
    of: int
    score: float

    @property
    def facts(self) -> dict[str, Any]:
        """What it is the mean of, ready for JSON."""
        return {"benchmark": self.benchmark.name, "length": self.length, "sets": self.sets, "of": self.of}


def score_predictions(predictions: Iterable[Prediction], scoring: Scoring = "official") -> list[SetScore]:
    """Scores of all sets that predictions belong to, in the order of the benchmarks' files.

    Args:
        predictions: As `read_predictions` gives them.
        scoring: The benchmark's own rules, or those of arXiv 2510.07318 for longbook_qa_eng and longbook_qa_chn.

    Raises:
        EvaluationError: A line cannot be scored, which is named; a set has no such rules; a package is missing.
    """
    items: dict[str, list[tuple[int | str, float]]] = {}
    targets: dict[str, Target] = {}
    for prediction in predictions:
        target = targets.setdefault(prediction.target.name, prediction.target)
        items.setdefault(target.name, []).append((prediction.id, prediction.score(scoring)))
    names = sorted(targets, key=lambda name: _order(targets[name]))
    return [SetScore(targets[name], scoring, tuple(items[name])) for name in names]


def averages(scores: Sequence[SetScore]) -> list[Average]:
    """The mean over the sets of each benchmark, for each of its lengths alone.

    Args:
        scores: As `score_predictions` gives them.
    """
    alike: dict[tuple[str, str | None], list[SetScore]] = {}
    for each in scores:
        alike.setdefault((each.target.benchmark.name, each.target.length), []).append(each)
    return [_average(group) for group in alike.values()]


def _average(alike: Sequence[SetScore]) -> Average:
    target, scoring = alike[0].target, alike[0].scoring
    every = sum(scoring == "official" or task.paper is not None for task in target.benchmark.tasks.values())
    score = round(sum(each.score for each in alike) / len(alike), 2)
    return Average(target.benchmark, target.length, len(alike), every, score)


def to_json(scores: Sequence[SetScore], files: Sequence[str], left_out: Sequence[str] = ()) -> dict[str, Any]:
    """Everything that was measured, ready for JSON.

    Args:
        scores: As `score_predictions` gives them.
        files: Where the predictions come from.
        left_out: Why files were left out.
    """
    return {
        "kind": "scores",
        "files": list(files),
        **({"left_out": list(left_out)} if left_out else {}),
        "versions": {"ahn": __version__, **{name: version for name in _PACKAGES if (version := package_version(name))}},
        "sets": [
            {
                **each.facts,
                "scoring": each.scoring,
                "score": each.score,
                "item_scores": [{"id": id, "score": score} for id, score in each.items],
            }
            for each in scores
        ],
        "averages": [{**each.facts, "score": each.score} for each in averages(scores)],
    }


def _order(target: Target) -> tuple[int, int, int]:
    """Where a set stands among all: by benchmark, length and task."""
    benchmark = target.benchmark
    length = benchmark.lengths.index(target.length) if target.length else -1
    return list(BENCHMARKS).index(benchmark.name), length, list(benchmark.tasks).index(target.task.name)
