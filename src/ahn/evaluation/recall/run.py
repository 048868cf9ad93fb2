"""Every arm reads every context once and answers its questions on copies of what it then knows."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from ahn import prompts
from ahn.evaluation.arms import arm_reader
from ahn.evaluation.recall.items import Asked, Item, Target
from ahn.evaluation.recall.plan import Place, Plan
from ahn.evaluation.recall.scoring import feed, found, log_probability, rank
from ahn.reading import automatic_chunk

if TYPE_CHECKING:
    from ahn.evaluation.journal import Journal

Record = dict[str, Any]


def measure(model: Any, plan: Plan, journal: Journal, on_progress: Callable[[int], None] | None = None) -> list[Record]:
    """Reads what the journal does not hold yet.

    Args:
        model: A causal language model with a memory attached.
        plan: The contexts.
        journal: Where each arm's answers to one context are kept as soon as they are there.
        on_progress: Called with the number of tokens read, which `plan.tokens` is the sum of, after every arm.

    Returns:
        The records of all contexts and arms, in the order of the plan.
    """
    stop = prompts.stop_ids(model, plan.builder.tokenizer)
    records, done = [], 0
    for place in plan.places:
        item = None
        for arm in plan.settings.arms:
            key = f"{place.key}/{arm}"
            if key not in journal.done:
                item = item or plan.item(place)
                journal.add(key, _record(place, arm, item, _answered(model, plan, arm, item, stop)))
            records.append(journal.done[key])
            done += place.length
            if on_progress is not None:
                on_progress(done)
    return records


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
    chunk = automatic_chunk(model)
    scored = [ask for ask in item.asks if any(target.label is not None for target in ask.targets)]
    if not scored:
        return {"values": [], "answers": [], "seconds": 0.0, "cache_bytes": 0}
    reader = arm_reader(model, arm, score=False)
    feed(reader, item.context, chunk)
    seconds, cache_bytes = reader.seconds, reader.cache_bytes
    values, answers = [], []
    for ask in scored:
        ranks = _ranks(reader, ask, chunk)
        asked = reader.fork()
        feed(asked, ask.closing, chunk)
        answer = _text(plan, asked.generate(ask.limit, stop))
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
    return {"values": values, "answers": answers, "seconds": seconds, "cache_bytes": cache_bytes}


def _ranks(reader: Any, ask: Asked, chunk: int) -> dict[Target, int]:
    """The rank of each value that counts; what several of them are ranked among is read once."""
    ranks, known = {}, {}
    for closing in dict.fromkeys(target.closing for target in ask.targets):
        asked = reader.fork()
        feed(asked, closing, chunk)
        for target in ask.targets:
            if target.label is None or target.closing != closing:
                continue
            for candidate in target.candidates:
                if (closing, candidate) not in known:
                    fork = asked.fork()
                    fork.score = True
                    known[closing, candidate] = log_probability(fork, candidate, chunk)
            ranks[target] = rank([known[closing, candidate] for candidate in target.candidates])
    return ranks


def _text(plan: Plan, ids: list[int]) -> str:
    tokenizer = plan.builder.tokenizer
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
