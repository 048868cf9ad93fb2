"""The cache of one layer: a new token enters the window, what leaves it falls into the stores behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from ahn.anchors.selection import Selected
from ahn.cache.bank import Bank
from ahn.cache.compressive import POOLINGS, PooledStore
from ahn.cache.store import Store
from ahn.cache.window import SinkWindow
from ahn.config import RunSettings
from ahn.errors import CacheError
from ahn.tokens import Padding, Tokens, VisibleKV


def stored_dtype(settings: RunSettings) -> torch.dtype | None:
    """What a run rounds keys and values to, or `None`."""
    return None if settings.cache_dtype is None else getattr(torch, settings.cache_dtype)


class HippocampalLayer(CacheLayerMixin):
    """Everything that one layer with a memory keeps of a batch of sequences, in a size that does not grow.

    The model's own `update` call only passes keys and values on; the attention function stores them with `append`,
    because only it knows the gates.

    Args:
        settings: Mode, window and sinks of the run; fixed for the life of the cache.
        sliding_window: The layer's own sliding window in tokens, if the base model has one. Sinks and window together
            never show more tokens than that.
        slots: Slots of a Compressive Transformer, for the modes that read them.
        score_names: Names of what the score of the anchors keeps here.

    Attributes:
        exact: Sinks and window.
        pooled: Slots, in the modes of a Compressive Transformer.
        bank: Anchors, where there are any.
        score_state: What the score of the anchors keeps here.
        state: State of the memory, `[B, *state_shape]` float32, or `None` before the first eviction.
        joins_steps: Whether a single token may be read in all layers at once, without `append`.
    """

    joins_steps = True
    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(
        self,
        settings: RunSettings,
        sliding_window: int | None = None,
        slots: int = 0,
        score_names: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        window = settings.window
        if sliding_window is not None:
            window = min(window, sliding_window - settings.sinks)
        if window < 1:
            raise CacheError(
                f"{settings.sinks} sinks leave no window in a layer that slides over {sliding_window} tokens; "
                "use fewer sinks or leave that layer out with `layers=`"
            )
        self.settings = settings
        self.exact = SinkWindow(settings.sinks, window, stored_dtype(settings))
        pooling = POOLINGS.get(settings.mode)
        self.pooled = PooledStore(slots, pooling, settings.sinks, window) if pooling and slots else None
        self.bank = Bank(settings.anchors) if settings.has_anchors else None
        self.score_state = Store(*score_names)
        self.state: torch.Tensor | None = None

    def append(self, new: Tokens, padding: Padding | None, selected: Selected | None = None) -> VisibleKV:
        """Takes in new tokens, until `commit` or `restore`; what their queries read and what left the window.

        Args:
            new: The new tokens.
            padding: Padding at the left of the rows, or `None` where there is none.
            selected: Which of the tokens that leave become anchors; `None` where there are no anchors.
        """
        self.is_initialized = True
        view = self.exact.append(new, padding)
        if self.bank is not None and selected is not None:
            return view._replace(extra=self.bank.append(view.evicted, selected))
        if self.pooled is None:
            return view
        first = view.seen - self.exact.window - view.evicted.length
        return view._replace(extra=self.pooled.append(view.evicted, first, padding))

    def append_key(self, key: torch.Tensor, value: torch.Tensor, selected: Selected | None) -> VisibleKV:
        """Stores a single token as `append` does, for layers that decode together and bring its record later.

        Args:
            key: `[B, G, 1, K]`.
            value: `[B, G, 1, V]`.
            selected: Whether the token that leaves becomes an anchor; `None` where there are none.
        """
        enters = selected is not None and selected.entering.numel() > 0
        view = self.exact.append_key(key, value, keep_evicted=enters)
        if self.bank is None or selected is None:
            return view
        return view._replace(extra=self.bank.append(view.evicted, selected))

    def reserve(self) -> None:
        """Makes room for what came since the last `commit`, which is all of it that can fail."""
        self.exact.reserve()

    def commit(self) -> None:
        """Keeps what came since the last `commit`, without its gradients."""
        self.exact.commit()
        if self.state is not None and self.state.requires_grad:
            self.state = self.state.detach()
        for store in self._stores():
            if any(tensor.requires_grad for tensor in store.stored.values()):
                store.map_tensors(torch.Tensor.detach)

    def snapshot(self) -> dict[str, Any]:
        """All that a call changes, by reference, for `restore`."""
        stored = [dict(store.stored) for store in self._stores()]
        return {"exact": self.exact.snapshot(), "stored": stored, "state": self.state, "started": self.is_initialized}

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Goes back to what was when `snapshot` was taken, of this layer or of one that is like it."""
        self.exact.restore(snapshot["exact"])
        for store, stored in zip(self._stores(), snapshot["stored"], strict=True):
            store.stored = dict(stored)
        self.state, self.is_initialized = snapshot["state"], snapshot["started"]

    def _stores(self) -> list[Store]:
        stores: tuple[Store | None, ...] = (self.pooled, self.bank, self.score_state)
        return [store for store in stores if store is not None]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor held, by name."""
        stored = {} if self.exact.buffer is None else self.exact.buffer._asdict()
        for store in self._stores():
            stored |= store.tensors()
        return stored if self.state is None else {**stored, "state": self.state}

    def set_tensors(self, tensors: dict[str, torch.Tensor], seen: int) -> None:
        """Takes over tensors that `tensors` gave, after `seen` tokens."""
        self.state = tensors.get("state")
        if "keys" in tensors:
            self.exact.buffer = Tokens(tensors["keys"], tensors["values"], tensors["record"])
        for store in self._stores():
            store.set_tensors(tensors)
        self.exact.seen = seen
        self.is_initialized = seen > 0

    def map_tensors(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replaces every tensor by the function's result on it."""
        if self.exact.buffer is not None:
            self.exact.buffer = self.exact.buffer.map(function)
        for store in self._stores():
            store.map_tensors(function)
        if self.state is not None:
            self.state = function(self.state)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Part of the transformers contract; the first `append` does this."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Passes the new keys and values on to the attention function, which stores them."""
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Sizes of a mask over all tokens seen, for layers of the model that kept full attention."""
        return self.exact.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Number of tokens seen, padding included."""
        return self.exact.seen

    def get_max_length(self) -> int:
        """-1: any number of tokens can be read."""
        return -1

    def reset(self) -> None:
        """Forgets everything."""
        self.exact = SinkWindow(self.exact.sinks, self.exact.window, self.exact.dtype)
        for store in self._stores():
            store.reset()
        self.state = None
        self.is_initialized = False

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Follows the rows that a beam search keeps."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps these rows of the batch."""
        self.map_tensors(lambda tensor: tensor.index_select(0, indices.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row of the batch."""
        self.map_tensors(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last tokens, which works only while nothing has left the window.

        Raises:
            CacheError: The memory has taken in a token, or more tokens than seen are to go.
        """
        removed = abs(tokens_to_remove)
        if removed == 0:
            return
        if self.bank is not None:
            raise CacheError("cannot take tokens back that anchors were chosen by; keep a `fork()` of the cache")
        if self.exact.seen > self.exact.sinks + self.exact.window:
            raise CacheError("cannot take tokens back once one has left the window; keep a `fork()` of the cache")
        if removed > self.exact.seen:
            raise CacheError(f"cannot take back {removed} tokens: only {self.exact.seen} were seen")
        self.exact.seen -= removed
