"""What the steps of the engine share: the layers of this process, with the pages of all requests.

Legend of shapes: L layers, T tokens of the batch, D hidden size, H query heads, G key/value heads, K key size, V value
size.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ahn import native
from ahn.anchors.selection import Scoreboard
from ahn.attachment import Attachment, AttentionLayer
from ahn.cache.window import SinkWindow
from ahn.config import RunSettings
from ahn.memories import Memory
from ahn.serving.vllm.layout import BlockTensor, empty_cache, memory_layer

_OF_KERNELS = ("keys", "values", "state", "anchor_keys", "anchor_values")
"""Tensors of a block that the kernels of whole decoder layers read."""


class Rows(NamedTuple):
    """The tokens of one request in a step.

    Attributes:
        block: The request's block.
        seen: Tokens that it has read before.
        start: Its first token in the batch.
        stop: Its last token in the batch + 1.
    """

    block: int
    seen: int
    start: int
    stop: int


@dataclasses.dataclass(eq=False)
class ServedLayer:
    """An attention layer of this process, with the pages of all requests.

    Attributes:
        layer: The layer.
        tensors: What it keeps of a request.
        pages: Each of them for all blocks, `[blocks, ...]`; empty before vLLM has bound them.
    """

    layer: AttentionLayer
    tensors: list[BlockTensor]
    pages: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)

    @property
    def memory(self) -> Memory:
        """Its memory."""
        if self.layer.memory is None:
            raise TypeError(f"layer {self.layer.index} has no memory")
        return self.layer.memory

    def block(self, number: int) -> dict[str, torch.Tensor]:
        """Views of one block, `[1, ...]` each."""
        return {name: page[number : number + 1] for name, page in self.pages.items()}


@dataclasses.dataclass(eq=False)
class ServedGroup:
    """Neighbouring layers with one kind of memory, whose pages are read and written together.

    Attributes:
        layers: The layers, whose pages vLLM has bound.
    """

    layers: list[ServedLayer]

    @property
    def memories(self) -> list[Memory]:
        """Their memories."""
        return [served.memory for served in self.layers]

    @functools.cached_property
    def pages(self) -> dict[str, torch.Tensor]:
        """Their pages, `[L, blocks, ...]`, which vLLM lays out at equal distances; else nothing."""
        layers = [served.pages for served in self.layers]
        stacked = {name: _stacked([pages.get(name) for pages in layers]) for name in layers[0]}
        return {name: tensor for name, tensor in stacked.items() if tensor is not None}

    def addresses(self, name: str, blocks: torch.Tensor) -> torch.Tensor:
        """Where a tensor of some blocks lies, in every layer, `[L, B]` int64.

        Args:
            name: Its name.
            blocks: The blocks, `[B]`.
        """
        pages = self.pages[name]
        layers = torch.arange(pages.size(0))[:, None] * pages.stride(0)
        return pages.data_ptr() + pages.element_size() * (layers + blocks * pages.stride(1))


class ServedCall(NamedTuple):
    """A layer that is to read the tokens of the batch.

    Attributes:
        served: The layer.
        module: Its attention module.
        projected: Queries `[1, H, T, K]`, keys `[1, G, T, K]` and values `[1, G, T, V]`, after norms and rotation.
        inputs: What the module was called with: `hidden_states`, `[1, T, D]`, and, where it rotates,
            `position_embeddings` and `position_ids`.
        options: What the module passes to its attention function beside that: `scaling`, `softcap`, `s_aux`.
    """

    served: ServedLayer
    module: nn.Module
    projected: Sequence[torch.Tensor]
    inputs: Mapping[str, Any]
    options: Mapping[str, Any]


@dataclasses.dataclass(eq=False)
class Runtime:
    """What all steps share.

    Attributes:
        attachment: The memories, and all layers of the model.
        settings: How texts are read.
        layers: The layers of this process by their indices, in order.
    """

    attachment: Attachment
    settings: RunSettings
    layers: dict[int, ServedLayer]

    @property
    def first(self) -> int:
        """Index of the first layer here, in whose blocks lies what all layers share."""
        return next(iter(self.layers))

    @property
    def last(self) -> int:
        """Index of the last layer here."""
        return next(reversed(self.layers))

    @functools.cached_property
    def board(self) -> Scoreboard | None:
        """The scoreboard of a text that begins, or `None` where there are no anchors."""
        return empty_cache(self.attachment, self.settings).scoreboard

    @functools.cached_property
    def exact(self) -> SinkWindow:
        """The sinks and the window of the first layer here, empty."""
        return memory_layer(empty_cache(self.attachment, self.settings), self.first).exact

    @functools.cached_property
    def groups(self) -> list[ServedGroup]:
        """The layers here in groups, in order: the states of several kinds of memory differ in size."""
        runs = itertools.groupby(self.layers.values(), key=lambda served: type(served.memory))
        return [ServedGroup(list(layers)) for _, layers in runs]

    @functools.cached_property
    def is_alike(self) -> bool:
        """Whether all layers here have one shape and window."""
        return len({(each.layer.shape, each.layer.sliding_window) for each in self.layers.values()}) == 1

    @functools.cached_property
    def decodes_together(self) -> bool:
        """Whether the single tokens of many requests can be read together."""
        needed = {"keys", "values", "record", "state"}
        may_join = self.is_alike and self.attachment.config.memory_positions == "rope"
        if self.board is not None:
            needed |= {"anchor_keys", "anchor_values"}
            may_join = may_join and not self.board.score.accumulates  # such a score looks at the weights of attention
        stacked = all(needed <= set(group.pages) for group in self.groups)
        return may_join and stacked and all(each.memory.is_plain() for each in self.layers.values())

    @functools.cached_property
    def takes_kernels(self) -> bool:
        """Whether the kernels of whole decoder layers can read and write the pages."""
        pages = [page for group in self.groups for name, page in group.pages.items() if name in _OF_KERNELS]
        return self.decodes_together and all(native.ready(each) and each[0, 0].is_contiguous() for each in pages)

    def addresses(self, name: str, blocks: torch.Tensor) -> torch.Tensor:
        """Where a tensor of some blocks lies, in every layer, `[L, B]` int64.

        Args:
            name: Its name.
            blocks: The blocks, `[B]`.
        """
        return torch.cat([group.addresses(name, blocks) for group in self.groups])


def _stacked(pages: list[torch.Tensor | None]) -> torch.Tensor | None:
    """Pages of several layers as one tensor, where they lie at equal distances in one storage."""
    first = pages[0]
    tensors = [page for page in pages if page is not None and first is not None and page.shape == first.shape]
    if first is None or len(tensors) < len(pages):
        return None
    distances = {(b.data_ptr() - a.data_ptr()) // a.element_size() for a, b in itertools.pairwise(tensors)}
    storages = {page.untyped_storage().data_ptr() for page in tensors}
    if len(distances) > 1 or len(storages) > 1 or min(distances, default=1) < 1:
        return None
    return first.as_strided((len(tensors), *first.shape), (min(distances, default=1), *first.stride()))
