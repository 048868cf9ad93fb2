"""One decoded token: what all layers do at once instead of one after the other.

The token that leaves the window is known before the next one is read. So one set of operations updates the states of
all layers at the start of the call. Gates matter only once their token leaves, so those of the new token are computed
for all layers at the end. In between a layer only reads its state. On a CPU a small operation costs more than its
arithmetic, and a token of a small model has thousands of them.

Legend of shapes: B batch, D hidden size.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ahn import ops
from ahn.anchors.selection import Selection
from ahn.attention.host import OURS
from ahn.cache import HippocampalCache
from ahn.cache.groups import LayerGroup, group_layers
from ahn.tokens import Tokens


@dataclasses.dataclass(eq=False)
class LayerRun:
    """A layer that the kernels took the token through.

    Attributes:
        index: Index of its attention layer.
        output: What it gave, `[B, 1, D]`.
        finish: What remains to be done once the model has come to it, or `None`.
    """

    index: int
    output: torch.Tensor
    finish: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        self._version = self.output._version

    def is_given(self, hidden: torch.Tensor) -> bool:
        """Whether the input of another layer is what this one gave, unchanged."""
        return hidden is self.output and hidden._version == self._version


class Precomputed:
    """Layers that the kernels ran before the model came to them, on what the layer before gave.

    Args:
        runs: The layers in their order. The model has come to the first.
        tables: The rotary tables that all of them read.
    """

    def __init__(self, runs: list[LayerRun], tables: object) -> None:
        self._last, *rest = runs
        self._rest, self._tables = deque(rest), tables

    def take(self, index: int, hidden: torch.Tensor, tables: object) -> LayerRun | None:
        """The layer that the model has come to, if it is the next one and is given what was foreseen.

        Args:
            index: Index of its attention layer.
            hidden: What it is given.
            tables: Its rotary tables.
        """
        foreseen = tables is self._tables and self._last.is_given(hidden)
        if not foreseen or not self._rest or self._rest[0].index != index:
            return None
        self._last = self._rest.popleft()
        return self._last

    def left(self) -> list[int]:
        """Indices of the layers that the model has not come to."""
        return [run.index for run in self._rest]


class KernelProgress:
    """What the kernels have done of a call before the model came to it.

    Attributes:
        precomputed: The layers that were run ahead of the model, or `None`.
        last: The last layer that the kernels have run, what it gave, and its rotary tables; `None` before the first.
    """

    def __init__(self) -> None:
        self.precomputed: Precomputed | None = None
        self.last: tuple[Any, LayerRun, object] | None = None

    def take_back(self) -> None:
        """Takes back what layers have done that were run ahead, where the model gave one of them something else."""
        self.precomputed = None


class DecodeStep(KernelProgress):
    """The call that reads one token into a cache.

    Args:
        groups: The layers that work together.
        cache: The cache of the call.

    Attributes:
        hidden: What each attention layer has read so far in this call, `[B, 1, D]`, by layer index.
        takes_kernels: Whether whole layers may be left to the kernels.
    """

    def __init__(self, groups: list[LayerGroup], cache: HippocampalCache) -> None:
        super().__init__()
        self.groups = groups
        self.hidden: dict[int, torch.Tensor] = {}
        self._cache = cache
        self._rows: tuple[torch.Tensor, ...] | None = None
        self._group_of = {index: (group, n) for group in groups for n, index in enumerate(group.indices)}
        attends = all(config._attn_implementation == OURS for config, _ in cache.attachment.implementations)
        self.takes_kernels = attends and cache.padding is None and not torch.is_autocast_enabled("cpu")

    def contents(self, index: int) -> Callable[[], Tokens] | None:
        """What the slot of the token held in the layer of an index; `None` where no token leaves."""
        group, number = self._group_of[index]
        return None if group.leaving is None else partial(group.leaving.of_layer, number)

    def row(self, index: int, like: torch.Tensor) -> torch.Tensor:
        """Room for what the attention layer of an index reads, in a call of one row, `[1, 1, D]`."""
        if self._rows is None:
            self._rows = like.new_empty(1 + max(self._group_of), *like.shape).unbind(0)
        self.hidden[index] = self._rows[index]
        return self._rows[index]

    def take_back(self) -> None:
        """See `KernelProgress.take_back`: the tokens that layers have stored."""
        precomputed = self.precomputed
        super().take_back()
        for index in () if precomputed is None else precomputed.left():
            self._cache.take_back(index)

    def close(self) -> None:
        """Ends the call, in which every layer has read the token."""
        if self._cache.settings.mode == "ahn":
            for group in self.groups:
                group.write_gates(self.hidden)


def begin_step(cache: HippocampalCache, new: int, selection: Selection | None = None) -> DecodeStep | None:
    """Starts a call that all layers can read together; `None` if the layers must read it one by one.

    Args:
        cache: The cache of the call.
        new: Its number of new tokens.
        selection: The choice of anchors in it; `None` where there are none.
    """
    settings = cache.settings
    if new != 1 or settings.mode not in ("ahn", "window") or torch.is_grad_enabled() or not ops.is_automatic():
        return None
    if cache.attachment.config.memory_positions == "none" or not cache.layer_type.joins_steps:
        return None
    groups = cache.groups = cache.groups or group_layers(cache.attachment.layers, cache.layers)
    begun = settings.sinks + (cache.padding.most if cache.padding else 0)
    if not all(group.is_plain() and group.stores[0].exact.is_settled(begun) for group in groups):
        return None
    for group in groups:
        group.begin(settings.sinks)
    if settings.mode == "window":
        return DecodeStep(groups, cache)
    leaving = [group for group in groups if group.leaves(settings.sinks)]
    if not all(group.has_states() for group in leaving):
        return None
    for group in leaving:
        group.update(cache.padding, None if selection is None else selection.selected.get(group.window))
    return DecodeStep(groups, cache)
