"""One step of the engine: which tokens of the batch are whose, and how a layer reads them.

Legend of shapes: T tokens of the batch, D hidden size, H query heads, G key/value heads, K key size, V value size,
R rotated size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ahn.anchors.selection import Selection
from ahn.attachment import Attachment, AttentionLayer
from ahn.attention.call import Call
from ahn.attention.function import attention_function
from ahn.attention.hooks import layer_call
from ahn.cache.cache import HippocampalCache
from ahn.config import RunSettings
from ahn.serving.vllm.layout import (
    BlockTensor,
    close_board,
    close_layer,
    empty_cache,
    memory_layer,
    open_board,
    open_layer,
)


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

    def block(self, number: int) -> dict[str, torch.Tensor]:
        """Views of one block, `[1, ...]` each."""
        return {name: page[number : number + 1] for name, page in self.pages.items()}


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


class Chunk:
    """Some consecutive tokens of one request, read as `ahn` reads a call.

    Args:
        runtime: What all steps share.
        rows: The tokens.
    """

    def __init__(self, runtime: Runtime, rows: Rows) -> None:
        self.runtime = runtime
        self.rows = rows
        self.cache: HippocampalCache = empty_cache(runtime.attachment, runtime.settings)
        if rows.seen == 0:
            for served in runtime.layers.values():
                for view in served.block(rows.block).values():
                    view.zero_()
        self.delay = 0 if self.cache.scoreboard is None else self.cache.scoreboard.delay
        self.call = Call(runtime.attachment, runtime.settings, None, self.cache)
        if self.cache.scoreboard is not None:
            open_board(self.cache, self._shared_block(), rows.seen)
            self.call.selection = Selection(self.cache.scoreboard, rows.seen, rows.stop - rows.start, None)

    def attend(
        self,
        served: ServedLayer,
        module: nn.Module,
        projected: Sequence[torch.Tensor],
        inputs: Mapping[str, Any],
        options: Mapping[str, Any],
    ) -> torch.Tensor:
        """Attention of the tokens in one layer, `[1, tokens, H, V]`; see `Step.attend`."""
        start, stop, index = self.rows.start, self.rows.stop, served.layer.index
        tables = inputs.get("position_embeddings")
        own = {"hidden_states": inputs["hidden_states"][:, start:stop]}
        if tables is not None:
            own["position_embeddings"] = self.call.shared(
                "tables", tables[0], lambda: tuple(table[:, start:stop] for table in tables)
            )
            own["position_ids"] = inputs["position_ids"][:, start:stop]
        views, store = served.block(self.rows.block), memory_layer(self.cache, index)
        open_layer(store, views, self.rows.seen, self.delay)
        ahn = layer_call(module, self.call, (), own)
        query, key, value = (tensor[:, :, start:stop] for tensor in projected)
        out, _ = attention_function(module, query, key, value, None, ahn=ahn, **options)
        close_layer(store, views)
        return out

    def close(self) -> None:
        """Ends the call, which every layer has read."""
        if self.call.selection is not None:
            self.call.selection.close()
            close_board(self.cache, self._shared_block())

    def _shared_block(self) -> dict[str, torch.Tensor]:
        return self.runtime.layers[self.runtime.first].block(self.rows.block)


class Step:
    """One step of the engine.

    Args:
        runtime: What all steps share.
        rows: The tokens of each request.
    """

    def __init__(self, runtime: Runtime, rows: Sequence[Rows]) -> None:
        self.runtime = runtime
        self.chunks = [Chunk(runtime, each) for each in rows]

    def attend(
        self,
        served: ServedLayer,
        module: nn.Module,
        projected: Sequence[torch.Tensor],
        inputs: Mapping[str, Any],
        options: Mapping[str, Any],
    ) -> torch.Tensor:
        """Attention of all tokens in one layer, `[1, T, H, V]`.

        Args:
            served: The layer.
            module: The attention module.
            projected: Queries `[1, H, T, K]`, keys `[1, G, T, K]` and values `[1, G, T, V]`, after norms and rotation.
            inputs: What the module was called with: `hidden_states`, `[1, T, D]`, and, where it rotates,
                `position_embeddings` and `position_ids`.
            options: What the module passes to its attention function beside that: `scaling`, `softcap`, `s_aux`.
        """
        query, _, value = projected
        out = value.new_zeros(1, query.size(2), query.size(1), value.size(3))
        for chunk in self.chunks:
            out[:, chunk.rows.start : chunk.rows.stop] = chunk.attend(served, module, projected, inputs, options)
        if served.layer.index == self.runtime.last:
            for chunk in self.chunks:
                chunk.close()
        return out
