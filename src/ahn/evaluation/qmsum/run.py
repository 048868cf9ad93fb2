"""Every arm reads a meeting once; each question is asked, and its gold answer scored, on a copy of what it knows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from ahn.attachment import attachment_of
from ahn.errors import ConfigError
from ahn.evaluation.arms import ArmReader, arm_reader
from ahn.evaluation.asking.answers import answer_text
from ahn.evaluation.metrics import METRICS
from ahn.evaluation.qmsum.meetings import Meeting, Query
from ahn.models import prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ahn.evaluation.journal import Journal

Record = dict[str, Any]
Group = Literal["evicted", "both", "window", "whole"]

GROUPS: dict[str, str] = {
    "evicted": "all evidence has left the window",
    "both": "some evidence has left the window",
    "window": "no evidence has left the window",
    "whole": "asked about the whole meeting",
}
"""Where the evidence of a question is when the first token of its answer is predicted."""

_INTRODUCTION = "Below is the transcript of a meeting.\n\n"


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question in tokens.

    Attributes:
        closing: Ids of what is read after the meeting: the question, and the start of the answer.
        answer: Ids of the gold answer.
        group: Where its evidence is.
        gold: The gold answer as text.
    """

    closing: torch.Tensor
    answer: torch.Tensor
    group: Group
    gold: str


@dataclasses.dataclass(frozen=True)
class Item:
    """A meeting in tokens.

    Attributes:
        name: Name of the meeting.
        ids: Ids of what is read once: an opening and the meeting, `[T]`.
        asked: Its questions.
    """

    name: str
    ids: torch.Tensor
    asked: tuple[Asked, ...]

    @property
    def longest(self) -> int:
        """Tokens of the meeting with its longest question and answer."""
        return self.ids.numel() + max(each.closing.numel() + each.answer.numel() for each in self.asked)

    @property
    def work(self) -> int:
        """Tokens that an arm reads: the meeting once, every question and answer."""
        return self.ids.numel() + sum(each.closing.numel() + each.answer.numel() for each in self.asked)


def item(meeting: Meeting, tokenizer: PreTrainedTokenizerBase, window: int, sinks: int, chat: bool) -> Item:
    """A meeting in tokens, its questions grouped by where their evidence is.

    Args:
        meeting: The meeting.
        tokenizer: The model's tokenizer.
        window: Tokens of the window.
        sinks: Number of sinks.
        chat: Whether it is asked in the tokenizer's chat template.
    """
    opening = torch.cat((prompts.passage(tokenizer, "x", "x", chat).opening, prompts.tokens(tokenizer, _INTRODUCTION)))
    turns = [prompts.tokens(tokenizer, turn) for turn in meeting.turns]
    starts = [opening.numel()]
    for turn in turns:
        starts.append(starts[-1] + turn.numel())
    asked = []
    for query in meeting.queries:
        question = query.question if chat else f"Question: {query.question}\nAnswer:"
        closing = prompts.passage(tokenizer, "x", question, chat).closing
        answer = prompts.tokens(tokenizer, query.answer if chat else f" {query.answer}")
        group = _group(query, starts, starts[-1] + closing.numel(), window, sinks)
        asked.append(Asked(closing, answer, group, query.answer))
    return Item(meeting.name, torch.cat([opening, *turns]), tuple(asked))


def check_positions(items: Sequence[Item], model: Any) -> None:
    """Checks that the base model itself can read these meetings.

    Args:
        items: The meetings.
        model: A model with a memory attached.

    Raises:
        ConfigError: One is longer than the model's positions.
    """
    positions = attachment_of(model).trained_context
    for each in items:
        if each.longest > positions:
            raise ConfigError(
                f"{each.name} has {each.longest:,} tokens with a question and its answer, more than the {positions:,} "
                f"positions that the model knows in full. Leave long meetings out with --max-tokens {positions}, or "
                "full out of --arms."
            )


def measure(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    arms: Sequence[str],
    journal: Journal,
    on_progress: Callable[[int], None],
    new_tokens: int = 0,
) -> list[Record]:
    """Reads what the journal does not hold yet.

    Args:
        model: A causal language model with a memory attached.
        tokenizer: Its tokenizer.
        items: The meetings.
        arms: Names of the arms.
        journal: Where a meeting's answers are kept as soon as an arm is done with it.
        on_progress: Called with the tokens read by now: first, and after every meeting.
        new_tokens: Tokens of answers that are written too; none if 0.

    Returns:
        A record for every meeting and arm.
    """
    pairs = [(each, arm, f"{each.name}/{arm}") for each in items for arm in arms]
    done = sum(each.work for each, _, key in pairs if key in journal.done)
    on_progress(done)
    for each, arm, key in pairs:
        if key not in journal.done:
            journal.add(key, _read(model, tokenizer, each, arm, new_tokens))
            done += each.work
            on_progress(done)
    return [journal.done[key] for _, _, key in pairs]


def _group(query: Query, starts: Sequence[int], answer: int, window: int, sinks: int) -> Group:
    """Where evidence is for the last token before the answer, which predicts the answer's first."""
    if not query.evidence:
        return "whole"
    first_kept = answer - window
    gone = [
        sinks <= place < first_kept
        for first, last in query.evidence
        for place in range(starts[first], starts[last + 1])
    ]
    return "evicted" if all(gone) else "both" if any(gone) else "window"


def _read(model: Any, tokenizer: PreTrainedTokenizerBase, each: Item, arm: str, new_tokens: int) -> Record:
    reader = arm_reader(model, arm, score=False)
    reader.feed(each.ids)
    answers = [_answered(model, tokenizer, reader, asked, new_tokens) for asked in each.asked]
    return {
        "meeting": each.name,
        "arm": arm,
        "tokens": each.ids.numel(),
        "seconds": reader.seconds,
        "cache_bytes": reader.cache_bytes,
        "answers": answers,
    }


def _answered(
    model: Any, tokenizer: PreTrainedTokenizerBase, reader: ArmReader, asked: Asked, new_tokens: int
) -> Record:
    """The gold answer's score and, if wanted, an answer of the model's own."""
    ready = reader.fork()
    ready.feed(asked.closing)
    scored = ready.fork()
    scored.feed(asked.answer)
    record: Record = {
        "group": asked.group,
        "tokens": asked.answer.numel(),
        "nll": float(scored.nll.double().sum()),
    }
    if new_tokens:
        text = answer_text(ready, tokenizer, new_tokens, prompts.stop_ids(model, tokenizer))
        record |= {"answer": text, "rouge_l": METRICS["longbench.rouge_l"].score(text, [asked.gold])}
    return record
