"""What this library computes and holds."""

from __future__ import annotations

import dataclasses

import torch

from ahn.attachment import AttentionLayer
from ahn.cache import HippocampalLayer
from ahn.cache.layer_kinds import AnyLayer, layer_tensors, new_layer
from ahn.cache.record import TokenRecord
from ahn.config import Mode
from ahn.cost.counting import Counting, state_numbers
from ahn.memories import Memory
from ahn.tokens import Tokens

_MODES: dict[str, Mode] = {"window": "window", "ct": "ct_mean"}


class Actual(Counting):
    """The products that reading takes, and the bytes that a cache holds.

    FLOPs are those of matrix products: of tokens with weights, of queries with visible keys, and of the last token with
    the vocabulary. A memory adds its gates (every token), its state (every evicted token) and its output (every query
    after an eviction). Further work of a kernel, for masked keys or for chunks, is not counted.

    Bytes are those of `HippocampalCache.nbytes`, or of `DynamicCache` for `full`, after one row was read in one call.
    The layers of a cache are filled with tensors that have a shape and a dtype, but no data.
    """

    name = "actual"

    def triangle(self, tokens: int) -> int:
        """Each query reads itself and what came before, twice."""
        return tokens * (tokens + 1)

    def vocabulary_flops(self, tokens: int) -> int:
        """Logits of the last token: the others' are not asked for, and an embedding is looked up."""
        return 2 * self.base.vocabulary_weights

    def memory_flops(self, memory: Memory, tokens: int, evicted: int) -> int:
        """Gates of every token; state and output where something was evicted."""
        shape = memory.shape
        gates = len(memory.projections) * shape.hidden_size * shape.query_heads
        output = memory.g_proj.weight.numel() + memory.o_proj.numel()
        scan = memory.state_products * state_numbers(memory) + memory.write_products
        return 2 * tokens * gates + 2 * evicted * (scan + output)

    def number_bytes(self) -> int:
        """Bytes of the model's dtype."""
        return self.base.dtype.itemsize

    def layer_bytes(self, attention_layer: AttentionLayer, method: str, tokens: int) -> int:
        """Bytes of every tensor that a layer of the cache holds."""
        memory = None if method == "full" else self._memory(method, attention_layer) or attention_layer.memory
        settings = dataclasses.replace(self.settings, mode=_MODES.get(method, "ahn"))
        layer: AnyLayer = new_layer(dataclasses.replace(attention_layer, built=None), settings)
        if memory is not None:
            layer = HippocampalLayer(settings, attention_layer.sliding_window, self._slots(attention_layer))
        key, value = (
            torch.empty(1, attention_layer.shape.kv_heads, tokens, size, dtype=self.base.dtype, device="meta")
            for size in (attention_layer.shape.key_size, attention_layer.shape.value_size)
        )
        if isinstance(layer, HippocampalLayer) and memory is not None:
            self._fill(layer, attention_layer, memory, key, value)
        else:
            layer.update(key, value)
        return sum(tensor.nbytes for tensor in layer_tensors(layer).values())

    def _fill(
        self,
        layer: HippocampalLayer,
        attention_layer: AttentionLayer,
        memory: Memory,
        key: torch.Tensor,
        value: torch.Tensor,
    ) -> None:
        """Does to a layer of the cache what the attention function does, with tensors that hold no values."""
        record = key.new_zeros(1, 1, key.size(2), 0, dtype=torch.float32)
        if layer.settings.mode == "ahn":
            gates = memory.gates(key.new_empty(1, key.size(2), attention_layer.shape.hidden_size))
            record = TokenRecord(gates, self._position(attention_layer, key.size(2))).pack()[:, None]
        view = layer.append(Tokens(key, value, record), None)
        layer.reserve()
        layer.commit()
        if layer.bank is not None and view.evicted.length:
            layer.bank.reserve(key, value)
        if record.size(-1) and view.evicted.length:
            layer.state = memory.empty_state(1, key.device)

    def _position(self, layer: AttentionLayer, tokens: int) -> torch.Tensor | None:
        """What is stored of the positions of tokens, `[1, T, P]`; `None` where the memory keeps their rotation."""
        if layer.rotation is None or self.base.attachment.config.memory_positions != "none":
            return None
        positions = torch.zeros(1, tokens, device="meta")
        return layer.rotation.position_record(layer.rotation.tables(positions), positions, 1)

    def summary(self) -> str:
        """See `Counting.summary`."""
        dtype = str(self.base.dtype).removeprefix("torch.")
        return (
            "actual: the matrix products that reading needs, with the logits of the last token alone; the cache of one "
            f"row read in one go, in {dtype}, with float32 states and gates."
        )
