"""The one loop of all evaluations: what each item gives in each arm, but for what the journal holds already."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from ahn.evaluation.journal import Journal

OnProgress = Callable[..., None]
"""Is told how much is done by now and, if wanted, a remark."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One item in one arm.

    Attributes:
        key: Its name in the journal.
        measure: Does the work and gives its record; may tell how much of it is done, and a remark.
        size: How much work it is: tokens to read, or 1 for a request.
    """

    key: str
    measure: Callable[[OnProgress], Mapping[str, Any]]
    size: int = 1


def complete(jobs: Iterable[Job], journal: Journal, on_progress: OnProgress) -> Iterator[dict[str, Any]]:
    """Does the jobs that the journal lacks and adds each to it at once.

    Args:
        jobs: In the order in which they are done, the same in every run.
        journal: Where the records are kept.
        on_progress: Called with what is done by now, that of former runs included: before each job and at the end.

    Yields:
        The record of each job, as the journal gives it back.
    """
    done = 0
    for job in jobs:
        if job.key not in journal.done:
            on_progress(done)
            journal.add(job.key, job.measure(lambda part, remark="", before=done: on_progress(before + part, remark)))
        done += job.size
        yield journal.done[job.key]
    on_progress(done)
