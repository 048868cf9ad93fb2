"""Attaching: bad input in one clear line, layers that slide by themselves, gradients, and the public surface."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import ahn
from ahn.attachment import attachment_of
from ahn.cache import HippocampalLayer
from ahn.checkpoint.content import memory_tensors
from tests.tiny import MEMORIES, read, text, tiny, with_memory


def message_of(action: Any) -> str:
    """The message of the error that an action raises; it must be one line."""
    with pytest.raises(ahn.AHNError) as error:
        action()
    assert "\n" not in str(error.value)
    return str(error.value)


BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "window-0": ({"window": 0}, "window"),
    "sinks-negative": ({"sinks": -1}, "sinks"),
    "window-fraction": ({"window": 0.5}, "window"),
    "memory-not-a-name": ({"memory": 3}, "memory"),
    "sink-positions": ({"sink_positions": "far"}, "absolute, bounded"),
    "memory-positions": ({"memory_positions": "some"}, "rope, none"),
    "layers-empty": ({"layers": ()}, "layers"),
    "layers-negative": ({"layers": (-1,)}, "layers"),
    "layers-twice": ({"layers": (1, 1)}, "twice"),
    "layers-a-number": ({"layers": 1}, "at least one layer by its index from 0, not 1"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_configs(case: str) -> None:
    settings, word = BAD_CONFIGS[case]
    assert word in message_of(lambda: ahn.AHNConfig(**settings))


@pytest.mark.parametrize("config", [{}, {"window": 3}, "delta_net", ahn.AHNConfig], ids=str)
def test_a_config_of_another_type(config: Any) -> None:
    model, refused = tiny(), "a config must be an ahn.AHNConfig"
    assert refused in message_of(lambda: ahn.attach(model, config))
    assert refused in message_of(lambda: ahn.attached(model, config).__enter__())


def test_unknown_memory_names_the_known_ones() -> None:
    message = message_of(lambda: ahn.attach(tiny(), ahn.AHNConfig(memory="gru")))
    assert all(name in message for name in MEMORIES)


def test_layer_beyond_the_last() -> None:
    assert "last layer is 2" in message_of(lambda: ahn.attach(tiny(), ahn.AHNConfig(layers=(0, 3))))


def test_attached_twice() -> None:
    model = with_memory()
    assert "ahn.detach" in message_of(lambda: ahn.attach(model))


def test_detached_without_a_memory() -> None:
    assert "ahn.attach" in message_of(lambda: ahn.detach(tiny()))


def test_no_transformers_model() -> None:
    assert "Linear" in message_of(lambda: ahn.attach(nn.Linear(2, 2)))


def test_weights_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(tiny().config)
    assert "load them" in message_of(lambda: ahn.attach(model))


def test_sinks_leave_no_window_in_a_sliding_layer() -> None:
    model = tiny("mistral", sliding_window=12)
    assert "slides over 12" in message_of(lambda: ahn.attach(model, ahn.AHNConfig(window=16, sinks=12)))


def test_config_round_trip() -> None:
    config = ahn.AHNConfig(memory="mamba2", window=7, sinks=0, layers=(2, 0), memory_positions="none")
    assert ahn.AHNConfig.from_dict(config.to_dict()) == config
    assert "unknown settings" in message_of(lambda: ahn.AHNConfig.from_dict({"windows": 3}))


def test_attached_detaches_also_after_an_error() -> None:
    model = tiny()
    with pytest.raises(KeyError), ahn.attached(model):
        raise KeyError
    ahn.attach(model)


def test_failed_attach_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    monkeypatch.setattr("ahn.surgery._verify", lambda *_: (_ for _ in ()).throw(ahn.AHNError("no")))
    with pytest.raises(ahn.AHNError):
        ahn.attach(model)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert "_ahn_attachment" not in vars(model)


def memories(model: Any) -> list[bool]:
    return [layer.memory is not None for layer in attachment_of(model).layers]


def test_models_that_slide_in_some_layers_get_memories_in_the_others() -> None:
    assert memories(with_memory("gemma3_text")) == [False, True, True]
    assert memories(with_memory("gpt_oss")) == [False, True, True]


def test_a_model_that_slides_everywhere_gets_memories_everywhere() -> None:
    """Its exact tokens never pass its own sliding window, so that it stays the base model up to there."""
    model = with_memory("mistral", model={"sliding_window": 12}, sinks=3)
    assert memories(model) == [True, True, True]
    ids, cache = text(1, 60), ahn.HippocampalCache(model)
    read(model, ids, 7, cache=cache)
    layer: Any = cache.layers[0]
    assert isinstance(layer, HippocampalLayer)
    assert (layer.exact.sinks, layer.exact.window) == (3, 9)
    with ahn.mode(model, "full"):
        expected = read(model, ids)[:, :12]
    torch.testing.assert_close(read(model, ids)[:, :12], expected, rtol=0, atol=1e-4)


def test_chosen_layers_only() -> None:
    model = with_memory(layers=(1,))
    assert memories(model) == [False, True, False]
    cache, ids = ahn.HippocampalCache(model), text(2, 70)
    chunked = read(model, ids, [30, 1, 1, 38], cache=cache)
    torch.testing.assert_close(chunked, read(model, ids), rtol=0, atol=1e-4)
    assert isinstance(cache.layers[0], transformers.DynamicLayer) or cache.layers[0].keys.size(2) == 70
    padded = torch.nn.functional.pad(ids[:1, 20:], (20, 0))
    mask = (padded != 0).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    alone = read(model, ids[:1, 20:])
    for chunks in (None, 9):
        logits = read(model, padded, chunks, attention_mask=mask, position_ids=positions)
        torch.testing.assert_close(logits[:, 20:], alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("positions", ["rope", "none"])
def test_gradients_reach_every_weight_of_the_memory(memory: str, positions: Any) -> None:
    model = with_memory(memory=memory, memory_positions=positions)
    model.train()
    logits = model(text(2, 60)).logits
    logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        if ".memory." in name:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = with_memory()
        model.train()
        if checkpointing:
            new = hasattr(model, "activation_checkpointing_enable")  # transformers 5.23 renamed it
            (model.activation_checkpointing_enable if new else model.gradient_checkpointing_enable)()
        model.get_input_embeddings().requires_grad_(True)
        ids, mask = text(2, 60), torch.ones(2, 60, dtype=torch.long)
        mask[1, :17] = 0
        model(ids, attention_mask=mask).logits.square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if ".memory." in n})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_training_with_a_cache_cuts_the_graph_between_calls() -> None:
    model, ids = with_memory(), text(1, 60)
    model.train()
    cache = ahn.HippocampalCache(model)
    loss = sum(model(part, cache=cache).logits.square().sum() for part in ids.split(20, dim=1))
    loss.backward()
    assert model.model.layers[0].self_attn.memory.o_proj.grad.isfinite().all()


@torch.no_grad()
def test_bfloat16_stays_close() -> None:
    model, ids = with_memory(), text(1, 70)
    expected = read(model, ids)
    weights = {name: tensor.clone() for name, tensor in memory_tensors(model).items()}
    ahn.detach(model)
    ahn.attach(model.to(torch.bfloat16), ahn.AHNConfig(window=16, sinks=5))
    for name, tensor in memory_tensors(model).items():
        tensor.copy_(weights[name])
    actual, slowly = read(model, ids), read(model, ids, 1)
    assert actual.dtype == torch.bfloat16
    for logits in (actual, slowly):
        error = (logits.float() - expected).abs().mean() / expected.abs().mean()
        assert error < 0.1


@torch.no_grad()
def test_saved_and_copied_models(tmp_path: Any) -> None:
    model, ids = with_memory(), text(1, 40)
    with ahn.mode(model, "full"):
        expected = read(model, ids)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(read(again, ids), expected)
    twin = copy.deepcopy(model)
    assert torch.equal(read(twin, ids), read(model, ids))
    assert torch.equal(*(each.generate(ids, max_new_tokens=9, do_sample=False) for each in (twin, model)))
    before = read(model, ids)
    for layer in attachment_of(twin).layers:
        layer.memory.o_proj.zero_()
    with ahn.mode(twin, "window"):
        silent = read(twin, ids)
    assert torch.equal(read(twin, ids), silent)
    assert torch.equal(read(model, ids), before)
    ahn.detach(twin)
    assert torch.equal(read(twin, ids), expected)
    assert not torch.equal(read(model, ids), expected)


def test_everything_public_is_documented() -> None:
    for name in ahn.__all__:
        item = getattr(ahn, name)
        if inspect.isfunction(item) or inspect.isclass(item):
            assert inspect.getdoc(item), name
        if inspect.isfunction(item):
            assert all(parameter in inspect.getdoc(item) for parameter in inspect.signature(item).parameters), name
    assert set(ahn.__all__) <= set(dir(ahn))
    with pytest.raises(AttributeError):
        ahn.nothing  # noqa: B018
