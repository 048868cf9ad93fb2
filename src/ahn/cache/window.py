"""The exact tokens of one layer: sinks, then a window held as a ring buffer.

Legend of shapes: B batch, T new tokens, G key/value heads, K key size, V value size, F numbers per record,
S sinks, W window, N keys beside them.

Layout of a buffer's token axis: slots 0..S-1 hold the sinks, slot S + (j - S) mod W holds token j. Up to S + W tokens
this is the order of the tokens; after that a new token overwrites the one that leaves the window and moves no other.
Buffers grow by doubling until they hold S + W tokens and keep that size from then on.

A call is all or nothing: its tokens are pending, and gradients flow through them, until `commit` writes them to the
buffer. Only a single decoded token goes straight to its slot, whose former content is kept until then.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch

from ahn.tokens import Padding, Tokens, VisibleKV, concatenate


class SinkWindow:
    """Sinks and window of one layer.

    Args:
        sinks: Tokens at the start of each row that always stay, S.
        window: Tokens of the window, the current one included, W.
        dtype: What keys and values are rounded to when they come; `None` for none.

    Attributes:
        seen: Tokens seen, pending ones included.
        buffer: The slots; `None` before the first token was committed.
    """

    def __init__(self, sinks: int, window: int, dtype: torch.dtype | None = None) -> None:
        self.sinks = sinks
        self.window = window
        self.dtype = dtype
        self.seen = 0
        self.buffer: Tokens | None = None
        self._unwritten = 0  # tokens of `seen` that the buffer does not have yet
        self._pending: Tokens | None = None  # the newest of them: those beyond the sinks, at most W
        self._pending_sinks: Tokens | None = None  # all sinks, if some of them are pending
        self._overwritten: tuple[int, Callable[[], Tokens]] | None = None  # a slot and what it held before this call
        self._views: tuple[Tokens, Tokens, Tokens] | None = None  # of a buffer: that buffer, its sinks, nothing of it

    def view(self, new: Tokens, padding: Padding | None) -> VisibleKV:
        """What the queries of new tokens may read, without storing anything; gradients flow through it.

        Args:
            new: The new tokens, following the `seen` earlier ones.
            padding: Padding at the left of the rows, or `None` where there is none.
        """
        total = self.seen + new.length
        # The oldest token of a full window leaves when the first new one comes: it is evicted, never read.
        leaves = max(self.sinks, self.seen - self.window)
        first = max(self.sinks, self.seen - self.window + 1)
        line = concatenate([*self._past(leaves), self._beyond_sinks(new)])
        evicted = line.span(0, max(0, total - self.window - leaves))
        local = line.span(first - leaves, line.length)
        return VisibleKV(self._sinks_with(new, padding), local, first, total, self.window, True, evicted)

    def append(self, new: Tokens, padding: Padding | None) -> VisibleKV:
        """Takes in the new tokens, until `commit` or `restore`; returns what their queries may read.

        Args:
            new: The new tokens, following the `seen` earlier ones.
            padding: Padding at the left of the rows, or `None` where there is none.
        """
        new = new if self.dtype is None else new.to(self.dtype)
        settled = self.seen >= self.sinks + (padding.most if padding else 0)
        if new.length == 1 and settled and self._unwritten == 0 and not new.keys.requires_grad:
            return self._append_one(new)
        view = self.view(new, padding)
        if not settled:
            self._pending_sinks = view.sinks
        self._pending = self._newest(self._beyond_sinks(new))
        self._unwritten += new.length
        self.seen += new.length
        return view

    def reserve(self) -> None:
        """Makes room for the pending tokens, which is all of `commit` that can fail."""
        like = self._pending_sinks or self._pending
        if self._unwritten and like is not None:
            buffer = self._reserved(self.seen, like)
            if torch.is_grad_enabled():  # a backward pass may still compute from the buffer as it was
                self.buffer = buffer.map(torch.clone)

    def commit(self) -> None:
        """Writes the pending tokens to the buffer, without their gradients."""
        if self._pending is not None or self._pending_sinks is not None:
            self._write_pending()
        self._unwritten, self._pending, self._pending_sinks, self._overwritten = 0, None, None, None

    @torch.no_grad()
    def _write_pending(self) -> None:
        if self._pending_sinks is not None:
            self.ring.write(0, self._pending_sinks)
        if self._pending is not None:
            first = self.seen - self._pending.length
            while first < self.seen:
                slot = self._slot(first)
                count = min(self.seen - first, self.sinks + self.window - slot)
                start = first - self.seen + self._pending.length
                self.ring.write(slot, self._pending.span(start, start + count))
                first += count

    def snapshot(self) -> dict[str, Any]:
        """All that a call changes, by reference, for `restore`."""
        return dict(vars(self))

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Goes back to what was when `snapshot` was taken, as if no token had come since."""
        overwritten, buffer = self._overwritten, self.buffer
        vars(self).update(snapshot)
        if overwritten is not None and buffer is not None and buffer is self.buffer:
            slot, contents = overwritten
            buffer.write(slot, contents())

    def _append_one(self, new: Tokens) -> VisibleKV:
        """The step of decoding: one slot is read out, overwritten, and the ring is read as it lies."""
        slot, old = self._keep_slot(new)
        self.ring.write(slot, new)
        evicted = old if self.is_full else new.span(0, 0)
        self.seen += 1
        return self.as_it_lies(evicted)

    def append_key(self, key: torch.Tensor, value: torch.Tensor, keep_evicted: bool) -> VisibleKV:
        """Stores the key and value of one token; its record comes later, by `write_record`.

        Args:
            key: `[B, G, 1, K]`.
            value: `[B, G, 1, V]`.
            keep_evicted: Whether the view shall hold the token that leaves.
        """
        if self.dtype is not None:
            key, value = key.to(self.dtype), value.to(self.dtype)
        slot, old = self._keep_slot(Tokens(key, value, self.ring.record))
        self.ring.keys.narrow(2, slot, 1).copy_(key)
        self.ring.values.narrow(2, slot, 1).copy_(value)
        evicted = old if keep_evicted and self.is_full else None
        self.seen += 1
        return self.as_it_lies(evicted)

    def begin_key(self, contents: Callable[[], Tokens] | None) -> int:
        """Takes in a token whose key and value a kernel will write; its slot.

        Args:
            contents: What the slot holds; `None` where that is no token of the window.
        """
        slot = self.next_slot()
        self._overwritten = None if contents is None else (slot, contents)
        self.seen += 1
        return slot

    def next_slot(self) -> int:
        """The slot of the next token, in a buffer that has room for it."""
        length = self.ring.length
        if length <= self.seen and length < self.sinks + self.window:
            self._reserved(self.seen + 1, self.ring)
        return self._slot(self.seen)

    def last_slot(self) -> int:
        """The slot of the token that came last."""
        return self._slot(self.seen - 1)

    def last(self) -> Tokens:
        """The token that came last, as views."""
        slot = self.last_slot()
        return self.ring.span(slot, slot + 1)

    def write_record(self, record_BF: torch.Tensor) -> None:
        """Stores the record of the token that came last."""
        self.ring.record[:, 0, self._slot(self.seen - 1)] = record_BF

    def is_settled(self, begun: int) -> bool:
        """Whether the next token can go straight to its slot: all before it are there, as many as `begun` at least."""
        return self._unwritten == 0 and self.seen >= max(1, begun)

    def leaving(self) -> Tokens:
        """The token that leaves a full window when the next one comes, as views."""
        slot = self._slot(self.seen)
        return self.ring.span(slot, slot + 1)

    @property
    def is_full(self) -> bool:
        """Whether a token leaves the window when the next one comes."""
        return self.seen - self.window >= self.sinks

    @property
    def ring(self) -> Tokens:
        """The buffer, once tokens have come."""
        return cast("Tokens", self.buffer)

    def as_it_lies(self, evicted: Tokens | None = None) -> VisibleKV:
        """What the query of the token that came last reads: all slots in the order in which they lie.

        Args:
            evicted: The token that left when it came, if that is wanted.
        """
        if self._views is None or self._views[0] is not self.buffer:
            self._views = self.ring, self.ring.span(0, self.sinks), self.ring.span(0, 0)
        _, sinks, nothing = self._views
        used = min(self.seen, self.sinks + self.window)
        local = self.ring if used == self.ring.length else self.ring.span(0, used)
        first = max(self.sinks, self.seen - self.window)
        return VisibleKV(sinks, local, first, self.seen, self.window, False, nothing if evicted is None else evicted)

    def _keep_slot(self, like: Tokens) -> tuple[int, Tokens]:
        """The slot of the next token, and a copy of what it holds."""
        slot = self._slot(self.seen)
        buffer = self._reserved(self.seen + 1, like)
        old = buffer.span(slot, slot + 1).map(torch.clone)
        self._overwritten = slot, lambda: old
        return slot, old

    def _slot(self, position: int) -> int:
        return position if position < self.sinks else self.sinks + (position - self.sinks) % self.window

    def _beyond_sinks(self, new: Tokens) -> Tokens:
        """Those new tokens that stand behind the places of the sinks."""
        return new.span(min(max(0, self.sinks - self.seen), new.length), new.length)

    def _newest(self, new: Tokens) -> Tokens:
        """The last W pending tokens and new ones; a copy where a view would keep many others alive."""
        line = new if self._pending is None else concatenate([self._pending, new])
        newest = line.span(max(0, line.length - self.window), line.length)
        return newest if 2 * newest.length >= line.length else newest.map(torch.clone)

    def _past(self, start: int) -> list[Tokens]:
        """Tokens of the window from `start` on, oldest first: one or two views of the ring, then the pending ones."""
        parts = self._stored(start, self.seen - self._unwritten)
        if self._pending is not None:
            first = self.seen - self._pending.length
            parts.append(self._pending.span(max(0, start - first), self._pending.length))
        return parts

    def _stored(self, start: int, stop: int) -> list[Tokens]:
        """Tokens start..stop-1 of the ring, in their order."""
        if self.buffer is None or start >= stop:
            return []
        slot, count = self._slot(start), stop - start
        until_wrap = min(count, self.sinks + self.window - slot)
        wrapped = self.buffer.span(self.sinks, self.sinks + count - until_wrap)
        return [self.buffer.span(slot, slot + until_wrap), wrapped]

    def _sinks_with(self, new: Tokens, padding: Padding | None) -> Tokens:
        sinks = self._pending_sinks
        if sinks is None:
            sinks = self.buffer.span(0, min(self.sinks, self.seen)) if self.buffer else new.span(0, 0)
            if new.keys.requires_grad:  # the graph must not see the buffer, which later calls write to
                sinks = sinks.map(torch.clone)
        if padding is not None:
            return self._padded_sinks(sinks, new, padding) if self.seen < self.sinks + padding.most else sinks
        return concatenate([sinks, new.span(0, min(self.sinks - sinks.length, new.length))])

    def _padded_sinks(self, sinks: Tokens, new: Tokens, padding: Padding) -> Tokens:
        """Sinks of rows that begin at different tokens: slot s of a row holds its s-th real token once it has come."""
        count = min(self.sinks, self.seen + new.length)
        counts = padding.counts.to(new.keys.device)
        source = counts[:, None] + torch.arange(count, device=counts.device) - self.seen
        fresh = ((source >= 0) & (source < new.length))[:, None, :, None]
        index = source.clamp(0, new.length - 1)[:, None, :, None]

        def fill(old: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
            gathered = tensor.gather(2, index.expand(-1, tensor.size(1), -1, tensor.size(3)))
            rest = old.new_zeros(*old.shape[:2], count - old.size(2), old.size(3))
            return torch.where(fresh, gathered, torch.cat((old, rest), dim=2))

        return Tokens(*(fill(old, tensor) for old, tensor in zip(sinks, new, strict=True)))

    def _reserved(self, tokens: int, like: Tokens) -> Tokens:
        """The buffer, with room for `tokens` tokens but never for more than S + W.

        Keys and values have one dtype, the widest that came: calls inside and outside of autocast differ in theirs.
        """
        most, usual = self.sinks + self.window, like.keys.dtype
        length = self.buffer.length if self.buffer else 0
        if self.buffer and length >= min(tokens, most) and like.is_all(usual) and self.buffer.is_all(usual):
            return self.buffer  # as for nearly every token
        dtype = _widest([like, *filter(None, [self.buffer])])
        if self.buffer is None or length < min(tokens, most) or not self.buffer.is_all(dtype):
            room = length if length >= min(tokens, most) else min(most, max(tokens, 2 * length, 64))
            grown = like.map(lambda tensor: tensor.new_zeros(*tensor.shape[:2], room, tensor.size(3))).to(dtype)
            if self.buffer is not None:
                grown.write(0, self.buffer)
            self.buffer = grown
        return self.buffer


def _widest(parts: list[Tokens]) -> torch.dtype:
    """The dtype that all their keys and values fit into."""
    return functools.reduce(torch.promote_types, [tensor.dtype for part in parts for tensor in part[:2]])
