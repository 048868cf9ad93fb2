"""A prompt or a document that is read chunk by chunk between the steps of those that are writing."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from ahn.cache import HippocampalCache
from ahn.generation import Reader, forward
from ahn.serving.errors import RequestError
from ahn.serving.sampling import likelihoods
from ahn.serving.store import PrefixStore
from ahn.serving.stream import TokenChoice


class PromptReading:
    """Tokens to read, from the longest part of them that was read before.

    Args:
        model: The model.
        store: What was read before.
        tokens: The tokens.
        root: The document that they follow; empty without one.
        marks: Numbers of tokens after which the cache is kept, for those that come back there.
        alternatives: How many of the likeliest tokens to give for each token of the prompt; `None` gives nothing. A
            prompt whose tokens are to be scored is read from its beginning.

    Attributes:
        done: Tokens that need no more reading.
        cached: Those of them that had been read before.
        begun: When the first of them was taken up, by `time.monotonic`.
        logits: What the model expects next, `[V]`; `None` before anything was read.
        token_choices: How likely each token was, where that was asked for.
    """

    def __init__(
        self,
        model: Any,
        store: PrefixStore,
        tokens: Sequence[int],
        root: str = "",
        marks: Sequence[int] = (),
        alternatives: int | None = None,
    ) -> None:
        self._model = model
        self._store = store
        self._tokens = tokens
        self._root = root
        self._marks = sorted({mark for mark in marks if 0 < mark <= len(tokens)})
        self._top = alternatives
        self._reader: Reader | None = None
        self.done = self.cached = 0
        self.begun = 0.0
        self.logits: torch.Tensor | None = None
        self.token_choices: list[TokenChoice] = []

    @property
    def is_done(self) -> bool:
        """Whether everything has been read."""
        return self.done == len(self._tokens)

    @property
    def cache(self) -> HippocampalCache:
        """The cache so far."""
        if self._reader is None:
            self._reader = self._begin()
        cache: Any = self._reader.cache
        return cache  # type: ignore[no-any-return]

    def read(self, most: int) -> int:
        """Reads a chunk of at most so many tokens; how many it was."""
        cache = self.cache
        stop = min(self.done + most, len(self._tokens), *(mark for mark in self._marks if mark > self.done))
        chunk = torch.tensor(self._tokens[self.done : stop])
        self._read_chunk(chunk)
        self.done = stop
        if stop in self._marks and not self._store.has(self._root, self._tokens[:stop]):
            self._store.keep(self._root, self._tokens[:stop], cache.fork())
        return int(chunk.numel())

    @torch.no_grad()
    def _read_chunk(self, chunk_T: torch.Tensor) -> None:
        if self._top is None and self._reader is not None:
            self._reader.prefill(chunk_T, chunk_T.numel())
            self.logits = self._reader.logits
            return
        logits_TV = forward(self._model, chunk_T[None].to(self._model.device), self.cache)[0]
        known = [] if self.logits is None else [self.logits[None]]
        expected_TV = torch.cat([*known, logits_TV[:-1]])
        if not known:
            self.token_choices.append(TokenChoice(int(chunk_T[0]), None, ()))
        self.token_choices += likelihoods(
            expected_TV, chunk_T[-expected_TV.size(0) :] if known else chunk_T[1:], self._top or 0
        )
        self.logits = logits_TV[-1].clone()

    def _begin(self) -> Reader:
        self.begun = time.monotonic()
        prefix = self._store.find(self._root, self._tokens) if self._top is None else None
        if prefix is None and self._root:
            raise RequestError(f"the document {self._root} has to be read again; ask again later", 409, "document")
        if prefix is not None:
            self.done = self.cached = prefix.length
        return Reader(self._model, None if prefix is None else prefix.cache, score=False)
