"""The paper's way of counting, which makes its printed tables comparable with any model."""

from __future__ import annotations

from ahn.attachment import AttentionLayer
from ahn.cache.compressive import POOLED, STATE_NUMBER_BYTES
from ahn.cost.counting import Counting, state_numbers
from ahn.memories import Memory, MemoryShape

_NUMBER_BYTES = 4
_MISPRINTS = (
    (
        28,
        MemoryShape(3584, 28, 4, 128, 128),
        "7B: the paper prints other FLOPs than its own formula gives: all absolute ones, all shares of the whole "
        "model, and the memories' share of the mixers. Parameters, cache and the other shares of the mixers agree.",
    ),
    (
        48,
        MemoryShape(5120, 40, 8, 128, 128),
        "14B: table 1 of the paper counts the output gate's projection too, but its printed totals only come out "
        "without it, as here.",
    ),
)


class Paper(Counting):
    """Matrix products only, as in the paper's tables. L tokens, D hidden size, H query heads, K head size.

    Causal attention is half of the square. The vocabulary takes two products for every token, for the embedding counts
    as one. Keys, values and states have 4 bytes a number, and the gates of tokens in the window are left out. Products
    of a memory are, for each evicted token, N projections of its gates (N D H), the read (H K^2) and the output
    projection (H K^2).

    Source: arXiv 2510.07318, table 1. That table also counts the output gate, D H more for each evicted token, but the
    totals printed for the 14B model only come out without it.
    """

    name = "paper"

    def triangle(self, tokens: int) -> int:
        """Half of the square, twice."""
        return tokens * tokens

    def vocabulary_flops(self, tokens: int) -> int:
        """Embedding and logits of every token."""
        return 2 * 2 * tokens * self.base.vocabulary_weights

    def memory_flops(self, memory: Memory, tokens: int, evicted: int) -> int:
        """Gates, read and output projection of the evicted tokens."""
        shape = memory.shape
        gates = len(memory.projections) * shape.hidden_size * shape.query_heads
        return 2 * evicted * (gates + state_numbers(memory) + memory.o_proj.numel())

    def number_bytes(self) -> int:
        """4, whatever the model's dtype."""
        return _NUMBER_BYTES

    def layer_bytes(self, layer: AttentionLayer, method: str, tokens: int) -> int:
        """Keys, values, the slots that are filled and, once a token was evicted, the state."""
        reach = self.reach(method, layer)
        exact = tokens if reach is None else min(tokens, reach)
        memory = self._memory(method, layer)
        state = state_numbers(memory) if memory is not None and tokens > exact else 0
        slots = min(self._slots(layer), (tokens - exact) // POOLED) if method == "ct" else 0
        return (exact + slots) * self.slot_bytes(layer) + STATE_NUMBER_BYTES * state

    def summary(self) -> str:
        """See `Counting.summary`."""
        return (
            "paper: as in tables 1, 2, 7 and 9 of arXiv 2510.07318: matrix products only, half of the causal square, "
            "two products with the vocabulary for every token, 4 bytes a number, no gates in the cache."
        )

    def remarks(self) -> list[str]:
        """Where the paper prints something else for this shape."""
        attention_layers = self.base.attachment.layers
        return [
            text
            for layers, shape, text in _MISPRINTS
            if len(attention_layers) == layers and attention_layers[0].shape == shape
        ]
