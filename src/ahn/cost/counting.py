"""Parameters, FLOPs and cache bytes of each method of reading a text, as exact whole numbers.

Two conventions fill in what they count differently: `ahn.cost.actual` and `ahn.cost.paper`.
Legend of sizes: L tokens read, E evicted tokens, H query heads, G key/value heads, K key size, V value size.
"""

from __future__ import annotations

import abc
import copy
import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

from ahn.attachment import AttentionLayer
from ahn.cache import HippocampalLayer
from ahn.cache.compressive import POOLED, state_slots
from ahn.config import RunSettings
from ahn.cost.base import Base
from ahn.errors import ConfigError
from ahn.memories import Memory, memory_names

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one method of reading costs, for one row.

    Attributes:
        parameters: Learned numbers beside the base model's.
        mixer_flops: FLOPs of the attention layers, with all that is added to them, for the whole context.
        prefill_flops: FLOPs of the whole model for the whole context.
        token_flops: FLOPs of the whole model for one further token.
        cache_bytes: Bytes held after the context was read.
    """

    parameters: int
    mixer_flops: int
    prefill_flops: int
    token_flops: int
    cache_bytes: int


class Counting(abc.ABC):
    """Counts what reading with a base model costs: in `full`, with a `window`, with `ct`, and with each memory.

    `ct` is the Compressive Transformer of the paper's comparison. Evicted tokens are pooled 4:1 into slots that the
    queries read, first in first out. The slots fill the bytes of the state of the config's memory.

    Args:
        base: The base model, with window and sinks.

    Attributes:
        name: Name of the convention.

    Source: arXiv 2510.07318, section 4 and its tables 1, 2, 7 and 9; Compressive Transformer: arXiv 1911.05507.
    """

    name: ClassVar[str]

    def __init__(self, base: Base) -> None:
        self.base = base
        config = base.attachment.config
        self.settings = RunSettings.like(config)

    @abc.abstractmethod
    def triangle(self, tokens: int) -> int:
        """Twice the pairs of a query and a key that it may read, among this many tokens."""

    @abc.abstractmethod
    def vocabulary_flops(self, tokens: int) -> int:
        """FLOPs between hidden states and vocabulary for tokens that are read in one go."""

    @abc.abstractmethod
    def memory_flops(self, memory: Memory, tokens: int, evicted: int) -> int:
        """FLOPs of one layer's memory for the tokens read and those evicted."""

    @abc.abstractmethod
    def number_bytes(self) -> int:
        """Bytes of one number of a key or value."""

    @abc.abstractmethod
    def layer_bytes(self, layer: AttentionLayer, method: str, tokens: int) -> int:
        """Bytes that one layer holds, for each method but `ct`."""

    @abc.abstractmethod
    def summary(self) -> str:
        """What is counted, in a sentence."""

    def remarks(self) -> list[str]:
        """What must be known about this model's numbers: a sentence each."""
        return []

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the methods of reading: every memory, and that of the model where it joins several."""
        memory = self.base.attachment.config.memory
        return ("full", "window", "ct", *dict.fromkeys((*memory_names(), memory)))

    @property
    def notes(self) -> list[str]:
        """What must be known to read the numbers: a sentence each."""
        fewest, most = self.slots
        slots = f"{most:,}" if fewest == most else f"{fewest:,} to {most:,}"
        pooled = (
            f"ct: the Compressive Transformer, which pools {POOLED} evicted tokens to one of {slots} slots a layer, as "
            f"many as fill the bytes of a state of {self.base.attachment.config.memory}."
        )
        return [self.summary(), pooled, *self.remarks()]

    @property
    def slots(self) -> tuple[int, int]:
        """Fewest and most slots that a layer of the Compressive Transformer has."""
        counts = [self._slots(layer) for layer, _ in self.base.layers if layer.memory is not None]
        return min(counts), max(counts)

    def at(self, context: int) -> dict[str, Cost]:
        """What each method costs when a text of this many tokens is read.

        Args:
            context: Number of tokens, at least 1.

        Raises:
            ConfigError: There is no token, or the model has too few positions.
        """
        limit = self.base.attachment.position_limit
        if context < 1:
            raise ConfigError(f"context must be at least 1 token, not {context}")
        if limit is not None and context > limit:
            raise ConfigError(f"this model has positions for {limit} tokens only, not {context}; use a smaller context")
        return {method: self._cost(method, context) for method in self.methods}

    def with_run(self, **changes: Any) -> Self:
        """The same for runs that keep other tokens exactly.

        Anchors count in the bytes of a cache, by their keys and values, but not in FLOPs.

        Args:
            **changes: Window, sinks or anchors, by the names of `ahn.config.RunSettings`.

        Raises:
            ConfigError: A value is out of range.
        """
        other = copy.copy(self)
        other.settings = dataclasses.replace(self.settings, **changes)
        return other

    def cache_bytes(self, method: str, tokens: int) -> int:
        """Bytes held after this many tokens were read.

        Args:
            method: One of `methods`.
            tokens: Number of tokens, at least 1.
        """
        return sum(count * self.layer_bytes(layer, method, tokens) for layer, count in self.base.layers)

    def _cost(self, method: str, tokens: int) -> Cost:
        mixers, others = self._mixer_flops(method, tokens), 2 * self.base.other_weights
        return Cost(
            parameters=sum(
                count * parameters(memory)
                for layer, count in self.base.layers
                if (memory := self._memory(method, layer)) is not None
            ),
            mixer_flops=mixers,
            prefill_flops=mixers + tokens * others + self.vocabulary_flops(tokens),
            token_flops=self._mixer_flops(method, tokens + 1) - mixers + others + self.vocabulary_flops(1),
            cache_bytes=self.cache_bytes(method, tokens),
        )

    def _memory(self, method: str, layer: AttentionLayer) -> Memory | None:
        joined = method == self.base.attachment.config.memory and method not in memory_names()
        if layer.memory is None or joined:
            return layer.memory
        return self.base.memories.get((method, layer.shape))

    def _mixer_flops(self, method: str, tokens: int) -> int:
        projections = 2 * tokens * self.base.mixer_weights
        return projections + sum(
            count * self._attention_flops(method, layer, tokens) for layer, count in self.base.layers
        )

    def _attention_flops(self, method: str, layer: AttentionLayer, tokens: int) -> int:
        """FLOPs of one layer but for its projections: queries with keys, weights with values, and a memory's own."""
        reach = self.reach(method, layer)
        seen = tokens if reach is None else min(tokens, reach)
        evicted = tokens - seen
        pairs = self.triangle(seen) + 2 * evicted * seen
        if method == "ct" and layer.memory is not None:
            pairs += 2 * slots_read(evicted, self._slots(layer))
        memory = self._memory(method, layer)
        added = 0 if memory is None else self.memory_flops(memory, tokens, evicted)
        return layer.shape.query_heads * (layer.shape.key_size + layer.shape.value_size) * pairs + added

    def reach(self, method: str, layer: AttentionLayer) -> int | None:
        """How many tokens a query of a layer reads exactly at most, itself among them; `None` for all."""
        if method == "full" or layer.memory is None:
            return layer.sliding_window
        exact = HippocampalLayer(self.settings, layer.sliding_window).exact
        return exact.sinks + exact.window

    def slot_bytes(self, layer: AttentionLayer) -> int:
        """Bytes of a key and a value of every kv head."""
        return layer.shape.kv_heads * (layer.shape.key_size + layer.shape.value_size) * self.number_bytes()

    def _slots(self, layer: AttentionLayer) -> int:
        return 0 if layer.memory is None else state_slots(layer.memory, self.number_bytes())


def parameters(memory: Memory) -> int:
    """Learned numbers of one layer's memory."""
    return sum(parameter.numel() for parameter in memory.parameters())


def state_numbers(memory: Memory) -> int:
    """Numbers in the state of one layer's memory."""
    rows, columns, heads = memory.state_shape()
    return rows * columns * heads


def slots_read(evicted: int, slots: int) -> int:
    """Slots that all queries read together, each those that are filled when its own token has come: first in first out.

    Args:
        evicted: Tokens that have left the window; one query comes with each.
        slots: Slots that there are.
    """
    growing = min(evicted, POOLED * slots)
    groups, rest = divmod(growing, POOLED)
    filling = POOLED * groups * (groups - 1) // 2 + groups * (rest + 1)
    return filling + (evicted - growing) * slots
