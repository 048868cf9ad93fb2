"""The exact tokens of one layer: sinks, then a window held as a ring buffer.

Legend of shapes: B batch, T new tokens, G key/value heads, K key size, V value size, F numbers per record,
S sinks, W window, N keys beside them.

Layout of a buffer's token axis: slots 0..S-1 hold the sinks, slot S + (j - S) mod W holds token j. Up to S + W tokens
this is the order of the tokens; after that a new token overwrites the one that leaves the window and moves no other.
Buffers grow by doubling until they hold S + W tokens and keep that size from then on.
"""

from __future__ import annotations

from typing import cast

import torch

from ahn.tokens import Padding, Tokens, View, concatenate


class SinkWindow:
    """Sinks and window of one layer.

    Args:
        sinks: Tokens at the start of each row that stay for ever, S.
        window: Tokens of the window, the current one included, W.
    """

    def __init__(self, sinks: int, window: int) -> None:
        self.sinks = sinks
        self.window = window
        self.seen = 0
        self.buffer: Tokens | None = None
        self._views: tuple[Tokens, Tokens, Tokens] | None = None  # of a buffer: that buffer, its sinks, nothing of it

    def view(self, new: Tokens, padding: Padding | None) -> View:
        """What the queries of new tokens may read, without storing anything; gradients flow through it.

        Args:
            new: The new tokens, following the `seen` earlier ones.
            padding: Padding at the left of the rows, or `None` where there is none.
        """
        total = self.seen + new.length
        # The oldest token of a full window leaves when the first new one comes: it is evicted, never read.
        leaves = max(self.sinks, self.seen - self.window)
        first = max(self.sinks, self.seen - self.window + 1)
        beyond_sinks = new.span(min(max(0, self.sinks - self.seen), new.length), new.length)
        line = concatenate([*self._past(leaves), beyond_sinks])
        evicted = line.span(0, max(0, total - self.window - leaves))
        return View(self._sinks_with(new, padding), line.span(first - leaves, line.length), first, True, evicted)

    def append(self, new: Tokens, padding: Padding | None) -> View:
        """Stores the new tokens and returns what their queries may read.

        Args:
            new: The new tokens, following the `seen` earlier ones.
            padding: Padding at the left of the rows, or `None` where there is none.
        """
        settled = self.seen >= self.sinks + (padding.most if padding else 0)
        if new.length == 1 and settled and not new.keys.requires_grad:
            return self._append_one(new)
        view = self.view(new, padding)
        with torch.no_grad():
            self._store(new, None if settled else view.sinks)
        return view

    def _append_one(self, new: Tokens) -> View:
        """The step of decoding: one slot is read out, overwritten, and the ring is read as it lies."""
        leaves = self.seen - self.window >= self.sinks
        evicted = self.leaving().map(torch.clone) if leaves else new.span(0, 0)
        self._reserved(self.seen + 1, new).write(self._slot(self.seen), new)
        return self._after_one(evicted)

    def append_key(self, key: torch.Tensor, value: torch.Tensor, keep_evicted: bool) -> View:
        """Stores the key and value of one token; its record comes later, by `write_record`.

        Args:
            key: `[B, G, 1, K]`.
            value: `[B, G, 1, V]`.
            keep_evicted: Whether the view shall hold the token that leaves.
        """
        leaves = keep_evicted and self.seen - self.window >= self.sinks
        evicted = self.leaving().map(torch.clone) if leaves else None
        slot = self._slot(self.seen)
        buffer = self._reserved(self.seen + 1, self._ring)
        buffer.keys[:, :, slot : slot + 1] = key
        buffer.values[:, :, slot : slot + 1] = value
        return self._after_one(evicted)

    def write_record(self, record_BF: torch.Tensor) -> None:
        """Stores the record of the token that came last."""
        self._ring.record[:, 0, self._slot(self.seen - 1)] = record_BF

    def leaving(self) -> Tokens:
        """The token that leaves a full window when the next one comes, as views."""
        slot = self._slot(self.seen)
        return self._ring.span(slot, slot + 1)

    def _after_one(self, evicted: Tokens | None) -> View:
        """What the query of a token that was just stored reads: all slots as they lie."""
        self.seen += 1
        if self._views is None or self._views[0] is not self.buffer:
            self._views = self._ring, self._ring.span(0, self.sinks), self._ring.span(0, 0)
        _, sinks, nothing = self._views
        used = min(self.seen, self.sinks + self.window)
        local = self._ring if used == self._ring.length else self._ring.span(0, used)
        first = max(self.sinks, self.seen - self.window)
        return View(sinks, local, first, False, nothing if evicted is None else evicted)

    @property
    def _ring(self) -> Tokens:
        """The buffer, once tokens have come."""
        return cast("Tokens", self.buffer)

    def _store(self, new: Tokens, sinks: Tokens | None) -> None:
        """Writes the sinks, if they changed, and as many new tokens as the window holds."""
        total = self.seen + new.length
        buffer = self._reserved(total, new)
        if sinks is not None:
            buffer.write(0, sinks)
        first = max(self.seen, self.sinks, total - self.window)
        while first < total:
            slot = self._slot(first)
            count = min(total - first, self.sinks + self.window - slot)
            buffer.write(slot, new.span(first - self.seen, first - self.seen + count))
            first += count
        self.seen = total

    def _slot(self, position: int) -> int:
        return position if position < self.sinks else self.sinks + (position - self.sinks) % self.window

    def _past(self, start: int) -> list[Tokens]:
        """Held tokens of the window from `start` on, oldest first, in one or two views of the ring."""
        if self.buffer is None or start >= self.seen:
            return []
        slot, count = self._slot(start), self.seen - start
        until_wrap = min(count, self.sinks + self.window - slot)
        wrapped = self.buffer.span(self.sinks, self.sinks + count - until_wrap)
        return [self.buffer.span(slot, slot + until_wrap), wrapped]

    def _sinks_with(self, new: Tokens, padding: Padding | None) -> Tokens:
        held = self.buffer.span(0, min(self.sinks, self.seen)) if self.buffer else new.span(0, 0)
        if new.keys.requires_grad:  # the graph must not see the buffer, which later calls write to
            held = held.map(torch.clone)
        if padding is not None:
            return self._padded_sinks(held, new, padding) if self.seen < self.sinks + padding.most else held
        return concatenate([held, new.span(0, min(self.sinks - held.length, new.length))])

    def _padded_sinks(self, held: Tokens, new: Tokens, padding: Padding) -> Tokens:
        """Sinks of rows that begin at different tokens: slot s of a row holds its s-th real token once it has come."""
        count = min(self.sinks, self.seen + new.length)
        source = padding.counts[:, None] + torch.arange(count, device=padding.counts.device) - self.seen
        fresh = ((source >= 0) & (source < new.length))[:, None, :, None]
        index = source.clamp(0, new.length - 1)[:, None, :, None]

        def fill(old: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
            gathered = tensor.gather(2, index.expand(-1, tensor.size(1), -1, tensor.size(3)))
            rest = old.new_zeros(*old.shape[:2], count - old.size(2), old.size(3))
            return torch.where(fresh, gathered, torch.cat((old, rest), dim=2))

        return Tokens(*(fill(old, tensor) for old, tensor in zip(held, new, strict=True)))

    def _reserved(self, tokens: int, like: Tokens) -> Tokens:
        """The buffer, with room for `tokens` tokens but never for more than S + W."""
        most = self.sinks + self.window
        held = self.buffer.length if self.buffer else 0
        if self.buffer is None or held < min(tokens, most):
            room = min(most, max(tokens, 2 * held, 64))
            grown = like.map(lambda tensor: tensor.new_zeros(*tensor.shape[:2], room, tensor.size(3)))
            if self.buffer is not None:
                grown.write(0, self.buffer)
            self.buffer = grown
        return self.buffer
