"""What all routes share: the engine, what it serves, and requests on their way to it and back."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ahn.attachment import attachment_of
from ahn.models.text import opening_of, text_tokens
from ahn.serving.documents import DocumentShelf
from ahn.serving.engine import Engine
from ahn.serving.errors import RequestError
from ahn.serving.keys import model_key
from ahn.serving.metrics import Metrics
from ahn.serving.requests import Generation
from ahn.serving.sampling import Sampling
from ahn.serving.schema import SamplingOptions
from ahn.serving.settings import ServeSettings
from ahn.serving.store import PrefixStore
from ahn.serving.stream import Increment

_LOOK = 0.5  # seconds between looks whether the client is still there


@dataclass
class Service:
    """A model that is served.

    Attributes:
        name: Its name.
        engine: What reads and writes.
        shelf: The documents.
        settings: What it may take.
        metrics: What it counts.
        started: When it began, in seconds of the epoch.
    """

    name: str
    engine: Engine
    shelf: DocumentShelf
    settings: ServeSettings
    metrics: Metrics
    started: int = field(default_factory=lambda: int(time.time()))

    def check_model(self, name: str) -> None:
        """Checks the model that a request names.

        Raises:
            RequestError: It is another one.
        """
        if name != self.name:
            raise RequestError(
                f"the model {name!r} is not served here, but {self.name!r} is", 404, "model", "model_not_found"
            )

    def document_tokens(self, root: str) -> int:
        """Tokens of a document that a request is about; 0 without one.

        Raises:
            RequestError: There is no such document, or it has not been read yet.
        """
        return self.shelf.ready(root).tokens if root else 0

    def generation(self, options: SamplingOptions, tokens: list[int], **more: Any) -> Generation:
        """A request for the engine.

        Raises:
            RequestError: The prompt is empty or too long.
        """
        self._check_tokens(tokens, more["limit"])
        return Generation(tokens, stop=options.stops, choices=options.n, seconds=self.settings.max_seconds, **more)

    def text_prompt(self, prompt: str | list[int], follows: bool) -> list[int]:
        """The tokens of a prompt that is a text or tokens already, and that may follow a document.

        Raises:
            RequestError: One of them is no token.
        """
        tokenizer: Any = self.engine.tokenizer
        if isinstance(prompt, str):
            return [*([] if follows else opening_of(tokenizer)), *text_tokens(prompt, tokenizer)]
        vocabulary = self.engine.model.config.get_text_config().vocab_size
        if any(not 0 <= token < vocabulary for token in prompt):
            raise RequestError(f"tokens of this model are numbers from 0 to {vocabulary - 1}", param="prompt")
        return prompt

    def _check_tokens(self, tokens: list[int], limit: int) -> None:
        if not tokens:
            raise RequestError("the prompt is empty; send one token at least", param="prompt")
        most = self.settings.max_prompt_tokens
        if len(tokens) > most:
            raise RequestError(
                f"the prompt has {len(tokens):,} tokens, but this server takes {most:,}", 400, "prompt",
                "context_length_exceeded",
            )  # fmt: skip
        table = attachment_of(self.engine.model).position_limit
        if table is not None and len(tokens) + limit > table:
            raise RequestError(
                f"this model has positions for {table:,} tokens; prompt and answer have {len(tokens) + limit:,}",
                400, "max_tokens", "context_length_exceeded",
            )  # fmt: skip


def make_service(name: str, model: Any, tokenizer: Any, settings: ServeSettings) -> Service:
    """What serves a model."""
    metrics = Metrics()
    folder = None if settings.session_dir is None else settings.session_dir / model_key(model, name)
    store = PrefixStore(model, settings.session_bytes, folder, settings.disk_bytes)
    engine = Engine(model, tokenizer, store, settings, metrics)
    shelf = DocumentShelf(engine, folder, settings.max_prompt_tokens)
    return Service(name, engine, shelf, settings, metrics)


def sampling_of(options: SamplingOptions, top_logprobs: int | None) -> Sampling:
    """How the tokens of an answer are chosen."""
    return Sampling(options.temperature, options.top_p, options.seed, top_logprobs)


@contextlib.asynccontextmanager
async def sent(request: Any, engine: Engine, generations: Sequence[Generation]) -> AsyncIterator[None]:
    """Sends requests to the engine, and takes them back when the block ends or the client goes away.

    Raises:
        RequestError: The engine is busy.
    """
    watch = asyncio.create_task(_watch(request, generations))
    try:
        engine.submit(*generations)
        yield
    finally:
        for generation in generations:
            generation.cancelled = True
        watch.cancel()


async def increments_of(generations: Sequence[Generation]) -> AsyncIterator[Increment]:
    """What comes of all of them, as it comes; choices are numbered through."""
    if len(generations) == 1:
        async for increment in generations[0].stream.events():
            yield increment
        return
    waiting: asyncio.Queue[Increment | Exception | None] = asyncio.Queue(1)
    tasks = [
        asyncio.create_task(_pass_on(generation, number * generation.choices, waiting))
        for number, generation in enumerate(generations)
    ]
    try:
        left = len(tasks)
        while left:
            event = await waiting.get()
            if isinstance(event, Exception):
                raise event
            if event is None:
                left -= 1
            else:
                yield event
    finally:
        for task in tasks:
            task.cancel()


async def _pass_on(generation: Generation, first: int, to: asyncio.Queue[Increment | Exception | None]) -> None:
    try:
        async for increment in generation.stream.events():
            await to.put(increment._replace(choice=first + increment.choice))
        await to.put(None)
    except RequestError as error:
        await to.put(error)


async def _watch(request: Any, generations: Sequence[Generation]) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(_LOOK)
    for generation in generations:
        generation.fail(RequestError("the client has gone", 499))
