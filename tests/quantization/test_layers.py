"""Layers with weights in few bits: what they give, their gradients, and that they can be saved, copied and moved."""

import copy
import pickle
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import ahn
from ahn import native
from ahn.attachment import MODULE
from ahn.errors import ShapeError
from ahn.quantization import (
    QUANTIZE,
    GroupedWeight,
    Groups,
    QuantizedEmbedding,
    QuantizedLinear,
    StoredWeight,
    quantize_model,
    round_to_groups,
    store,
)
from ahn.training.anchors.capture import watch
from tests.tiny import awaken, text, tiny

QUANTIZED = (QuantizedLinear, QuantizedEmbedding)


def stored(quantize: str, rows: int = 50, columns: int = 96) -> StoredWeight:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(7))
    return store(weight, quantize)  # type: ignore[arg-type]


def quantized_tiny(quantize: str, family: str = "llama", **changes: Any) -> Any:
    model = tiny(family, **{"hidden_size": 64, "head_dim": 16, "intermediate_size": 96} | changes)
    quantize_model(model, quantize)  # type: ignore[arg-type]
    return model


def dequantized(model: Any) -> Any:
    """A copy of a model with plain float32 layers in place of the quantised ones."""
    plain = copy.deepcopy(model)
    for parent in list(plain.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, QuantizedLinear):
                new: Any = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
                new.weight = nn.Parameter(module.dequantize())
                if module.bias is not None:
                    new.bias = module.bias
                setattr(parent, name, new)
            elif isinstance(module, QuantizedEmbedding):
                setattr(parent, name, nn.Embedding.from_pretrained(module.dequantize()))
    return plain


class TestRounding:
    @pytest.mark.parametrize(("bits", "most"), [(4, 1 / 30), (8, 1 / 510)])
    def test_error_is_half_a_step(self, bits: Any, most: float) -> None:
        weight = torch.randn(33, 96)
        span = weight.view(33, 3, 32).amax(-1) - weight.view(33, 3, 32).amin(-1)
        wrong = (round_to_groups(weight, bits).dequantize() - weight).abs().view(33, 3, 32).amax(-1)
        assert bool((wrong <= span * most + weight.abs().max() * 2e-3).all())

    def test_spans_of_rows_give_the_same_weight(self) -> None:
        weight = torch.randn(70, 96)
        weight[40, 3] = -1e6  # float16 holds no such minimum, so that this span is in float32
        parts = [round_to_groups(weight[start : start + 32], 8) for start in (0, 32, 64)]
        assert {part.scales_NG.dtype for part in parts} == {torch.float16, torch.float32}
        joined = GroupedWeight(iter(parts), 8, 70)
        assert (joined.rows, joined.columns, joined.halved) == (70, 96, False)
        assert torch.equal(joined.dequantize(), torch.cat([GroupedWeight(part, 8).dequantize() for part in parts]))

    def test_spans_are_gone_when_the_next_one_is_made(self) -> None:
        earlier: list[weakref.ref[torch.Tensor]] = []

        def spans() -> Iterator[Groups]:
            for _ in range(4):
                assert not any(span() is not None for span in earlier[:-1])
                part = round_to_groups(torch.randn(16, 96), 4)
                earlier.append(weakref.ref(part.codes_NGC))
                yield part

        assert GroupedWeight(spans(), 4, 64).rows == len(earlier) * 16

    @pytest.mark.parametrize("rows", [33, 100, None])
    def test_spans_that_are_not_all_of_the_weight(self, rows: int | None) -> None:
        with pytest.raises(ShapeError, match="rows"):
            GroupedWeight(iter([round_to_groups(torch.randn(32, 96), 4)]), 4, rows)

    @pytest.mark.parametrize("value", [0.0, 3.5, -1e-9, 1e6, -1e30])
    def test_equal_numbers(self, value: float) -> None:
        weight = torch.full((3, 32), value)
        torch.testing.assert_close(round_to_groups(weight, 4).dequantize(), weight, atol=1e-7, rtol=1e-3)


@pytest.mark.parametrize("quantize", QUANTIZE)
class TestLinear:
    @pytest.mark.parametrize("vectors", [1, 2, 8, 9, 200])
    @pytest.mark.parametrize("kernels", [True, False])
    def test_is_the_product_with_the_dequantised_weight(self, quantize: str, vectors: int, kernels: bool) -> None:
        layer = QuantizedLinear(stored(quantize), torch.randn(50))
        x = torch.randn(2, vectors, 96)
        expected = x.double() @ layer.dequantize().double().T + layer.bias.double()  # type: ignore[union-attr]
        if kernels:
            got = layer(x)
        else:
            with native.switched_off():
                got = layer(x)
        torch.testing.assert_close(got.double(), expected, atol=5e-5, rtol=5e-5)

    def test_several_spans_of_rows(self, quantize: str, monkeypatch: pytest.MonkeyPatch) -> None:
        layer = QuantizedLinear(stored(quantize))
        x = torch.randn(20, 96, requires_grad=True)
        whole = layer(x)
        whole.square().sum().backward()
        expected, x.grad = x.grad, None
        monkeypatch.setattr("ahn.quantization.weights._NUMBERS_AT_ONCE", 96 * 16)
        assert len(layer.stored.spans()) == 4
        parts = layer(x)
        parts.square().sum().backward()
        torch.testing.assert_close(parts, whole, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(x.grad, expected, atol=1e-2, rtol=1e-5)

    def test_gradients(self, quantize: str) -> None:
        layer = QuantizedLinear(stored(quantize), torch.randn(50))
        layer.bias.requires_grad_()  # type: ignore[union-attr]
        x, probe = torch.randn(3, 96, requires_grad=True), torch.randn(3, 50)
        (layer(x) * probe).sum().backward()
        torch.testing.assert_close(x.grad, probe @ layer.dequantize(), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(layer.bias.grad, probe.sum(0))  # type: ignore[union-attr]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
    def test_keeps_the_dtype_of_its_input_and_its_weight(self, quantize: str, dtype: torch.dtype) -> None:
        layer = QuantizedLinear(stored(quantize))
        before = layer.dequantize()
        layer.to(dtype)
        assert layer(torch.randn(2, 96, dtype=dtype)).dtype is dtype
        assert torch.equal(layer.dequantize(), before)

    def test_copies(self, quantize: str) -> None:
        layer, x = QuantizedLinear(stored(quantize), torch.randn(50)), torch.randn(2, 96)
        other = QuantizedLinear(store(torch.randn(50, 96), quantize), torch.randn(50))  # type: ignore[arg-type]
        other.load_state_dict(layer.state_dict())
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), other):
            assert torch.equal(twin(x), layer(x))

    def test_follows_its_numbers_to_another_place(self, quantize: str) -> None:
        layer, x = QuantizedLinear(stored(quantize)), torch.randn(1, 96)
        first = layer(x)
        for name, buffer in list(layer.stored.named_buffers()):
            setattr(layer.stored, name, torch.zeros_like(buffer))
        assert not layer(x).any()
        assert first.any()

    def test_says_what_its_weight_is(self, quantize: str) -> None:
        weight = QuantizedLinear(stored(quantize)).weight
        assert (weight.shape, weight.device.type, weight.numel()) == ((50, 96), "cpu", 4800)
        assert weight.is_cpu
        assert not weight.is_cuda


@pytest.mark.parametrize("quantize", QUANTIZE)
class TestEmbedding:
    def test_looks_rows_up(self, quantize: str) -> None:
        layer = QuantizedEmbedding(stored(quantize))
        ids = torch.tensor([[0, 49], [17, 17]])
        assert torch.equal(layer(ids), layer.dequantize()[ids])

    @pytest.mark.parametrize("wrong", [-1, 50])
    def test_ids_that_are_not_there(self, quantize: str, wrong: int) -> None:
        with pytest.raises(IndexError):
            QuantizedEmbedding(stored(quantize))(torch.tensor([0, wrong]))


@pytest.mark.parametrize("quantize", QUANTIZE)
class TestModel:
    def test_one_copy_serves_lookup_and_product(self, quantize: str) -> None:
        model = quantized_tiny(quantize, tie_word_embeddings=True)
        assert model.lm_head.stored is model.model.embed_tokens.stored
        twin = copy.deepcopy(model)
        assert twin.lm_head.stored is twin.model.embed_tokens.stored
        assert twin.lm_head.stored is not model.lm_head.stored

    def test_full_mode_is_the_base(self, quantize: str) -> None:
        model, ids = quantized_tiny(quantize), text(2, 40)
        with torch.no_grad():
            expected = model(ids).logits
            ahn.attach(model, ahn.AHNConfig(window=12, sinks=3))
            with ahn.mode(model, "full"):
                assert torch.equal(model(ids).logits, expected)
            ahn.detach(model)
            assert torch.equal(model(ids).logits, expected)

    def test_memory_on_top_is_that_of_the_dequantised_base(self, quantize: str) -> None:
        model = quantized_tiny(quantize)
        plain, ids = dequantized(model), text(2, 60)
        losses = []
        for each in (model, plain):
            torch.manual_seed(0)
            ahn.attach(each, ahn.AHNConfig(window=12, sinks=3, anchors=4))
            awaken(each)
            with torch.no_grad():
                losses.append(float(each(ids, labels=ids).loss))
        assert abs(losses[0] - losses[1]) < 1e-4

    def test_the_anchors_training_sees_the_output_projection(self, quantize: str) -> None:
        model, ids = quantized_tiny(quantize), text(1, 20)
        moved: list[list[torch.Tensor]] = []
        for each in (model, dequantized(model)):
            ahn.attach(each, ahn.AHNConfig(window=12, sinks=3))
            moved.append([])
            watch(each, ids, lambda layer: moved[-1].append(layer.moved()))
        torch.testing.assert_close(moved[0], moved[1], atol=1e-5, rtol=1e-4)

    def test_a_memory_trains_on_a_frozen_base(self, quantize: str) -> None:
        model, ids = quantized_tiny(quantize), text(2, 60)
        plain = dequantized(model)
        gradients = []
        for each in (model, plain):
            torch.manual_seed(0)
            ahn.attach(each, ahn.AHNConfig(window=12, sinks=3))
            awaken(each)
            each(ids, labels=ids).loss.backward()
            gradients.append([p.grad for name, p in each.named_parameters() if MODULE in name and p.grad is not None])
        assert len(gradients[0]) == len(gradients[1]) > 0
        for got, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-3)


def test_words_take_eight_bits_and_what_does_not_fit_stays() -> None:
    model = quantized_tiny("int4", tie_word_embeddings=False, intermediate_size=72)
    assert {model.lm_head.stored.bits, model.model.embed_tokens.stored.bits} == {8}
    mlp = model.model.layers[0].mlp
    assert type(mlp.down_proj) is nn.Linear
    assert mlp.up_proj.stored.bits == 4
