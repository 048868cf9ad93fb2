"""Every arm reads every record's prompt and answers it; each answer is kept as soon as it is there."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ahn.attachment import attachment_of
from ahn.errors import ConfigError
from ahn.evaluation.arms import arm_reader
from ahn.evaluation.benchmarks.question_sets import PromptRules, QuestionSet
from ahn.evaluation.benchmarks.schema import Sample
from ahn.evaluation.driver import Job, OnProgress, complete
from ahn.evaluation.predictions import to_record
from ahn.models import prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ahn.evaluation.journal import Journal

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class BenchmarkRunner:
    """A model that answers records in several arms.

    Attributes:
        model: A causal language model with a memory attached.
        tokenizer: Its tokenizer.
        arms: Names of the arms.
        prompting: How records are asked.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    arms: Sequence[str]
    prompting: PromptRules

    def lengths(self, sets: Sequence[QuestionSet]) -> dict[str, list[int]]:
        """Tokens of all prompts, by the names of the sets.

        Raises:
            ConfigError: `full` is among the arms, and a prompt with its answer is longer than the model's positions.
        """
        lengths: dict[str, list[int]] = {}
        for each in sets:
            counts = lengths.setdefault(each.target.name, [])
            for sample in each.samples():
                counts.append(len(self.prompting.prompt_ids(sample, self.tokenizer)))
                if "full" in self.arms:
                    self._check_positions(sample, counts[-1])
        return lengths

    def answer(self, sample: Sample, ids: Sequence[int], arm: str) -> Record:
        """Reads a prompt in an arm and answers it.

        Returns:
            The line of a file of predictions, and what it cost: tokens read, seconds, and bytes of the cache.
        """
        reader = arm_reader(self.model, arm, score=False)
        reader.prefill(torch.tensor(ids))
        rules = sample.target.task.rules(self.prompting.scoring)
        stop = prompts.stop_ids(self.model, self.tokenizer)
        text = reader.answer(self.tokenizer, rules.new_tokens, stop)
        cost = {"tokens": len(ids), "seconds": reader.seconds, "cache_bytes": reader.cache_bytes}
        return {**to_record(sample, text), "arm": arm, **cost}

    def run(
        self,
        sets: Sequence[QuestionSet],
        lengths: dict[str, list[int]],
        journal: Journal,
        on_progress: OnProgress,
        folder: Path | None = None,
    ) -> list[Record]:
        """Asks what the journal does not hold yet.

        Args:
            sets: The sets to ask.
            lengths: Tokens of their prompts, as `lengths` gives them.
            journal: Where every answer is kept at once.
            on_progress: Called with the tokens of all prompts that are answered by now.
            folder: Where a file of predictions is kept for every arm, for `ahn eval score`; none if `None`.

        Returns:
            The answers of all records, one for each arm, in the order of the sets.
        """
        records, files = [], PredictionFiles(folder)
        for record in complete(self._jobs(sets, lengths), journal, on_progress):
            files.add(record)
            records.append(record)
        return records

    def _jobs(self, sets: Sequence[QuestionSet], lengths: dict[str, list[int]]) -> Iterator[Job]:
        for each in sets:
            name = each.target.name
            for number, sample in enumerate(each.samples()):
                ids = functools.cache(functools.partial(self.prompting.prompt_ids, sample, self.tokenizer))
                for arm in self.arms:

                    def measure(_: OnProgress, sample: Sample = sample, arm: str = arm, ids: Any = ids) -> Record:
                        return self.answer(sample, ids(), arm)

                    yield Job(f"{name}/{number}/{arm}", measure, lengths[name][number])

    def _check_positions(self, sample: Sample, tokens: int) -> None:
        new_tokens = sample.target.task.rules(self.prompting.scoring).new_tokens
        positions = attachment_of(self.model).trained_context
        excess = tokens + new_tokens - positions
        if excess <= 0:
            return
        room = (tokens if self.prompting.max_tokens is None else self.prompting.max_tokens) - excess
        shorter = f"Truncate prompts with --max-tokens {room}, or leave" if room > 1 else "Leave"
        raise ConfigError(
            f"{sample.where}: the prompt has {tokens:,} tokens and its answer up to {new_tokens:,}, more than the "
            f"{positions:,} positions that the model knows in full. {shorter} full out of --arms."
        )


class PredictionFiles:
    """A file of predictions for each arm, written anew, a line at a time.

    Args:
        folder: Where they go; made if it is not there. Nothing is written if it is `None`.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._begun: set[str] = set()

    def add(self, record: Record) -> None:
        """Writes a prediction into the file of its arm.

        Args:
            record: As `BenchmarkRunner.answer` gives it.
        """
        if self._folder is None:
            return
        arm = record["arm"]
        self._folder.mkdir(parents=True, exist_ok=True)
        line = {name: value for name, value in record.items() if name != "arm"}
        with (self._folder / f"{arm}.jsonl").open("a" if arm in self._begun else "w", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._begun.add(arm)
