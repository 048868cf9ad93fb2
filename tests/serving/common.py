"""What the tests of the server share: a tiny model that chats in bytes, an engine, and requests to it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("prometheus_client", reason="the server needs the extra serve")

from ahn.generation import Reader, decode
from ahn.serving.engine import Engine
from ahn.serving.metrics import Metrics
from ahn.serving.requests import Generation
from ahn.serving.sampling import Sampling
from ahn.serving.service import make_service
from ahn.serving.settings import ServeSettings
from ahn.serving.store import PrefixStore
from ahn.serving.stream import Increment
from tests.tiny import byte_tokenizer, with_memory

GREEDY = Sampling(temperature=0)


def tiny_model(**settings: Any) -> Any:
    """A tiny model with a memory, for single bytes; it ends no answer by itself."""
    model = with_memory("llama:wide", model={"vocab_size": 259}, **{"sink_positions": "bounded", **settings})
    model.generation_config.eos_token_id = 2
    return model


def ids_of(text: str) -> list[int]:
    """Tokens of a text."""
    ids: list[int] = byte_tokenizer()(text, add_special_tokens=False)["input_ids"]
    return ids


@contextmanager
def running(
    model: Any = None, folder: Path | None = None, store_bytes: int = 10**9, **settings: Any
) -> Iterator[Engine]:
    """An engine that works inside the block."""
    model = model or tiny_model()
    values = ServeSettings(**{"chunk": 16, "chunk_between_steps": 8, "max_sessions": 4, **settings})
    engine = Engine(model, byte_tokenizer(), PrefixStore(model, store_bytes, folder, 10**9), values, Metrics())
    engine.start()
    try:
        yield engine
    finally:
        engine.close()


async def take(generation: Generation) -> list[Increment]:
    """All that comes of a request."""
    return [increment async for increment in generation.stream.events()]


def answers(engine: Engine, generations: Iterable[Generation]) -> list[list[Increment]]:
    """What comes of requests that are sent at once."""

    async def all_of_them() -> list[list[Increment]]:
        sent = list(generations)
        for generation in sent:
            engine.submit(generation)
        return list(await asyncio.gather(*map(take, sent)))

    return asyncio.run(all_of_them())


def text_of_all(increments: Iterable[Increment]) -> str:
    """The text of an answer."""
    return "".join(increment.text for increment in increments)


def alone(model: Any, tokens: list[int], limit: int) -> str:
    """The greedy answer of the model by itself."""
    reader = Reader(model, score=False)
    reader.prefill(torch.tensor(tokens))
    ids = list(decode(reader, limit, {2}))
    return str(byte_tokenizer().decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


@contextmanager
def serving(folder: Path | None = None, **settings: Any) -> Iterator[Any]:
    """A server on this machine inside the block: its address, and the service behind it."""
    uvicorn = pytest.importorskip("uvicorn", reason="the server needs the extra serve")
    pytest.importorskip("fastapi", reason="the server needs the extra serve")
    from ahn.serving.app import make_app

    model = settings.pop("model", None) or tiny_model()
    values = ServeSettings(
        **{"chunk": 16, "chunk_between_steps": 8, "max_sessions": 4, "session_dir": folder, "port": 0, **settings}
    )
    service = make_service("tiny", model, byte_tokenizer(), values)
    server = uvicorn.Server(uvicorn.Config(make_app(service), port=0, log_level="error", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}", service
    finally:
        server.should_exit = True
        thread.join()
