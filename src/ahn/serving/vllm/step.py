"""One step of the engine: which tokens of the batch are whose, and how a layer reads them.

Legend of shapes: T tokens of the batch, D hidden size, H query heads, G key/value heads, K key size, V value size,
R rotated size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ahn.anchors.selection import Selection
from ahn.attention.call import Call
from ahn.attention.function import attention_function
from ahn.attention.hooks import layer_call
from ahn.cache.cache import HippocampalCache
from ahn.native.layer import MOST_TOKENS
from ahn.serving.vllm.decode import DecodedTokens
from ahn.serving.vllm.layout import (
    close_board,
    close_layer,
    empty_cache,
    memory_layer,
    open_board,
    open_layer,
)
from ahn.serving.vllm.runtime import Rows, Runtime, ServedCall


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

    def attend(self, asked: ServedCall) -> torch.Tensor:
        """Attention of the tokens in one layer, `[1, tokens, H, V]`; see `ServedStep.attend`."""
        served, module, projected, inputs, options = asked
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


class ServedStep:
    """One step of the engine.

    Args:
        runtime: What all steps share.
        rows: The tokens of each request.
    """

    def __init__(self, runtime: Runtime, rows: Sequence[Rows]) -> None:
        self.runtime = runtime
        singles: list[Rows] = []
        if runtime.decodes_together:
            for each in rows:
                if each.seen == 0 or each.stop - each.start > 1 or each.start != len(singles):
                    break
                singles.append(each)
        self.decoded = DecodedTokens(runtime, singles) if singles else None
        self.chunks = [Chunk(runtime, each) for each in rows[len(singles) :]]

    @property
    def kernel_tokens(self) -> DecodedTokens | None:
        """The tokens of the step, if the kernels can take all of them through whole decoder layers; else `None`."""
        tokens = self.decoded
        if tokens is None or self.chunks or tokens.count > MOST_TOKENS or not self.runtime.takes_kernels:
            return None
        return tokens

    def attend(self, asked: ServedCall) -> torch.Tensor:
        """Attention of all tokens in one layer, `[1, T, H, V]`.

        Args:
            asked: The layer, and what it is to read.
        """
        parts = [] if self.decoded is None else [self.decoded.attend(asked).transpose(0, 1)]
        parts += [chunk.attend(asked) for chunk in self.chunks]
        if asked.served.layer.index == self.runtime.last:
            self._close()
        read = sum(part.size(1) for part in parts)
        if (tokens := asked.projected[0].size(2)) > read:  # vLLM pads a batch for some of its kernels
            parts.append(parts[0].new_zeros(1, tokens - read, *parts[0].shape[2:]))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _close(self) -> None:
        """Ends the step, which every layer has read."""
        if self.decoded is not None:
            self.decoded.close()
        for chunk in self.chunks:
            chunk.close()
