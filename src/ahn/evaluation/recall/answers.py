"""Every arm reads every text once and answers its questions on copies of what it then knows."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from typing import Any

import torch

from ahn.anchors.scores import oracle
from ahn.evaluation.arms import ArmReader, arm_reader
from ahn.evaluation.driver import Job, OnProgress, complete
from ahn.evaluation.journal import Journal
from ahn.evaluation.recall.items import ItemMaker, RecallItem
from ahn.evaluation.recall.tasks import Spec, Value
from ahn.models import prompts

Record = dict[str, Any]

_GROUPED = re.compile(r"(?<=\d),(?=\d{3})")


def measure(model: Any, maker: ItemMaker, journal: Journal, on_progress: OnProgress = lambda *_: None) -> list[Record]:
    """Reads what the journal does not hold yet.

    Args:
        model: A causal language model with a memory attached.
        maker: Makes the texts.
        journal: Where each arm's answers to one text are kept as soon as they are there.
        on_progress: Called with the number of tokens of `maker.tokens` that are read.

    Returns:
        The records of all texts and arms, in the order of the texts.
    """
    stop = prompts.stop_ids(model, maker.tokenizer)
    jobs = (
        Job(f"{spec.key}/{arm}", lambda _, spec=spec, arm=arm: _record(model, maker, spec, arm, stop), spec.length)  # type: ignore[misc]
        for spec in maker.specs
        for arm in maker.settings.arms
    )
    return list(complete(jobs, journal, on_progress))


def in_answer(value: str, answer: str) -> bool:
    """Whether an answer holds a value as a whole word, whatever its case; a number also as "1,234,567".

    Args:
        value: The value that is wanted.
        answer: What the model wrote.
    """
    plain = _GROUPED.sub("", answer) if value.isdecimal() else answer
    return re.search(rf"(?<!\w){re.escape(value)}(?!\w)", plain, re.IGNORECASE) is not None


def rank(scores: Sequence[float]) -> int:
    """Place of the first of several scores, from 1; others that equal it come before it.

    Args:
        scores: The higher the better; NaN is the lowest.
    """
    best, *others = (-math.inf if math.isnan(score) else score for score in scores)
    return 1 + sum(other >= best for other in others)


def _record(model: Any, maker: ItemMaker, spec: Spec, arm: str, stop: Collection[int]) -> Record:
    """What is kept of an arm and a text: enough for every table, and to look at single answers."""
    item = maker.item(spec)
    record = {name: getattr(spec, name) for name in ("task", "length", "depth", "facts", "number")} | {"arm": arm}
    record |= {name: getattr(item, name) for name in ("tokens", "window_begins", "moved", "dropped")}
    record |= {"values": [], "answers": [], "seconds": 0.0, "cache_bytes": 0}
    if item.dropped == len(item.labels):
        return record
    with oracle(item.needles):
        reader = arm_reader(model, arm, score=False)
        reader.feed(torch.tensor(_context_for(arm, item)))
        for question, values in item.questions.items():
            counted = [value for value in values if item.labels[value] is not None]
            if counted:
                ranks = _ranks(maker, reader, counted)
                answer = _after(reader, maker.closing(question)).answer(maker.tokenizer, maker.limit(values), stop)
                record["answers"].append(answer)
                record["values"] += [
                    {
                        "value": value.text,
                        "label": item.labels[value],
                        "depth": item.depths[value],
                        "found": in_answer(value.text, answer),
                        "rank": ranks[value],
                    }
                    for value in counted
                ]
    return record | {"seconds": reader.seconds, "cache_bytes": reader.cache_bytes}


def _context_for(arm: str, item: RecallItem) -> Sequence[int]:
    """What an arm is fed of a text: `tail` would read every window anew, and only the last one counts."""
    sinks, window = item.exact.sinks, item.exact.window
    if arm != "tail" or len(item.context) <= sinks + window:
        return item.context
    return (*item.context[:sinks], *item.context[-window:])


def _ranks(maker: ItemMaker, reader: ArmReader, values: Sequence[Value]) -> dict[Value, int]:
    """The rank of each value; what several of them are ranked among is read once."""
    ranks: dict[Value, int] = {}
    for question in dict.fromkeys(value.question for value in values):
        asked = _after(reader, maker.closing(question))
        candidates = {value: maker.candidates(value) for value in values if value.question == question}
        every = dict.fromkeys(ids for alike in candidates.values() for ids in alike)
        scores = {ids: -float(_after(asked, ids).nll.double().sum()) for ids in every}
        ranks |= {value: rank([scores[ids] for ids in alike]) for value, alike in candidates.items()}
    return ranks


def _after(reader: ArmReader, ids: Sequence[int]) -> ArmReader:
    """A copy of a reader that has read some tokens more."""
    fork = reader.fork()
    fork.feed(torch.tensor(ids))
    return fork
