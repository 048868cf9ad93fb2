"""Reading a text of any length in chunks on one cache, and writing on from there: the one prefill and decoding loop.

Legend of shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn
from torch.nn import functional
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ahn.attachment import attachment_of, find_attachment
from ahn.backbone import compat
from ahn.backbone.survey import check_numbers
from ahn.cache import HippocampalCache
from ahn.cache.layer_kinds import layer_tensors
from ahn.errors import ConfigError, ShapeError
from ahn.models.text import GrowingText
from ahn.models.text import text_of as text_of

if TYPE_CHECKING:
    from typing_extensions import Self

_LARGEST_CHUNK = 512  # longer chunks are not faster on a CPU, and their logits grow
_LOGITS = 2**25  # elements of a chunk's logits: 134 MB in float32
_SCORED_AT_ONCE = 128  # tokens, so that scoring copies little of the logits


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a reading has come.

    Attributes:
        tokens: Tokens read so far in this reading.
        seconds: Time that the model took for them.
        cache_bytes: Bytes that the cache holds now.
        nll: Mean negative log-likelihood of the tokens scored so far, in nats; NaN while there is none.
    """

    tokens: int
    seconds: float
    cache_bytes: int
    nll: float


class Reader:
    """A text that is read part by part, and what came of it so far.

    Args:
        model: A causal language model, with a memory attached or without.
        cache: What was read before; an empty cache of the current mode if left out.
        score: Whether to score every token; without it the model computes the last logits of a chunk only.

    Attributes:
        cache: What the model keeps of the text.
        tokens: Number of tokens read by this reader.
        seconds: Time that the model took for them.
        nll: Negative log-likelihood of each token but the first, given all before it, in nats: `[T - 1]` float32 on
            the CPU, element `i` for token `i + 1`; empty if nothing was scored.
        logits: What the model expects next, `[V]`.
    """

    def __init__(self, model: nn.Module, cache: Cache | None = None, *, score: bool = True) -> None:
        self.model = model
        self.cache = new_cache(model) if cache is None else cache
        self.score = score
        self.tokens = 0
        self.seconds = 0.0
        self._logits: torch.Tensor | None = None
        self._scores = torch.zeros(0)  # the first `_scored` of them count
        self._scored = 0
        self._total = 0.0

    @torch.no_grad()
    def prefill(
        self,
        input_ids: torch.Tensor,
        chunk: int | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> None:
        """Reads on, a chunk in each forward pass. The sizes of the chunks change nothing but the speed.

        Args:
            input_ids: Token ids, `[T]` or `[1, T]`, at least one.
            chunk: Tokens per forward pass; at most 512, fewer for a very large vocabulary, if left out.
            on_progress: Called after every chunk.

        Raises:
            ShapeError: There is no token, or more than one row.
            ConfigError: The chunk is below 1.
            CacheError: The cache does not fit the model.
            ModelError: The model's logits are NaN.
        """
        ids = _one_row(input_ids)
        size = automatic_chunk(self.model) if chunk is None else chunk
        if size < 1:
            raise ConfigError(f"chunk must be at least 1, not {size}")
        weight: Any = self.model.get_input_embeddings().weight  # type: ignore[operator]
        for part in ids.to(weight.device).split(size):
            self._read_chunk(part)
            if on_progress is not None:
                on_progress(self.progress)

    def _read_chunk(self, ids_T: torch.Tensor) -> None:
        """Reads tokens in one forward pass."""
        start = time.perf_counter()
        last_only = not self.score and "logits_to_keep" in inspect.signature(self.model.forward).parameters
        logits = forward(self.model, self._rows(ids_T), self.cache, **({"logits_to_keep": 1} if last_only else {}))[0]
        check_numbers(logits[-1])
        if self.score:
            self._note(logits, ids_T)
        self._logits = logits[-1].clone()
        if ids_T.is_cuda:
            torch.cuda.synchronize(ids_T.device)
        self.seconds += time.perf_counter() - start
        self.tokens += ids_T.numel()

    def _rows(self, ids_T: torch.Tensor) -> torch.Tensor:
        """What the model is given of a chunk, `[B, T]`; the first row is scored."""
        return ids_T[None]

    def fork(self) -> Self:
        """An independent reader that goes on from here, on a copy of the cache, and scores what it reads from here on.

        Raises:
            ShapeError: Nothing has been read.
        """
        twin = copy.copy(self)
        twin.cache = self.cache.fork() if isinstance(self.cache, HippocampalCache) else copy.deepcopy(self.cache)
        twin.score, twin.tokens, twin.seconds = True, 0, 0.0
        twin._logits = self.logits.clone()
        twin._scores, twin._scored, twin._total = torch.zeros(0), 0, 0.0
        return twin

    @property
    def nll(self) -> torch.Tensor:
        """See the class."""
        return self._scores[: self._scored].clone()

    @property
    def progress(self) -> Progress:
        """How far it has come."""
        mean = self._total / self._scored if self._scored else math.nan
        return Progress(self.tokens, self.seconds, cache_bytes(self.cache), mean)

    @property
    def logits(self) -> torch.Tensor:
        """See the class.

        Raises:
            ShapeError: Nothing has been read.
        """
        if self._logits is None:
            raise ShapeError("nothing has been read yet; read at least one token first")
        return self._logits

    def _note(self, logits_TV: torch.Tensor, ids_T: torch.Tensor) -> None:
        """Scores a chunk: its first token from the last logits of the chunk before."""
        parts = [] if self._logits is None else [_nll(self._logits[None], ids_T[:1])]
        scored = torch.cat([*parts, _nll(logits_TV[:-1], ids_T[1:])]).cpu()
        self._keep(scored)
        self._total += float(scored.double().sum())

    def _keep(self, scored_T: torch.Tensor) -> None:
        """Keeps scores in one tensor: small ones kept between a chunk's logits would pin the heap around them."""
        end = self._scored + scored_T.numel()
        if end > self._scores.numel():
            grown = torch.empty(max(end, 2 * self._scores.numel()))
            grown[: self._scored] = self._scores[: self._scored]
            self._scores = grown
        self._scores[self._scored : end] = scored_T
        self._scored = end


def read(
    model: nn.Module,
    input_ids: torch.Tensor,
    *,
    cache: Cache | None = None,
    chunk: int | None = None,
    score: bool = True,
    on_progress: Callable[[Progress], None] | None = None,
) -> Reader:
    """Reads a text of any length on one cache, in the mode that is current or that the cache was made in.

    Only the logits of one chunk exist at a time. The sizes of the chunks change nothing but the speed.

    Args:
        model: A causal language model, with a memory attached or without.
        input_ids: Token ids, `[T]` or `[1, T]`.
        cache: What was read before, to go on from there; it is changed. Its next token is then not scored.
        chunk: Tokens per forward pass; at most 512, fewer for a very large vocabulary, if left out.
        score: Whether to score every token, which takes the vocabulary's share of the computation.
        on_progress: Called after every chunk.

    Returns:
        What came of it: the scores, the cache, and the logits of the next token.

    Raises:
        ShapeError: There is no token, or more than one row.
        ConfigError: The chunk is below 1.
        CacheError: The cache does not fit the model.
    """
    reader = Reader(model, cache, score=score)
    reader.prefill(input_ids, chunk, on_progress)
    return reader


class Decoder(Protocol):
    """What `decode` goes on from, such as a `Reader` that has read something.

    Attributes:
        logits: What the model expects next, `[V]`.
    """

    @property
    def logits(self) -> torch.Tensor:
        """See the class."""

    def prefill(self, input_ids: torch.Tensor, /) -> None:
        """Reads tokens, `[T]`."""


def decode(
    reader: Decoder,
    limit: int,
    stop: Collection[int] = (),
    temperature: float = 0.0,
    seed: int | None = None,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float | None = None,
) -> Iterator[int]:
    """Continues what a reader has read; every token but the one that ends the answer enters its cache.

    Args:
        reader: What has been read.
        limit: Most tokens to write.
        stop: Tokens that end the answer; they are not part of it.
        temperature: 0 takes the likeliest token each time; above, tokens are drawn.
        seed: Of the random numbers; a new one each time if left out.
        top_k: Draws from so many of the likeliest tokens only.
        top_p: Draws from the likeliest tokens that have this probability together.
        repetition_penalty: Above 1, tokens that the answer has already are less likely, as in transformers.

    Yields:
        Token ids.

    Raises:
        ShapeError: Nothing has been read.
    """
    generator = torch.Generator()
    generator.seed() if seed is None else generator.manual_seed(seed)
    processors = make_processors(temperature, top_k, top_p, repetition_penalty)
    written: list[int] = []
    for _ in range(limit):
        token = next_token(reader.logits, processors, generator if temperature else None, written)
        if token in stop:
            return
        written.append(token)
        yield token
        reader.prefill(torch.tensor([token]))


def make_processors(
    temperature: float, top_k: int | None = None, top_p: float | None = None, repetition_penalty: float | None = None
) -> LogitsProcessorList:
    """What changes logits before a token is drawn, in the order of transformers; arguments as for `decode`."""
    processors = LogitsProcessorList()
    if repetition_penalty is not None and repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(float(repetition_penalty)))
    if temperature:
        processors.append(TemperatureLogitsWarper(float(temperature)))
        if top_k:
            processors.append(TopKLogitsWarper(top_k))
        if top_p is not None and top_p < 1:
            processors.append(TopPLogitsWarper(float(top_p)))
    return processors


def stream_text(tokenizer: Any, ids: Iterable[int]) -> Iterator[str]:
    """The text of tokens as it grows, in parts that join to the whole: no half characters, no lost spaces."""
    growing = GrowingText(tokenizer)
    yield from filter(None, map(growing.add, ids))
    yield growing.end()


def new_cache(model: nn.Module) -> Cache:
    """An empty cache for the current mode: transformers' own in mode "full" and for a model without a memory."""
    attachment = find_attachment(model)
    if attachment is not None and attachment.settings.mode != "full":
        return HippocampalCache(model)
    config: Any = model.config
    return DynamicCache(config=config)


def cache_bytes(cache: Cache) -> int:
    """Bytes of every tensor that a cache holds."""
    if isinstance(cache, HippocampalCache):
        return cache.nbytes
    tensors = (tensor for layer in cache.layers for tensor in layer_tensors(layer).values())  # type: ignore[arg-type]
    return sum(tensor.nbytes for tensor in tensors)


def full_cache_bytes(model: nn.Module, tokens: int) -> int:
    """Bytes that the base model's own cache would hold: keys and values of every token in every layer.

    Args:
        model: A model with a memory attached, whose layers were measured then.
        tokens: Number of tokens of one row.

    Raises:
        ModelError: No memory is attached.
    """
    total = 0
    for layer in attachment_of(model).layers:
        # A layer that slides by itself keeps the window's tokens but for the one that comes.
        cached = tokens if layer.sliding_window is None else min(tokens, layer.sliding_window - 1)
        size = layer.dtype.itemsize
        total += cached * layer.shape.kv_heads * (layer.shape.key_size + layer.shape.value_size) * size
    return total


def automatic_chunk(model: nn.Module) -> int:
    """Tokens per forward pass that keep the logits of a chunk small: 512, or fewer for a very large vocabulary."""
    config: Any = model.config
    return max(32, min(_LARGEST_CHUNK, _LOGITS // max(1, int(config.get_text_config().vocab_size))))


def forward(model: Any, ids_BT: torch.Tensor, cache: Cache, **more: Any) -> torch.Tensor:
    """Reads new tokens into a cache in one forward pass.

    Args:
        model: A causal language model.
        ids_BT: Token ids, `[B, T]`.
        cache: The cache.
        **more: Further arguments of the model.

    Returns:
        Logits of all new tokens, `[B, T, V]`, or of those that the arguments ask for.
    """
    arguments = compat.with_cache(model, {"input_ids": ids_BT, "use_cache": True, **more}, cache)
    logits: torch.Tensor = model(**arguments).logits
    return logits


def _nll(logits_TV: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of the targets, `[T]` float32, in nats."""
    pairs = zip(logits_TV.split(_SCORED_AT_ONCE), targets_T.split(_SCORED_AT_ONCE))
    parts = [functional.cross_entropy(logits.float(), targets, reduction="none") for logits, targets in pairs]
    return torch.cat(parts) if parts else logits_TV.new_zeros(0, dtype=torch.float32)


def next_token(
    logits_V: torch.Tensor,
    processors: LogitsProcessorList,
    generator: torch.Generator | None,
    written: Collection[int] = (),
) -> int:
    """The next token: drawn from what the processors leave, or the likeliest one without a generator.

    Args:
        logits_V: What the model expects, `[V]`.
        processors: As `make_processors` makes them.
        generator: Random numbers, or `None`.
        written: Tokens of the answer so far.
    """
    if processors:
        ids: Any = torch.tensor([list(written)], dtype=torch.long)
        scores: Any = logits_V.float().cpu()[None]
        logits_V = processors(ids, scores)[0]
    if generator is None:
        return int(logits_V.argmax())
    return int(torch.multinomial(torch.softmax(logits_V, dim=-1), 1, generator=generator))


def _one_row(input_ids: torch.Tensor) -> torch.Tensor:
    if input_ids.dim() == 2 and input_ids.size(0) == 1:
        input_ids = input_ids[0]
    if input_ids.dim() != 1 or input_ids.numel() == 0:
        raise ShapeError(f"input_ids must be the tokens of one text, [T] or [1, T], not {list(input_ids.shape)}")
    return input_ids
