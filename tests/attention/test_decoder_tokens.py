"""Tokens of several texts through decoder layers in one call of the kernels: each gives what it gives alone."""

from __future__ import annotations

import ctypes

import pytest
import torch

from ahn.native.layer import MOST_TOKENS, Token, TokenTable, run_layers, run_table
from tests.attention.test_decoder_layers import JOINED, decoded, model_of, needs_kernels

pytestmark = needs_kernels
PLACES, SINKS, ANCHORS = 300, 3, 5


class Texts:
    """Texts that have read different numbers of tokens, and tables that point at what is kept of them."""

    def __init__(self, family: str, quantize: str | None, memory: str, count: int) -> None:
        model = model_of(family, quantize, memory)
        decoded(model)
        paths = [layer.forward.path for layer in model.model.layers]
        assert all(path._verified for path in paths)
        self.model, self.layers = model, [path.described for path in paths]
        config = model.config
        L, D, H = len(paths), config.hidden_size, config.num_attention_heads
        G, K = config.num_key_value_heads, config.head_dim
        self.out, self.normed = torch.zeros(L, count, D), torch.zeros(L, count, D)
        self.projected = torch.zeros(L, count, H + 2 * G, K)
        self.ring = {name: torch.randn(L, count, G, PLACES, K) for name in ("keys", "values")}
        self.table = TokenTable(torch.zeros(L, count, len(Token._fields_), dtype=torch.int64))
        self.x = torch.randn(1, count, D)
        TokenTable(self.table.numbers[:1]).point(x=self.x)
        TokenTable(self.table.numbers[1:]).point(x=self.out[:-1])
        self.table.point(out=self.out, normed=self.normed, projected=self.projected, **self.ring)
        self.states = [torch.randn(count, *path._memory.state_shape()) for path in paths]
        for layer, state in enumerate(self.states):
            state[..., -1, -1] += 4  # in linearised attention the sum of weights, which is above 0
            TokenTable(self.table.numbers[layer : layer + 1]).point(state=state[None])
        turns = torch.randn(4, count, K).expand(L, -1, -1, -1).unbind(1)
        self.table.point(**dict(zip(("cos", "sin", "sink_cos", "sink_sin"), turns, strict=True)))
        anchors = {name: torch.randn(L, count, G, ANCHORS, K) for name in ("anchor_keys", "anchor_values")}
        visible = torch.randint(0, 2 * PLACES, (L, count, ANCHORS))
        self.table.point(**anchors, visible_from=visible, visible_until=visible + PLACES)
        seen = torch.randint(0, 2 * PLACES, (count,))
        seen[0], seen[-1] = 2 * PLACES, 0
        used = (seen + 1).clamp(max=PLACES)
        self.table.set(capacity=PLACES, slot=torch.where(seen < PLACES, seen, PLACES - 1), used=used, seen=seen)
        self.table.set(sinks=used.clamp(max=SINKS), anchors=ANCHORS)
        for name, texts in (
            ("state", slice(0, None, 2)),
            ("anchors", slice(1, None, 3)),
            ("sink_cos", slice(0, None, 3)),
        ):
            self.table.numbers[:, texts, self.column(name)] = 0

    @staticmethod
    def column(name: str) -> int:
        """Number of a field."""
        return [field for field, _ in Token._fields_].index(name)

    def written(self) -> list[torch.Tensor]:
        """All that the kernels write."""
        return [each.clone() for each in (self.out, self.normed, self.projected, *self.ring.values())]


@pytest.mark.parametrize("count", [2, 5, MOST_TOKENS])
@pytest.mark.parametrize(
    ("family", "quantize", "memory"),
    [
        *(("llama", quantize, "gated_delta_net") for quantize in (None, "int4", "int8", "bf16")),
        ("qwen3", None, "gated_delta_net"),
        ("qwen2", None, "mamba2"),
        *((family, None, "linearized_attention") for family in ("llama", "qwen3")),
        ("llama", "int4", JOINED),
        ("qwen2", None, "linearized_attention+mamba2"),
    ],
)
def test_each_gives_what_it_gives_alone(family: str, quantize: str | None, memory: str, count: int) -> None:
    texts = Texts(family, quantize, memory, count)
    run_table(texts.layers, texts.table)
    together = texts.written()
    for tensor in (texts.out, texts.normed, texts.projected):
        tensor.zero_()
    for text in range(count):
        run_table(texts.layers, TokenTable(texts.table.numbers[:, text : text + 1].contiguous()))
    for mine, alone in zip(together, texts.written(), strict=True):
        torch.testing.assert_close(mine, alone, atol=1e-5, rtol=1e-5)
    assert together[0].isfinite().all()
    assert together[0].abs().amax(-1).min() > 0


def test_a_table_of_one_text_is_a_list_of_tokens() -> None:
    texts = Texts("llama", None, "gated_delta_net", 3)
    run_table(texts.layers, texts.table)
    expected = texts.out[:, 1].clone()
    texts.out.zero_()
    tokens = [Token.from_buffer_copy(bytes(numbers.numpy())) for numbers in texts.table.numbers[:, 1]]
    assert ctypes.sizeof(Token) == 8 * texts.table.numbers.size(2)
    run_layers(texts.layers, tokens)
    torch.testing.assert_close(texts.out[:, 1], expected, atol=1e-6, rtol=1e-6)
