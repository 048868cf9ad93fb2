"""Every arm reads every context once and answers its questions on copies of what it then knows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ahn.evaluation.arms import ArmReader, arm_reader
from ahn.evaluation.controls import CONTROLS, Oracle
from ahn.evaluation.recall.items import Asked, Item, Target
from ahn.evaluation.recall.plan import Place, Plan
from ahn.evaluation.recall.scoring import found, log_probability, rank
from ahn.models import prompts

if TYPE_CHECKING:
    from ahn.evaluation.journal import Journal

Record = dict[str, Any]


def measure(model: Any, plan: Plan, journal: Journal, on_progress: Callable[[int], None] | None = None) -> list[Record]:
    """Reads what the journal does not hold yet.

    Args:
        model: A causal language model with a memory attached.
        plan: The contexts.
        journal: Where each arm's answers to one context are kept as soon as they are there.
        on_progress: Called with the number of tokens of `plan.tokens` that are read: at the start, and after every arm.

    Returns:
        The records of all contexts and arms, in the order of the plan.
    """
    stop = prompts.stop_ids(model, plan.builder.tokenizer)
    show = on_progress or (lambda tokens: None)
    pairs = [(place, arm) for place in plan.places for arm in plan.settings.arms]
    done = sum(place.length for place, arm in pairs if _key(place, arm) in journal.done)
    show(done)
    made: dict[str, Item] = {}  # the last one, for the arms that are still to read it
    for place, arm in pairs:
        if _key(place, arm) not in journal.done:
            made = made if place.key in made else {place.key: plan.item(place)}
            item = made[place.key]
            journal.add(_key(place, arm), _record(place, arm, item, _answered(model, plan, arm, item, stop)))
            done += place.length
            show(done)
    return [journal.done[_key(place, arm)] for place, arm in pairs]


def _key(place: Place, arm: str) -> str:
    return f"{place.key}/{arm}"


def _record(place: Place, arm: str, item: Item, values: Record) -> Record:
    """What is kept of an arm and a context: enough for every table, and to look at single answers."""
    return {
        "task": place.task,
        "length": place.length,
        "depth": place.depth,
        "facts": place.facts,
        "number": place.number,
        "arm": arm,
        "tokens": item.tokens,
        "window_begins": item.window_begins,
        "moved": item.moved,
        "dropped": item.dropped,
        **values,
    }


def _answered(model: Any, plan: Plan, arm: str, item: Item, stop: Collection[int]) -> Record:
    """Reads a context and asks its questions."""
    scored = [ask for ask in item.asks if any(target.label is not None for target in ask.targets)]
    if not scored:
        return {"values": [], "answers": [], "seconds": 0.0, "cache_bytes": 0}
    controls = {**CONTROLS, Oracle.name: Oracle(item.needles)}
    reader = arm_reader(model, arm, score=False, controls=controls)
    reader.feed(torch.tensor(_read_by(arm, item)))
    return _asked(plan, reader, scored, stop)


def _asked(plan: Plan, reader: ArmReader, scored: Sequence[Asked], stop: Collection[int]) -> Record:
    """Asks what counts of a reader that has read the context."""
    values, answers = [], []
    for ask in scored:
        ranks = _ranks(reader, ask)
        answer = _after(reader, ask.closing).answer(plan.builder.tokenizer, ask.limit, stop)
        values += [
            {
                "value": target.value,
                "label": target.label,
                "depth": target.depth,
                "found": found(target.value, answer),
                "rank": ranks[target],
            }
            for target in ask.targets
            if target.label is not None
        ]
        answers.append(answer)
    return {"values": values, "answers": answers, "seconds": reader.seconds, "cache_bytes": reader.cache_bytes}


def _read_by(arm: str, item: Item) -> Sequence[int]:
    """What an arm is fed of a context: `tail` would read every window anew, and only the last one counts."""
    sinks, window = item.exact.sinks, item.exact.window
    if arm != "tail" or len(item.context) <= sinks + window:
        return item.context
    return (*item.context[:sinks], *item.context[-window:])


def _ranks(reader: ArmReader, ask: Asked) -> dict[Target, int]:
    """The rank of each value that counts; what several of them are ranked among is read once."""
    ranks: dict[Target, int] = {}
    counting = [target for target in ask.targets if target.label is not None]
    for closing in dict.fromkeys(target.closing for target in counting):
        asked = _after(reader, closing)
        alike = [target for target in counting if target.closing == closing]
        candidates = dict.fromkeys(candidate for target in alike for candidate in target.candidates)
        scores = {candidate: log_probability(asked, candidate) for candidate in candidates}
        ranks |= {target: rank([scores[candidate] for candidate in target.candidates]) for target in alike}
    return ranks


def _after(reader: ArmReader, closing: Sequence[int]) -> ArmReader:
    """A copy of the reader that has read a question too."""
    asked = reader.fork()
    asked.feed(torch.tensor(closing))
    return asked
