"""The ways of reading that are timed against each other, each with a cache as it is after a text of some length.

The cost of a token does not depend on the content of the text. So the keys and values of full attention are random
numbers. A bounded memory reads a text that fills its window, and then its token count is raised to the context.
"""

from __future__ import annotations

import abc
import copy
from typing import Any, cast

import torch
from transformers.cache_utils import Cache, DynamicCache

import ahn
from ahn.attachment import attachment_of
from ahn.backbone import compat
from ahn.cache import HippocampalCache, HippocampalLayer
from ahn.cache.layer_kinds import AnyLayer, layer_tensors, set_layer_tensors
from ahn.config import Mode
from ahn.evaluation.arm_names import find_arm
from ahn.generation import automatic_chunk, cache_bytes
from ahn.speed.timing import timed

FEWEST, MOST = 2, 32
"""Tokens that are decoded in a turn, after one that is not timed."""
_TURN = 0.25  # seconds that a turn takes, where that many tokens are enough: threads and caches get warm first


def bare_copy(model: Any) -> Any:
    """The base model without what is attached to it, of modules of its own that share every weight with the other."""
    base = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    ahn.detach(base)
    return base


class Baseline(abc.ABC):
    """A way of reading at one context.

    Attributes:
        cache_bytes: Bytes that its cache holds.
    """

    cache_bytes: int
    _steps = FEWEST

    def decode(self) -> float:
        """Seconds of one decoded token, the mean of those of a turn."""
        seconds = self.decode_tokens(self._steps)
        self._steps = max(FEWEST, min(MOST, round(_TURN / seconds)))
        return seconds

    @abc.abstractmethod
    def decode_tokens(self, tokens: int) -> float:
        """Seconds of one of so many decoded tokens, the mean of them."""

    @abc.abstractmethod
    def read(self, tokens: int) -> float:
        """Seconds to read this number of tokens in one forward pass, with logits of the last one only."""


class TorchBaseline(Baseline):
    """A model of transformers at one context.

    Args:
        model: The model that reads.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._ids = torch.randint(3, model.config.get_text_config().vocab_size, (1, 4096), device=model.device)

    @abc.abstractmethod
    def _placed(self) -> Cache:
        """A cache that has read the context."""

    @torch.no_grad()
    def decode_tokens(self, tokens: int) -> float:
        """See `Baseline.decode_tokens`."""
        cache = self._placed()
        self._read(cache, 1)
        return timed(lambda: self._read(cache, *[1] * tokens)) / tokens

    @torch.no_grad()
    def read(self, tokens: int) -> float:
        """See `Baseline.read`."""
        cache = self._placed()
        return timed(lambda: self._read(cache, tokens))

    def _read(self, cache: Cache, *sizes: int) -> None:
        """Reads forward passes of this number of tokens."""
        for tokens in sizes:
            arguments = {"input_ids": self._ids[:, :tokens], "use_cache": True, "logits_to_keep": 1}
            self.model(**compat.with_cache(self.model, arguments, cache))


class FullBaseline(TorchBaseline):
    """The base model with the cache of transformers.

    Args:
        model: The base model, with nothing attached.
        attached: A model with the same layers and a memory attached, which knows their sizes.
        context: Tokens read.
    """

    def __init__(self, model: Any, attached: Any, context: int) -> None:
        super().__init__(model)
        self._cache = DynamicCache(config=model.config)
        self._context = context
        for attention_layer, layer in zip(
            attachment_of(attached).layers, cast("list[AnyLayer]", self._cache.layers), strict=True
        ):
            tokens = (
                context if attention_layer.sliding_window is None else min(context, attention_layer.sliding_window - 1)
            )
            _fill(layer, attention_layer.shape, tokens, context, self.model)
        self._tensors = [layer_tensors(layer) for layer in cast("list[AnyLayer]", self._cache.layers)]
        self.cache_bytes = cache_bytes(self._cache)

    def _placed(self) -> Cache:
        # Each token makes new tensors and leaves those of before as they were.
        for layer, tensors in zip(cast("list[AnyLayer]", self._cache.layers), self._tensors, strict=True):
            set_layer_tensors(layer, tensors, self._context)
        return self._cache


class ArmBaseline(TorchBaseline):
    """A model with a memory attached, in one of the arms.

    Args:
        model: The model; window and sinks are those of its current settings.
        arm: Name of the arm, as for `ahn.evaluation.arm_names.find_arm`.
        context: Tokens read.
    """

    def __init__(self, model: Any, arm: str, context: int) -> None:
        super().__init__(model)
        kind, now = find_arm(arm), attachment_of(model).settings
        settings = kind.settings(now.window)
        with ahn.mode(model, cast(Mode, kind.method), **settings), torch.no_grad():
            self._cache = HippocampalCache(model)
            exact = self._cache.settings.sinks + self._cache.settings.window
            real = min(context, exact + 8)
            for start in range(0, real, chunk := automatic_chunk(model)):
                self._read(self._cache, min(chunk, real - start))
        for attention_layer, layer in zip(attachment_of(model).layers, self._cache.layers, strict=True):
            if isinstance(layer, HippocampalLayer):
                layer.exact.seen = context
            elif attention_layer.sliding_window is None:
                _fill(layer, attention_layer.shape, context - real, context, model)
        _settle(self._cache, real)
        self.cache_bytes = cache_bytes(self._cache)

    def _placed(self) -> Cache:
        return self._cache.fork()


def _settle(cache: HippocampalCache, read: int) -> None:
    """Fills the bank of anchors, as it is after a long text, where next to no token enters it any more."""
    for name, tensor in cache.scoreboard.stored.items() if cache.scoreboard is not None else ():
        if name.startswith("scores."):
            tensor.fill_(torch.finfo(tensor.dtype).max)
        if name.startswith("tokens."):
            tensor.copy_(torch.arange(tensor.size(1)).expand_as(tensor) % read)


def _fill(layer: AnyLayer, shape: Any, tokens: int, seen: int, model: Any) -> None:
    """Random keys and values for this number of tokens."""
    rows = (1, shape.kv_heads, tokens)
    keys, values = (
        torch.randn(*rows, size, device=model.device, dtype=model.dtype) for size in (shape.key_size, shape.value_size)
    )
    present = layer_tensors(layer)
    joined = {
        name: torch.cat((present[name], new), dim=2) if name in present else new
        for name, new in (("keys", keys), ("values", values))
    }
    set_layer_tensors(layer, joined, seen)
