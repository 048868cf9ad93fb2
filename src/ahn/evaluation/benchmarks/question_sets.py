"""Which records are asked, and how: all of it is checked before a model is loaded."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from ahn.evaluation.benchmarks import find
from ahn.evaluation.benchmarks.prompts import build_prompt, fill
from ahn.evaluation.benchmarks.samples import load_samples
from ahn.evaluation.benchmarks.schema import Sample, Scoring, Target
from ahn.evaluation.predictions import ANY_TEXT, Prediction

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class PromptRules:
    """How records are asked.

    Attributes:
        scoring: Whose rules.
        templates: Prompts in place of the built-in ones, by the names of tasks.
        max_tokens: Tokens of a prompt at most, without those of a chat template; the rules' own number if `None`.
        chat: Whether prompts go into the tokenizer's chat template.
    """

    scoring: Scoring = "official"
    templates: Mapping[str, str] = dataclasses.field(default_factory=dict)
    max_tokens: int | None = None
    chat: bool = False

    def prompt_ids(self, sample: Sample, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Token ids of what a model reads for a record.

        Raises:
            ConfigError: `max_tokens` leaves no room.
        """
        prompt = build_prompt(
            sample, tokenizer, self.max_tokens, scoring=self.scoring, templates=self.templates, chat=self.chat
        )
        # A chat template writes the tokens that open a text itself.
        in_chat = self.chat and sample.target.task.rules(self.scoring).chat
        ids: list[int] = tokenizer(prompt, add_special_tokens=not in_chat, verbose=False)["input_ids"]
        return ids


@dataclasses.dataclass(frozen=True)
class QuestionSet:
    """The records of a task that are asked.

    Attributes:
        target: Task and length.
        source: As for `load_samples`.
        items: How many they are.
        checksum: SHA-256 of them all, in hexadecimal.
    """

    target: Target
    source: str | None
    items: int
    checksum: str

    def samples(self) -> Iterator[Sample]:
        """The records, read again."""
        return itertools.islice(load_samples(self.target.name, self.source), self.items)


def check_sets(
    names: Sequence[str], source: str | None, prompting: PromptRules, limit: int | None = None
) -> list[QuestionSet]:
    """The sets of these names, after every record was read, put into its prompt and shown to its metric.

    Args:
        names: Of tasks, with their lengths where they have several; each counts once.
        source: As for `load_samples`.
        prompting: How they will be asked.
        limit: Records of a set at most, the first ones; all if `None`.

    Raises:
        EvaluationError: A name is unknown, records are missing or bad, which are named, or a package is missing that
            scores them.
    """
    return [_checked(find(name), source, prompting, limit) for name in dict.fromkeys(names)]


def _checked(target: Target, source: str | None, prompting: PromptRules, limit: int | None) -> QuestionSet:
    rules = target.task.rules(prompting.scoring)
    template = prompting.templates.get(target.task.name, rules.prompt)
    checksum, items = hashlib.sha256(), 0
    for sample in itertools.islice(load_samples(target.name, source), limit):
        Prediction(sample.where, target, sample.id, ANY_TEXT, sample.answers, sample.keywords).score(prompting.scoring)
        checksum.update(fill(template, sample).encode(errors="surrogatepass"))
        checksum.update(repr((sample.answers, sample.keywords, sample.options)).encode(errors="surrogatepass"))
        items += 1
    return QuestionSet(target, source, items, checksum.hexdigest())
