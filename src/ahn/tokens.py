"""What travels between cache and attention: tokens of a layer, the padding of their rows, and what a query may read.

Legend of shapes: B batch, T new tokens, H query heads, G key/value heads, K key size, V value size, F numbers per
record, S sinks, N keys beside sinks and window, W window.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch


class Padding(NamedTuple):
    """Padding tokens at the left of each row of a batch.

    Attributes:
        counts: How many each row has, `[B]` int64.
        most: The largest of them.
    """

    counts: torch.Tensor
    most: int


class Tokens(NamedTuple):
    """Keys, values and records of consecutive tokens.

    Attributes:
        keys: `[B, G, T, K]`.
        values: `[B, G, T, V]`.
        record: What the memory needs of each token when it is evicted (gates, its position), `[B, 1, T, F]`;
            `F` is 0 where the memory is silent.
    """

    keys: torch.Tensor
    values: torch.Tensor
    record: torch.Tensor

    @property
    def length(self) -> int:
        """Number of tokens, T."""
        return self.keys.size(2)

    @property
    def nbytes(self) -> int:
        """Bytes of the three tensors."""
        return sum(tensor.nbytes for tensor in self)

    def span(self, start: int, stop: int) -> Tokens:
        """Tokens start..stop-1, as views."""
        return Tokens(*(tensor[:, :, start:stop] for tensor in self))

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Tokens:
        """The function applied to each of the three tensors."""
        return Tokens(*(function(tensor) for tensor in self))

    def is_all(self, dtype: torch.dtype) -> bool:
        """Whether keys and values are of a dtype."""
        return self.keys.dtype == dtype == self.values.dtype

    def to(self, dtype: torch.dtype) -> Tokens:
        """The same with keys and values in a dtype."""
        return Tokens(self.keys.to(dtype), self.values.to(dtype), self.record)

    def write(self, slot: int, tokens: Tokens) -> None:
        """Overwrites the slots from `slot` on."""
        for old, fresh in zip(self.span(slot, slot + tokens.length), tokens, strict=True):
            old.copy_(fresh)


def concatenate(parts: list[Tokens]) -> Tokens:
    """The tokens of all parts in one; a copy, unless only one part holds any."""
    filled = [part for part in parts if part.length] or parts[:1]
    if len(filled) == 1:
        return filled[0]
    return Tokens(*(torch.cat(tensors, dim=2) for tensors in zip(*filled, strict=True)))


NEVER = torch.iinfo(torch.int64).max
"""Index of a token that never comes."""


class ExtraKV(NamedTuple):
    """Keys and values beside sinks and window, with the queries that read them.

    Attributes:
        keys: `[B, G, N, K]`.
        values: `[B, G, N, V]`.
        visible_from: Index of the first token whose query reads each, `[B or 1, N]` int64.
        visible_until: Index of the first token whose query no longer reads it, `[B or 1, N]` int64.
    """

    keys: torch.Tensor
    values: torch.Tensor
    visible_from: torch.Tensor
    visible_until: torch.Tensor

    def to(self, dtype: torch.dtype) -> ExtraKV:
        """The same with keys and values in a dtype."""
        return self._replace(keys=self.keys.to(dtype), values=self.values.to(dtype))


class VisibleKV(NamedTuple):
    """What the queries of one call may read, and what left the window because of them.

    Attributes:
        sinks: The sinks so far, `[B, G, min(S, seen), ...]`; per row from its first real token.
        local: Tokens of the window in their order, the newest last. Without `ordered`: all slots of the buffer, sinks
            included, as they lie, for a single query that may read every one of them.
        first: Index of the first token of an ordered `local`, never below S.
        seen: Tokens seen, the new ones included.
        window: Tokens of the layer's window, W.
        ordered: Whether `local` is in the order of the tokens.
        evicted: Tokens that left the window, oldest first; the last `evicted.length` queries read after one each.
        extra: Keys and values of a later store that the same softmax reads, or `None`.
    """

    sinks: Tokens
    local: Tokens
    first: int
    seen: int
    window: int
    ordered: bool
    evicted: Tokens
    extra: ExtraKV | None = None

    def to(self, dtype: torch.dtype) -> VisibleKV:
        """The same with all that queries read in a dtype."""
        sinks, local = self.sinks.to(dtype), self.local.to(dtype)
        return self._replace(sinks=sinks, local=local, extra=None if self.extra is None else self.extra.to(dtype))


class Attended(NamedTuple):
    """What queries get from the exact tokens: sinks, extra keys and window.

    Attributes:
        output: `[B, T, H, V]` in the dtype of the values.
        log_sum: Logarithm of the sum of exp(score) over all that each query reads, `[B, T, H]`, at least in float32;
            `None` where it is not wanted.
    """

    output: torch.Tensor
    log_sum: torch.Tensor | None = None

    def of_last(self, tokens: int) -> Attended:
        """The same of the last tokens alone."""
        first = self.output.size(1) - tokens
        return Attended(self.output[:, first:], None if self.log_sum is None else self.log_sum[:, first:])
