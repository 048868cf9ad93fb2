"""What the host model says of a call: masks, packed rows, outputs, caches of its own. It is followed or refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers

import ahn
from ahn.backbone import compat
from ahn.backbone.compat import CACHE
from tests.multimodal import IMAGE, IMAGES, MAKERS, REFUSED, TWO_WAYS, multimodal
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
    def test_continuous_batching_is_refused(self) -> None:
        model = with_memory()
        for action in (
            lambda: model.generate_batch([[3, 4, 5]], max_new_tokens=2),
            lambda: model.init_continuous_batching(),
        ):
            with pytest.raises(ahn.AHNError, match=r"continuous batching \(generate_batch\)"):
                action()
        ahn.detach(model)
        assert "init_continuous_batching" not in vars(model)

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


@pytest.mark.parametrize("name", [name for name in MAKERS if name not in REFUSED])
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_a_model_that_also_sees_images_reads_text(name: str) -> None:
    model, ids = multimodal(name), text(1, 40).clamp(max=120)
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


@pytest.mark.parametrize("name", [name for name in IMAGES if name not in TWO_WAYS])
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_a_model_that_sees_an_image(name: str) -> None:
    model, call = multimodal(name), IMAGES[name]()
    base = copy.deepcopy(model)
    ahn.attach(model, ahn.AHNConfig(window=60, sinks=4))
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "suppress_tokens": [IMAGE]}
    torch.testing.assert_close(model(**call).logits, base(**call).logits, rtol=0, atol=1e-4)
    assert torch.equal(model.generate(**call, **options), base.generate(**call, **options))
    awaken(model)
    with ahn.mode(model, "ahn", window=8, sinks=2):
        answer = model.generate(**call, **options)
        whole = {**call, "input_ids": answer}
        if "mm_token_type_ids" in call:
            whole["mm_token_type_ids"] = (answer == IMAGE).long()
        logits = model(**whole).logits[:, 29:-1]
        logits[..., IMAGE] = -torch.inf
        assert torch.equal(logits.argmax(-1), answer[:, 30:])


@pytest.mark.parametrize("name", TWO_WAYS)
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_an_image_that_is_read_in_both_directions_is_refused(name: str) -> None:
    model, call = multimodal(name), IMAGES[name]()
    base = copy.deepcopy(model)
    ahn.attach(model, CONFIG)
    for action in (lambda: model(**call), lambda: model.generate(**call, max_new_tokens=3)):
        with pytest.raises(ahn.AHNError, match=r"more than causal .*, as for images that are read in both directions"):
            action()
    with ahn.mode(model, "full"):
        assert torch.equal(model(**call).logits, base(**call).logits)


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_a_model_that_takes_no_memory_is_named(name: str) -> None:
    model = multimodal(name)
    with pytest.raises(ahn.AHNError, match=REFUSED[name]) as error:
        ahn.attach(model)
    assert type(model).__name__ in str(error.value)


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_a_call_that_was_broken_off_is_not_taken_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """After Ctrl-C torch runs no hook, so that the call seems to go on: here that of another model, then its own."""
    model, other, ids = multimodal("gemma3"), with_memory(), text(1, 40).clamp(max=120)
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
