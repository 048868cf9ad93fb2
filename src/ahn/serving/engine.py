"""The engine: one thread that owns the model, reads prompts chunk by chunk and writes all answers together.

Each turn is one step of all answers and then one chunk of one prompt or document, so that no answer waits for longer
than a chunk. Between turns requests come and go.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from ahn.models import prompts
from ahn.serving.batch import Batch
from ahn.serving.errors import RequestError
from ahn.serving.metrics import Metrics
from ahn.serving.reading import PromptReading
from ahn.serving.requests import Choice, Generation, PromptJob
from ahn.serving.settings import ServeSettings
from ahn.serving.store import PrefixStore

_log = logging.getLogger("ahn.serving")
_PAUSE = 0.02  # seconds between looks at readers that are slow


class ReadingJob(Protocol):
    """Something that is read between the steps."""

    reading: PromptReading

    @property
    def is_cancelled(self) -> bool:
        """Whether nobody waits for it any more."""

    def fail(self, error: Exception) -> None:
        """Ends it with an error."""

    def noted(self, tokens: int) -> None:
        """Notes that so many tokens were read."""


class Engine:
    """Reads and writes for all sessions, see the module.

    Args:
        model: A model with a memory attached.
        tokenizer: Its tokenizer.
        store: What was read before.
        settings: How many sessions there may be, and how much each may take.
        metrics: Where it counts.
    """

    def __init__(
        self, model: Any, tokenizer: Any, store: PrefixStore, settings: ServeSettings, metrics: Metrics
    ) -> None:
        self.model, self.tokenizer, self.store, self.metrics = model, tokenizer, store, metrics
        self._settings = settings
        self._ends = prompts.stop_ids(model, tokenizer)
        self._batch = Batch(model, settings.max_sessions)
        self._waiting: deque[Generation] = deque()
        self._reading: deque[ReadingJob] = deque()
        self._choices: list[Choice] = []
        self._changed = threading.Condition()
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="ahn-engine", daemon=True)

    def start(self) -> None:
        """Begins to work."""
        self._thread.start()

    def close(self, seconds: float = 30.0) -> None:
        """Takes no more requests, finishes those that are there as far as the time allows, and stops."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join(seconds)
        for generation in [*self._waiting, *(choice.generation for choice in self._choices)]:
            generation.fail(RequestError("the server is shutting down; send the request again later", 503))
        self._thread.join(seconds)
        self.store.close()

    @property
    def is_alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Requests whose turn has not come."""
        return len(self._waiting)

    @property
    def active(self) -> int:
        """Answers that are being written."""
        return len(self._choices)

    @property
    def batch_bytes(self) -> int:
        """Bytes of the caches of all answers that are being written together."""
        return self._batch.nbytes

    def submit(self, *generations: Generation) -> None:
        """Takes in requests, all or none, whose answers will come by their streams.

        Raises:
            RequestError: Too many are waiting, or the server is shutting down.
        """
        if any(each.choices > self._settings.max_sessions for each in generations):
            raise RequestError(f"n must be at most {self._settings.max_sessions} on this server", param="n")
        with self._changed:
            self._check_room(len(self._waiting) + len(generations))
            self._waiting += generations
            self._changed.notify()

    def read(self, job: ReadingJob) -> None:
        """Takes in something to read between the steps.

        Raises:
            RequestError: Too many are waiting, or the server is shutting down.
        """
        with self._changed:
            self._check_room(1 + sum(not isinstance(each, PromptJob) for each in self._reading))
            self._reading.append(job)
            self._changed.notify()

    def _check_room(self, waiting: int) -> None:
        """Checks that so many may wait."""
        if self._is_closing:
            raise RequestError("the server is shutting down; send the request again later", 503)
        if waiting > self._settings.max_queue:
            raise RequestError("the server is busy: its queue is full; try again in a moment", 503, code="busy")

    def _run(self) -> None:
        while self._wait():
            for turn in (self._clean, self._admit, self._step, self._read):
                self._guarded(turn)

    def _guarded(self, turn: Callable[[], None]) -> None:
        """Takes a part of a turn; an error that nobody foresaw ends the answers being written, never the engine."""
        try:
            turn()
        except Exception as error:
            failure = _unforeseen(error, f"an unexpected error ends {len(self._choices)} answers")
            for choice in self._choices:
                choice.generation.fail(failure)

    def _wait(self) -> bool:
        """Waits for work; false when there will be none."""
        with self._changed:
            while not (self._waiting or self._reading or self._choices):
                if self._is_closing:
                    return False
                self._changed.wait()
            if not self._reading and self._choices and all(choice.is_waiting for choice in self._choices):
                self._changed.wait(_PAUSE)
            return True

    def _clean(self) -> None:
        """Lets go of requests that nobody waits for, and ends those that take too long."""
        jobs = [job.generation for job in self._reading if isinstance(job, PromptJob)]
        for generation in [*self._waiting, *jobs, *(choice.generation for choice in self._choices)]:
            if generation.is_late and not generation.cancelled:
                late = f"the request took longer than {generation.seconds:g} seconds; ask for fewer tokens"
                generation.fail(RequestError(late, 503, code="timeout"))
        with self._changed:
            self._waiting = deque(each for each in self._waiting if not each.cancelled)
            jobs_left = (job for job in self._reading if not job.is_cancelled)
            # A document is read on after a restart; nobody waits for it here.
            self._reading = deque(job for job in jobs_left if isinstance(job, PromptJob) or not self._is_closing)
        for choice in [choice for choice in self._choices if choice.generation.cancelled]:
            self._choices.remove(choice)
            self._batch.take_out(choice.row, keep=False)

    def _admit(self) -> None:
        """Begins with the requests whose turn has come: as many as there are free sessions."""
        busy = len(self._choices) + sum(job.generation.choices for job in self._reading if isinstance(job, PromptJob))
        with self._changed:
            while self._waiting and busy + self._waiting[0].choices <= self._settings.max_sessions:
                generation = self._waiting.popleft()
                busy += generation.choices
                alternatives = (generation.sampling.top_logprobs or 0) if generation.echo else None
                reading = PromptReading(
                    self.model, self.store, generation.tokens, generation.root, generation.marks, alternatives
                )
                self._reading.append(PromptJob(generation, reading))

    def _step(self) -> None:
        """Writes one token of every answer that is not paused."""
        ready = [choice for choice in self._choices if not choice.is_waiting]
        going: list[tuple[Choice, int]] = []
        before = sum(choice.count for choice in ready)
        for choice in ready:
            try:
                token = choice.advance()
            except Exception as error:
                choice.generation.fail(_unforeseen(error, "writing failed"))
                continue
            if token is None:
                self._finish(choice)
            else:
                going.append((choice, token))
        self.metrics.written.inc(sum(choice.count for choice in ready) - before)
        if going:
            start = time.perf_counter()
            self._batch.step([choice.row for choice, _ in going], [token for _, token in going])
            self.metrics.step_seconds.observe(time.perf_counter() - start)

    def _finish(self, choice: Choice) -> None:
        """Keeps what an answer has read for the next question, and frees its place."""
        generation = choice.generation
        self._choices.remove(choice)
        self._batch.take_out(choice.row)
        if choice.tokens and generation.marks and choice.row.cache is not None:
            self.store.keep(generation.root, [*generation.tokens, *choice.tokens], choice.row.cache)
        if not any(other.generation is generation for other in self._choices):
            generation.stream.close()

    def _read(self) -> None:
        """Reads one chunk of what has waited longest."""
        if not self._reading:
            return
        job, size = self._next_job(), self._settings.chunk
        size = min(size, self._settings.chunk_between_steps) if self._choices else size
        try:
            tokens = job.reading.read(size) if not job.reading.is_done else 0
            self.metrics.read.inc(tokens)
            job.noted(tokens)
            self._reading.remove(job)
            if not job.reading.is_done:
                self._reading.append(job)
            elif isinstance(job, PromptJob):
                self._begin(job)
        except Exception as error:
            if job in self._reading:
                self._reading.remove(job)
            job.fail(error if isinstance(error, RequestError) else _unforeseen(error, "reading failed"))

    def _next_job(self) -> ReadingJob:
        """What is read next: prompts take turns with one document at a time, so that few caches are held."""
        documents = [job for job in self._reading if not isinstance(job, PromptJob)]
        current = min(documents, key=lambda job: not job.reading.done, default=None)
        return next(job for job in self._reading if job is current or isinstance(job, PromptJob))

    def _begin(self, job: PromptJob) -> None:
        self.metrics.first_token_seconds.observe(time.monotonic() - job.generation.begun)
        self._choices += [
            Choice(job.generation, number, row, self.tokenizer, self._ends) for number, row in enumerate(job.rows())
        ]


def _unforeseen(error: Exception, what: str) -> RequestError:
    """What is answered after an error that nobody foresaw; where it came from is in the log."""
    _log.error(what, exc_info=error)
    return RequestError(f"the server failed: {type(error).__name__}", 500)
