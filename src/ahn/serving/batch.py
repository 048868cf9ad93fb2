"""Answers that are written together: one step reads the last token of each and says what may follow.

Legend of shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ahn.cache import HippocampalCache
from ahn.cache.slots import SlotCache, can_share_slots
from ahn.errors import CacheError
from ahn.generation import forward


class Row:
    """The cache of an answer, and what is expected next.

    Args:
        cache: The cache of one row. Nobody else uses it.
        logits: What the model expects next, `[V]`.
    """

    def __init__(self, cache: HippocampalCache, logits: torch.Tensor) -> None:
        self.cache: HippocampalCache | None = cache
        self.logits = logits


class Batch:
    """Rows that decode together, each as it would alone.

    Rows lie in the slots of one cache. Those that cannot, because they have read fewer tokens than there are sinks or
    because of their model, take their steps one after the other.

    Args:
        model: The model.
        slots: Most rows that lie together.
    """

    def __init__(self, model: Any, slots: int) -> None:
        self._model = model
        self._slots = slots
        self._shares = can_share_slots(model)
        self._shared: SlotCache | None = None
        self._rows: list[Row] = []  # those in the slots, in their order

    @property
    def nbytes(self) -> int:
        """Bytes of the rows that lie together."""
        return 0 if self._shared is None else self._shared.cache.nbytes

    @torch.no_grad()
    def step(self, rows: Sequence[Row], tokens: Sequence[int]) -> None:
        """Reads one token in each of these rows and notes what they expect next; other rows wait.

        Args:
            rows: The rows.
            tokens: Their tokens.
        """
        for row in [row for row in self._rows if row not in rows]:
            self.take_out(row)
        for row in rows:
            self._put_in(row)
        token_of = {id(row): token for row, token in zip(rows, tokens, strict=True)}
        if self._rows and self._shared is not None:
            ids = torch.tensor([[token_of[id(row)]] for row in self._rows], device=self._model.device)
            positions = self._shared.positions(ids.device)
            logits_BV = forward(self._model, ids, self._shared.cache, position_ids=positions)[:, -1]
            for row, logits_V in zip(self._rows, logits_BV):
                row.logits = logits_V
        for row in rows:
            if row.cache is not None:
                ids = torch.tensor([[token_of[id(row)]]], device=self._model.device)
                row.logits = forward(self._model, ids, row.cache)[0, -1]

    def take_out(self, row: Row, keep: bool = True) -> None:
        """Lets a row lie apart; without `keep` its cache is lost."""
        if row in self._rows and self._shared is not None:
            number = self._rows.index(row)
            row.cache = self._shared.leave(number, keep)
            last = self._rows.pop()
            if last is not row:
                self._rows[number] = last

    def copy(self, row: Row) -> HippocampalCache:
        """A copy of a row's cache."""
        if row in self._rows and self._shared is not None:
            return self._shared.copy(self._rows.index(row))
        if row.cache is None:
            raise CacheError("this row was taken out without its cache")
        return row.cache.fork()

    def _put_in(self, row: Row) -> None:
        cache = row.cache
        if cache is None or not self._shares or cache.seen_tokens < max(1, cache.settings.sinks):
            return
        if self._shared is None:
            self._shared = SlotCache(cache, self._slots)
        self._shared.join(cache)
        self._rows.append(row)
        row.cache = None
