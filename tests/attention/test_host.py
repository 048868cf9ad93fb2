"""What the host model says of a call: masks, packed rows, outputs, caches of its own. It is followed or refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import ahn
from ahn.backbone import compat
from ahn.backbone.compat import CACHE
from tests.tiny import FAMILIES, awaken, read, text, tiny, with_memory

CONFIG = ahn.AHNConfig(window=16, sinks=5)


def packed(*lengths: int) -> torch.Tensor:
    """Positions of a row of documents, `[1, T]`."""
    return torch.cat([torch.arange(length) for length in lengths])[None]


class TestPackedRows:
    @pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "mistral"])
    @torch.no_grad()
    def test_each_document_is_read_alone(self, family: str) -> None:
        model, ids, lengths = with_memory(family), text(1, 100), (40, 1, 37, 22)
        whole = model(ids, position_ids=packed(*lengths), use_cache=False).logits
        alone = [model(part, use_cache=False).logits for part in ids.split(lengths, dim=1)]
        torch.testing.assert_close(whole, torch.cat(alone, dim=1), rtol=0, atol=1e-5)

    @torch.no_grad()
    def test_inside_the_window_it_is_the_base_model(self) -> None:
        model, ids, positions = tiny(), text(2, 20), packed(8, 12).expand(2, -1)
        expected = model(ids, position_ids=positions, use_cache=False).logits
        ahn.attach(model, CONFIG)
        found = model(ids, position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)

    def test_gradients_are_those_of_the_documents(self) -> None:
        gradients = []
        for parts in ([100], [60, 40]):
            model = with_memory()
            memory = model.model.layers[1].self_attn.memory
            for parameter in memory.parameters():
                parameter.requires_grad_(True)
            model.train()
            ids, first = text(1, 100), 0
            loss = torch.zeros(())
            for length in parts:
                part = slice(first, first + length)
                positions = {"position_ids": packed(60, 40)} if length == 100 else {}
                loss = loss + model(ids[:, part], use_cache=False, **positions).logits.square().sum()
                first += length
            loss.backward()
            gradients.append(memory.o_proj.grad)
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-4 * float(gradients[1].abs().max()))

    @torch.no_grad()
    def test_with_anchors_and_hidden_states(self) -> None:
        model, ids = with_memory(anchors=6, anchor_score="key_diff"), text(1, 100)
        options: dict[str, Any] = {"use_cache": False, "output_hidden_states": True}
        whole = model(ids, position_ids=packed(55, 45), **options)
        alone = [model(part, **options) for part in ids.split([55, 45], dim=1)]
        for layer, states in enumerate(whole.hidden_states):
            expected = torch.cat([each.hidden_states[layer] for each in alone], dim=1)
            torch.testing.assert_close(states, expected, rtol=0, atol=1e-5)

    @torch.no_grad()
    def test_rows_that_are_packed_differently_are_refused(self) -> None:
        model = with_memory()
        with pytest.raises(ahn.AHNError, match="one row at a time"):
            model(text(2, 20), position_ids=torch.cat((packed(8, 12), packed(9, 11))), use_cache=False)


class TestMasks:
    @pytest.mark.parametrize("family", FAMILIES)
    @torch.no_grad()
    def test_every_family_asks_for_a_mask_that_is_understood(self, family: str) -> None:
        model = tiny(family)
        ahn.attach(model, ahn.AHNConfig(window=10, sinks=1))
        assert read(model, text(1, 24), 12).isfinite().all()

    def test_both_directions_are_refused(self) -> None:
        model = with_memory()
        model.config.is_causal = False
        with pytest.raises(ahn.AHNError, match="more than causal"):
            model(text(1, 20))
        model.config.is_causal = True
        with pytest.raises(ahn.AHNError, match="both directions"):
            model(text(1, 20), is_causal=False)
        with ahn.mode(model, "full"):
            model.config.is_causal = False
            assert model(text(1, 20)).logits.isfinite().all()

    def test_a_mask_by_hand_is_refused(self) -> None:
        with pytest.raises(ahn.AHNError, match="2D attention mask"):
            with_memory()(text(1, 8), attention_mask=torch.zeros(1, 1, 8, 8))


class TestAttachmentInForce:
    @torch.no_grad()
    def test_another_implementation_is_refused(self) -> None:
        model = with_memory()
        model.set_attn_implementation("eager")
        for action in (lambda: model(text(1, 8)), lambda: model.generate(text(1, 8), max_new_tokens=2)):
            with pytest.raises(ahn.AHNError, match="set to 'eager' after the memory was attached"):
                action()

    @torch.no_grad()
    def test_weights_of_attention_are_refused_and_given_in_full_mode(self) -> None:
        model = tiny()
        model.set_attn_implementation("eager")
        expected = model(text(1, 12), output_attentions=True).attentions
        ahn.attach(model, CONFIG)
        with pytest.raises(ahn.AHNError, match="output_attentions"):
            model(text(1, 12), output_attentions=True)
        with ahn.mode(model, "full"):
            found = model(text(1, 12), output_attentions=True).attentions
        assert len(found) == len(expected)
        assert all(torch.equal(a, b) for a, b in zip(found, expected))

    @torch.no_grad()
    def test_a_filled_cache_of_the_base_is_refused(self) -> None:
        model, ids = tiny(), text(1, 30)
        cache = transformers.DynamicCache(config=model.config)
        model(ids[:, :20], **{CACHE: cache})
        ahn.attach(model, CONFIG)
        for action in (
            lambda: model(ids[:, 20:], **{CACHE: cache}),
            lambda: model.generate(ids, max_new_tokens=2, **{CACHE: cache}),
        ):
            with pytest.raises(ahn.AHNError, match="was filled without the memory"):
                action()

    @torch.no_grad()
    def test_a_cache_of_full_mode_keeps_that_mode(self) -> None:
        model, ids = with_memory(), text(1, 40)
        with ahn.mode(model, "full"):
            expected = model(ids).logits
            cache = model(ids[:, :30], use_cache=True)
            cache = compat.find_cache(cache)
        torch.testing.assert_close(model(ids[:, 30:], **{CACHE: cache}).logits, expected[:, 30:], rtol=0, atol=1e-5)


class TestInferenceMode:
    @pytest.mark.parametrize("anchors", [0, 5])
    def test_read_in_it_and_go_on_outside(self, anchors: int) -> None:
        model, ids = with_memory(anchors=anchors, anchor_score="key_diff"), text(1, 60)
        cache = ahn.HippocampalCache(model)
        with torch.inference_mode():
            model(ids[:, :40], cache=cache)
        with torch.no_grad():
            rest = torch.cat([model(ids[:, i : i + 1], cache=cache).logits for i in range(40, 60)], dim=1)
            expected = read(model, ids, [40, *[1] * 20])[:, 40:]
        torch.testing.assert_close(rest, expected, rtol=0, atol=1e-5)


def gemma3() -> Any:
    words = transformers.Gemma3TextConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        head_dim=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=12,
        query_pre_attn_scalar=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
    )
    sight = transformers.SiglipVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=4
    )
    tokens = {"mm_tokens_per_image": 4, "image_token_id": 127, "boi_token_id": 125, "eoi_token_id": 126}
    config = transformers.Gemma3Config(text_config=words, vision_config=sight, **tokens)
    return transformers.Gemma3ForConditionalGeneration(config)


def smolvlm() -> Any:
    words = {
        "model_type": "llama",
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 48,
        "head_dim": 8,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
    }
    sight = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
    }
    config = transformers.SmolVLMConfig(
        text_config=words, vision_config=sight, image_token_id=127, scale_factor=2, pad_token_id=0
    )
    return transformers.SmolVLMForConditionalGeneration(config)


def whole(model: Any) -> Any:
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.15)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("make", [gemma3, smolvlm])
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_a_model_that_also_sees_images_reads_text(make: Any) -> None:
    torch.manual_seed(1)
    model, ids = whole(make()), text(1, 40).clamp(max=120)
    base = copy.deepcopy(model)
    ahn.attach(model, ahn.AHNConfig(window=60, sinks=4))
    inside = {"input_ids": ids[:, :10]}
    torch.testing.assert_close(model(**inside).logits, base(**inside).logits, rtol=0, atol=1e-4)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(ids, **options), base.generate(ids, **options))
    with ahn.mode(model, "full"):
        assert torch.equal(model(input_ids=ids).logits, base(input_ids=ids).logits)
    awaken(model)
    with ahn.mode(model, "ahn", window=8, sinks=2):
        reading = model(input_ids=ids).logits
        cache = ahn.HippocampalCache(model)
        parts = [model(input_ids=part, **{CACHE: cache}).logits for part in ids.split(7, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), reading, rtol=0, atol=1e-4)
    ahn.detach(model)
    assert torch.equal(model(input_ids=ids).logits, base(input_ids=ids).logits)


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_a_call_that_was_broken_off_is_not_taken_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """After Ctrl-C torch runs no hook, so that the call seems to go on: here that of another model, then its own."""
    torch.manual_seed(1)
    model, other, ids = whole(gemma3()), with_memory(), text(1, 40).clamp(max=120)
    ahn.attach(model, ahn.AHNConfig(window=8, sinks=2))
    expected = model(input_ids=ids).logits

    def interrupt(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    for each in (other, model):
        layer = each.get_decoder().layers[1].mlp
        with monkeypatch.context() as patch:
            patch.setattr(layer, "forward", interrupt)
            with pytest.raises(KeyboardInterrupt):
                each(input_ids=ids)
        assert torch.equal(model(input_ids=ids).logits, expected)
