"""What a benchmark is: names, numbers and texts, as frozen data."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Any, Literal

from ahn.evaluation.errors import EvaluationError

Language = Literal["en", "zh"]
Scoring = Literal["official", "paper"]
Truncation = Literal["halves", "middle", "left"]


@dataclasses.dataclass(frozen=True)
class Rules:
    """How a task is asked and scored.

    Attributes:
        metric: Key of `ahn.evaluation.metrics.METRICS`.
        new_tokens: Tokens that the model may write.
        prompt: Template of what the model reads.
        truncation: What is left out of a prompt that is too long, see `ahn.evaluation.benchmarks.truncation`.
        max_tokens: Length of a prompt at most; `None` leaves it to the model.
        chat: Whether the prompt goes into a chat template; not where it ends with examples to go on from.
    """

    metric: str
    new_tokens: int
    prompt: str
    truncation: Truncation = "middle"
    max_tokens: int | None = None
    chat: bool = True


@dataclasses.dataclass(frozen=True)
class Task:
    """A set of questions of one kind.

    Attributes:
        name: As the benchmark names it.
        language: Of texts and answers.
        official: The benchmark's own rules.
        paper: Those of arXiv 2510.07318 where it has its own.
        items: How many records it has, per length where there are lengths; `None` where that is not known.
        choice: Whether the answer is one of four options, which counts by its letter too.
    """

    name: str
    language: Language
    official: Rules
    paper: Rules | None = None
    items: int | None = None
    choice: bool = False

    def rules(self, scoring: Scoring = "official") -> Rules:
        """The rules of the benchmark or of the paper.

        Raises:
            EvaluationError: The paper has none for this task.
        """
        if scoring == "official":
            return self.official
        if self.paper is None:
            raise EvaluationError(f"{self.name} has no scoring of the paper's own. Score it without --scoring paper.")
        return self.paper


@dataclasses.dataclass(frozen=True)
class Fields:
    """Names of the fields of a benchmark's records; `None` for what its records do not have.

    Attributes:
        context: The long text.
        question: What is asked about it.
        answers: One or a list.
        keywords: Those of the answer.
        options: To choose from.
        question_in_copies: What some copies of the benchmark call the question.
    """

    context: str
    question: str
    answers: str
    keywords: str | None = None
    options: str | None = None
    question_in_copies: str | None = None

    @property
    def required(self) -> tuple[str, ...]:
        """Fields that a record must have."""
        return self.context, self.question, self.answers


@dataclasses.dataclass(frozen=True)
class Hub:
    """Where the `datasets` library finds a benchmark; `{set}` stands for a task's name with its length.

    Attributes:
        id: Name of the dataset.
        split: Name of the split.
        config: Name of the configuration, or `None` for the only one.
        file: The file of the dataset to read, or `None` to leave that to the dataset.
        answers_as_text: Whether all fields are read as text, because their types differ from task to task.
    """

    id: str
    split: str
    config: str | None = None
    file: str | None = None
    answers_as_text: bool = False


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A benchmark.

    Attributes:
        name: In files and commands.
        title: For people.
        tasks: By their names.
        hub: Where to load it from.
        fields: Names of the fields of its records.
        lengths: What the names of its files end with ("16k"), where each task comes in several lengths.
    """

    name: str
    title: str
    tasks: Mapping[str, Task]
    hub: Hub
    fields: Fields
    lengths: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Target:
    """A task of a benchmark, at one length where it has several.

    Attributes:
        benchmark: The benchmark.
        task: The task.
        length: One of the benchmark's lengths, or `None` where it has none or none was named.
    """

    benchmark: Benchmark
    task: Task
    length: str | None = None

    @property
    def name(self) -> str:
        """Name of the set, as its file has it: "cmrc_mixup_16k", "passkey"."""
        return self.task.name if self.length is None else f"{self.task.name}_{self.length}"


@dataclasses.dataclass(frozen=True)
class Sample:
    """A record of a benchmark.

    Attributes:
        where: Its place, for messages.
        target: What it belongs to.
        id: Its own number, or its place in the set, from 0.
        context: The long text.
        question: What is asked about it.
        answers: As the metric compares them.
        keywords: Those of the answer, where the benchmark has them.
        options: To choose from, where there are any.
    """

    where: str
    target: Target
    id: int | str
    context: str
    question: str
    answers: tuple[Any, ...]
    keywords: str | None = None
    options: tuple[str, ...] = ()


def by_name(*tasks: Task) -> Mapping[str, Task]:
    """Tasks under their names."""
    return types.MappingProxyType({task.name: task for task in tasks})
