"""Where other libraries begin: bases quantised, offloaded or wrapped; saving, pickling and copying by their means."""

from __future__ import annotations

import copy
import io
import logging
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional

import ahn
from ahn.attachment import attachment_of
from ahn.backbone.compat import CACHE
from ahn.cache.layer_kinds import layer_tensors
from ahn.checkpoint.content import memory_tensors
from tests.tiny import awaken, read, text, tiny, with_memory

IDS = text(1, 60)
CONFIG = ahn.AHNConfig(window=16, sinks=5)


class BufferLinear(nn.Module):
    """A linear map whose weights are integers in buffers, as GPTQ and AWQ keep them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("qweight", (linear.weight / scale).round().to(torch.int8))
        self.register_buffer("scales", scale.half())
        self.register_buffer("bias", linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.qweight.to(x.dtype) * self.scales.to(x.dtype), self.bias)


def in_buffers(model: Any) -> Any:
    """The model with all linear maps of its layers in buffers, its norms too."""
    for layer in model.model.layers:
        for module in list(layer.modules()):
            for name, child in list(module.named_children()):
                if type(child) is nn.Linear:
                    setattr(module, name, BufferLinear(child))
    return model


def dynamically_quantised(model: Any) -> Any:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def by_quanto(model: Any) -> Any:
    quanto = pytest.importorskip("optimum.quanto")
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    return model


def by_torchao(model: Any) -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def read_base(model: Any, chunk: int) -> torch.Tensor:
    """Logits of a model without a memory, read in chunks on its own cache."""
    cache = transformers.DynamicCache(config=model.config)
    return torch.cat([model(part, **{CACHE: cache}).logits for part in IDS.split(chunk, dim=1)], dim=1)


class Float8Linear(nn.Module):
    """A linear map in float8 with one scale, as FP8 checkpoints keep them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.abs().max() / 448
        self.weight = nn.Parameter((linear.weight / scale).to(torch.float8_e4m3fn), requires_grad=False)
        self.weight_scale_inv = nn.Parameter(scale, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight.to(x.dtype) * self.weight_scale_inv.to(x.dtype))


def in_float8(model: Any) -> Any:
    for layer in model.model.layers:
        for module in list(layer.modules()):
            for name, child in list(module.named_children()):
                if type(child) is nn.Linear:
                    setattr(module, name, Float8Linear(child))
    return model


QUANTISED = {
    "buffers": in_buffers,
    "float8": in_float8,
    "torch.ao": dynamically_quantised,
    "quanto": by_quanto,
    "torchao": by_torchao,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", QUANTISED)
@torch.no_grad()
def test_a_quantised_base_takes_a_memory(kind: str) -> None:
    model = QUANTISED[kind](tiny(hidden_size=64, head_dim=16))
    expected = model(IDS).logits
    rounding = {chunks: float((read_base(model, chunks) - expected).abs().mean()) for chunks in (1, 7)}
    ahn.attach(model, CONFIG)
    awaken(model)
    assert {layer.memory.o_proj.dtype for layer in attachment_of(model).layers} == {torch.float32}
    with ahn.mode(model, "full"):
        assert torch.equal(model(IDS).logits, expected)
    whole = model(IDS).logits
    assert not torch.equal(whole, expected)
    for chunks in (1, 7):
        # torch.ao rounds activations by what else a call holds: the base itself depends on the chunks, and the random
        # memory multiplies what it reads.
        allowed = max(1e-4, 4 * rounding[chunks])
        assert (read(model, IDS, chunks) - whole).abs().mean() <= allowed
    ahn.detach(model)
    assert torch.equal(model(IDS).logits, expected)


@torch.no_grad()
def test_an_offloaded_base_takes_a_memory(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    plain = with_memory()
    model = tiny()
    accelerate.disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    ahn.attach(model, CONFIG)
    awaken(model)
    for chunks in (None, 1, 13):  # kernels read only the one of them, and round otherwise
        expected = read(plain, IDS, chunks)
        torch.testing.assert_close(read(model, IDS, chunks), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("memory", ["gated_delta_net", "mamba2"])
@torch.no_grad()
def test_a_memory_is_offloaded_with_its_base(memory: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = with_memory(memory=memory)
    expected = read(model, IDS)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in model.parameters())
    for chunks in (None, 1, 13):
        torch.testing.assert_close(read(model, IDS, chunks), expected, rtol=0, atol=1e-4)
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"memory_positions": "none", "sink_positions": "bounded", "model": {"max_position_embeddings": 30}},
        {"layers": (0, 2)},
    ],
    ids=str,
)
@pytest.mark.parametrize("padding", [0, 3])
@torch.no_grad()
def test_layers_on_several_devices(settings: dict[str, Any], padding: int) -> None:
    """The last layer is on the meta device, where any operation that takes a tensor from elsewhere fails."""
    hooks = pytest.importorskip("accelerate.hooks")
    model, ids, mask = with_memory(**settings), text(2, 60), torch.ones(2, 60, dtype=torch.long)
    mask[1, :padding] = 0
    for module in (model.model.layers[2], model.model.norm, model.lm_head):
        module.to("meta")
        hook = hooks.AlignDevicesHook(execution_device="meta", io_same_device=False, skip_keys=["cache", CACHE])
        hooks.add_hook_to_module(module, hook)
    cache, start = ahn.HippocampalCache(model), 0
    for tokens in (30, 20, 1, 1, 8):
        mask_now = mask[:, : start + tokens]
        logits = model(ids[:, start : start + tokens], attention_mask=mask_now, **{CACHE: cache}).logits
        start += tokens
    assert logits.shape == (2, 8, 128)
    cache.reorder_cache(torch.tensor([1, 0]))
    assert {tensor.device.type for tensor in layer_tensors(cache.fork().layers[2]).values()} == {"meta"}
    assert {tensor.device.type for tensor in layer_tensors(cache.fork().layers[0]).values()} == {"cpu"}


def test_weights_that_torch_only_stores_are_named() -> None:
    with pytest.raises(ahn.AHNError, match=r"are in float8_e4m3fn, in which torch only stores: load the model with"):
        ahn.attach(tiny().to(torch.float8_e4m3fn))


def test_weights_that_are_nowhere_are_named() -> None:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(tiny().config)
    with pytest.raises(ahn.AHNError, match="are not loaded"):
        ahn.attach(model)


class TestWrappers:
    @torch.no_grad()
    def test_compiled(self) -> None:
        model = tiny()
        compiled = torch.compile(model, backend="eager")
        ahn.attach(compiled, CONFIG)
        awaken(model)
        assert attachment_of(compiled) is attachment_of(model)
        assert torch.equal(read(model, IDS), read(with_memory(), IDS))
        ahn.detach(compiled)
        assert torch.equal(model(IDS).logits, tiny()(IDS).logits)

    @pytest.mark.filterwarnings("ignore")
    @torch.no_grad()
    def test_peft(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        peft = pytest.importorskip("peft")
        caplog.set_level(logging.ERROR, logger="transformers")  # peft asks for names that are deprecated
        wrapped = peft.get_peft_model(
            tiny(), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
        ).eval()
        ahn.attach(wrapped, CONFIG)
        awaken(wrapped)
        whole = read(wrapped, IDS)
        torch.testing.assert_close(read(wrapped, IDS, 1), whole, rtol=0, atol=1e-4)
        ahn.save(wrapped, tmp_path)
        ahn.load(wrapped, tmp_path)
        assert wrapped.generate(input_ids=IDS, max_new_tokens=3).shape == (1, 63)

    @pytest.mark.filterwarnings("ignore")
    def test_modules_to_save_of_peft(self, caplog: pytest.LogCaptureFixture) -> None:
        peft = pytest.importorskip("peft")
        caplog.set_level(logging.ERROR, logger="transformers")
        model = with_memory(window=8, sinks=2)
        before = read(model, IDS)
        settings = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["memory"])
        wrapped = peft.get_peft_model(model, settings)
        torch.testing.assert_close(read(wrapped, IDS), before, rtol=0, atol=1e-5)
        learning = [parameter for name, parameter in wrapped.named_parameters() if "modules_to_save" in name]
        assert learning
        optimizer = torch.optim.SGD(learning, lr=1.0)
        wrapped(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        assert all(parameter.grad is not None for parameter in learning)
        optimizer.step()
        after = read(wrapped, IDS)
        assert not torch.allclose(after, before, rtol=0, atol=1e-4)
        torch.testing.assert_close(read(wrapped, IDS, 1), after, rtol=0, atol=1e-4)
        with wrapped.disable_adapter():
            torch.testing.assert_close(read(wrapped, IDS, 1), before, rtol=0, atol=1e-4)


CASES: dict[str, dict[str, Any]] = {
    "memory": {},
    "mamba2": {"memory": "mamba2"},
    "anchors": {"anchors": 5, "anchor_score": "key_diff"},
    "unrotated": {"memory_positions": "none"},
    "slots": {"mode": "ct_max"},
    "bounded": {"sink_positions": "bounded", "model": {"max_position_embeddings": 24}},
    "softcap": {"family": "gemma2"},
    "all in half precision": {"family": "gpt2"},
    "kernels": {"family": "llama:wide", "anchors": 5, "anchor_score": "key_diff"},
}


@pytest.mark.parametrize("inside", ["both", "first", "second"])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_autocast(case: str, inside: str) -> None:
    settings = dict(CASES[case])
    mode, model = settings.pop("mode", "ahn"), with_memory(**settings)

    def autocast(part: str) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=inside in ("both", part))

    with ahn.mode(model, mode):
        expected = model(IDS).logits
        cache = ahn.HippocampalCache(model)
        with autocast("first"):
            parts = [model(IDS[:, :40], **{CACHE: cache}).logits]
        with autocast("second"):
            sizes = [1, 1, 1, 1, 10, 1, 1, 1, 1, 1, 1]
            parts += [model(new, **{CACHE: cache}).logits for new in IDS[:, 40:].split(sizes, dim=1)]
    found = torch.cat([part.float() for part in parts], dim=1)
    assert (found - expected).abs().mean() < 0.05 * expected.abs().mean()


@torch.no_grad()
def test_a_cache_of_autocast_is_saved(tmp_path: Path) -> None:
    model = with_memory("gpt2")
    cache = ahn.HippocampalCache(model)
    with torch.autocast("cpu", torch.bfloat16):
        model(IDS, **{CACHE: cache})
    cache.save(tmp_path / "cache")
    again = ahn.HippocampalCache.load(tmp_path / "cache", model)
    assert torch.equal(model(IDS[:, :5], **{CACHE: again}).logits, model(IDS[:, :5], **{CACHE: cache}).logits)


@torch.no_grad()
def test_new_tokens_alone_are_refused() -> None:
    model = with_memory()
    cache = ahn.HippocampalCache(model)
    model(IDS[:, :50], **{CACHE: cache})
    for action in (
        lambda: model.generate(IDS[:, 50:], max_new_tokens=2, **{CACHE: cache.fork()}),
        lambda: model.generate(IDS[:, :50], max_new_tokens=2, **{CACHE: cache.fork()}),
        lambda: model(IDS[:, :0], **{CACHE: cache.fork()}),
    ):
        with pytest.raises(ahn.AHNError, match="has read 50, does not have: generate takes the whole text"):
            action()
    whole = model.generate(IDS, max_new_tokens=2, eos_token_id=None, **{CACHE: cache.fork()})
    assert whole.shape == (1, 62)
    if CACHE == "cache":  # since transformers 5.24 a mask of the whole text says that the ids are the new ones alone
        mask = {"attention_mask": torch.ones_like(IDS)}
        new = model.generate(IDS[:, 50:], max_new_tokens=2, eos_token_id=None, **mask, **{CACHE: cache.fork()})
        assert torch.equal(new[:, -2:], whole[:, -2:])


def test_an_import_draws_no_random_numbers() -> None:
    code = (
        "import random, numpy, torch\n"
        "def now(): return random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()\n"
        "torch.manual_seed(0); before = now()\n"
        "import ahn.checkpoint, ahn.surgery, ahn.generation\n"
        "assert now() == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


class TestCopies:
    @torch.no_grad()
    def test_a_pickled_model(self) -> None:
        model, file = with_memory(sink_positions="bounded"), io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
        for chunks in (None, 1):
            assert torch.equal(read(again, IDS, chunks), read(model, IDS, chunks))
        assert torch.equal(again.generate(IDS, max_new_tokens=5), model.generate(IDS, max_new_tokens=5))
        ahn.detach(again)
        assert torch.equal(again(IDS).logits, tiny()(IDS).logits)

    @torch.no_grad()
    def test_a_copied_cache_goes_on_like_a_fork(self) -> None:
        model = with_memory()
        cache = ahn.HippocampalCache(model)
        model(IDS[:, :50], cache=cache)
        twin, fork = copy.deepcopy(cache), cache.fork()
        assert torch.equal(model(IDS[:, 50:], cache=twin).logits, model(IDS[:, 50:], cache=fork).logits)
        assert cache.seen_tokens == 50
        for action in (pickle.dumps, copy.copy):
            with pytest.raises(ahn.AHNError, match=r"cache\.save\(path\), copy it by fork\(\)"):
                action(cache)


class TestSavePretrained:
    @torch.no_grad()
    def test_gives_the_memory_back(self, tmp_path: Path) -> None:
        model = with_memory(memory="delta_net", memory_positions="none")
        model.save_pretrained(tmp_path)
        again = ahn.from_pretrained(tmp_path)
        assert attachment_of(again).config == attachment_of(model).config
        assert torch.equal(read(again, IDS), read(model, IDS))
        other = ahn.AHNConfig("delta_net", window=30, sinks=2, memory_positions="none")
        assert attachment_of(ahn.from_pretrained(tmp_path, config=other)).config.window == 30
        base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        with ahn.mode(model, "full"):
            assert torch.equal(base(IDS).logits, model(IDS).logits)

    def test_with_the_weights_of_anchor_scores(self, tmp_path: Path) -> None:
        from tests.tiny import give_score_weights

        model = with_memory()
        give_score_weights(model)
        model.save_pretrained(tmp_path)
        again = ahn.from_pretrained(tmp_path)
        assert [sorted(layer.anchor_weights or {}) for layer in attachment_of(again).layers] == [
            sorted(layer.anchor_weights or {}) for layer in attachment_of(model).layers
        ]

    def test_another_adapter_replaces_its_memory(self, tmp_path: Path) -> None:
        with_memory().save_pretrained(tmp_path / "both")
        ahn.save(with_memory(memory="mamba2"), tmp_path / "other")
        model = ahn.from_pretrained(tmp_path / "both", adapter=tmp_path / "other")
        assert attachment_of(model).config.memory == "mamba2"

    def test_of_a_trainer(self, tmp_path: Path) -> None:
        model = with_memory()
        arguments = transformers.TrainingArguments(output_dir=str(tmp_path / "run"), report_to=[], use_cpu=True)
        transformers.Trainer(model=model, args=arguments).save_model(str(tmp_path / "saved"))
        again = ahn.from_pretrained(tmp_path / "saved")
        for key, tensor in memory_tensors(model).items():
            assert torch.equal(memory_tensors(again)[key], tensor)

    def test_detached_it_saves_as_before(self, tmp_path: Path) -> None:
        model = with_memory()
        ahn.detach(model)
        model.save_pretrained(tmp_path)
        assert not (tmp_path / "ahn_config.json").exists()
