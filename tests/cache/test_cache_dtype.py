"""Sinks, window and anchors in half precision: as if keys and values were rounded, and half the bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.modeling_utils import AttentionInterface

import ahn
from ahn import native
from ahn.attention import function
from ahn.cache import HippocampalLayer
from ahn.cache.layer_kinds import layer_tensors
from ahn.cost import cost_model
from ahn.errors import CacheError, ConfigError
from ahn.native.segments import Segment
from tests.tiny import awaken, text, tiny, with_memory

DTYPES = ("bfloat16", "float16")
WINDOW, SINKS = 12, 3


def model_of(**config: Any) -> Any:
    torch.manual_seed(0)
    model = tiny("llama", hidden_size=64, head_dim=16, max_position_embeddings=40)
    ahn.attach(model, ahn.AHNConfig(window=WINDOW, sinks=SINKS, **config))
    awaken(model)
    return model


@torch.no_grad()
def read(model: Any, sizes: tuple[int, ...] = (30, 1, 1, 1, 9, 1, 1), rows: int = 1) -> tuple[torch.Tensor, Any]:
    cache = ahn.HippocampalCache(model)
    parts = text(rows, sum(sizes)).split(sizes, dim=1)
    return torch.cat([model(part, cache=cache).logits for part in parts], 1), cache


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("settings", [{}, {"anchors": 4, "sink_positions": "bounded"}, {"mode": "ct_mean"}], ids=str)
def test_is_the_same_as_rounding(dtype: str, kernels: bool, settings: dict[str, Any]) -> None:
    """Against a cache in float32 whose keys and values were rounded before they came."""
    model, settings = model_of(), dict(settings)
    mode = settings.pop("mode", "ahn")
    attend = function.attention_function

    def rounding(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        key, value = (each.to(getattr(torch, dtype)).float() for each in (key, value))
        return attend(module, query, key, value, *args, **kwargs)

    off = native.switched_off if not kernels else torch.no_grad
    with off():
        with ahn.mode(model, mode, cache_dtype=dtype, **settings):  # type: ignore[arg-type]
            got, cache = read(model)
            tokenwise, _ = read(model, (30, *[1] * 14))
        other = model_of()
        AttentionInterface.register("ahn", rounding)
        try:
            with native.switched_off(), ahn.mode(other, mode, **settings):
                expected, _ = read(other)
        finally:
            AttentionInterface.register("ahn", attend)
    # Slots of pooled tokens are rounded once more; by kernels, a key between two numbers may fall on either.
    step = torch.finfo(getattr(torch, dtype)).eps
    tolerance = 2e-2 if mode == "ct_mean" else 2 * step if kernels else 1e-5
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(tokenwise, got, atol=2e-3, rtol=2e-3)
    for layer in cache.layers:
        assert isinstance(layer, HippocampalLayer)
        for name, tensor in layer.tensors().items():
            exact = name in ("state", "record") or name.startswith("key_")
            assert tensor.dtype is (torch.float32 if exact else getattr(torch, dtype)), name


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_saved_forked_and_counted(dtype: Any, tmp_path: Path) -> None:
    model, ids = model_of(cache_dtype=dtype), text(1, 60)
    _, cache = read(model)
    cache.save(tmp_path / "cache")
    expected = model(ids[:, :1], cache=cache.fork()).logits
    for twin in (ahn.HippocampalCache.load(tmp_path / "cache", model), cache.fork()):
        assert twin.settings.cache_dtype == dtype
        assert twin.nbytes == cache.nbytes
        assert torch.equal(model(ids[:, :1], cache=twin).logits, expected)
    whole = model_of()
    _, other = read(whole)
    ring = sum(layer.tensors()[name].nbytes for layer in cache.layers for name in ("keys", "values"))
    assert other.nbytes - cache.nbytes == ring
    other.save(tmp_path / "other")
    _pretend(tmp_path / "other", dtype)
    with pytest.raises(CacheError, match="stored in"):
        ahn.HippocampalCache.load(tmp_path / "other", whole)


def _pretend(path: Path, dtype: str) -> None:
    """Writes into a saved cache that it is in half precision."""
    import json

    from safetensors import safe_open
    from safetensors.torch import save_file

    from ahn.cache.storage import _checksum

    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["ahn_cache"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    header["settings"]["cache_dtype"] = dtype
    words = json.dumps(header)
    save_file(tensors, path, metadata={"ahn_cache": words, "sha256": _checksum(words, tensors)})


@torch.no_grad()
def test_a_cache_of_before_is_read(tmp_path: Path) -> None:
    """Without the setting, files and settings are those of before there was one."""
    model = model_of()
    _, cache = read(model)
    cache.save(tmp_path / "cache")
    assert "cache_dtype" not in ahn.cache.storage.describe_cache(tmp_path / "cache")["settings"]
    assert "cache_dtype" not in ahn.AHNConfig().to_dict()
    assert ahn.AHNConfig.from_dict(ahn.AHNConfig(cache_dtype="float16").to_dict()).cache_dtype == "float16"


@pytest.mark.parametrize("wrong", ["int8", "float32", torch.bfloat16, 3])
def test_other_dtypes_are_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="bfloat16, float16"):
        ahn.AHNConfig(cache_dtype=wrong)


def test_gradients_flow(memory: str) -> None:
    model, ids = with_memory("llama", memory, window=12, sinks=3), text(1, 40)
    awaken(model)
    with ahn.mode(model, "ahn", cache_dtype="bfloat16"):
        model(ids, labels=ids).loss.backward()
    gradients = [p.grad for name, p in model.named_parameters() if "memory" in name and p.grad is not None]
    assert gradients
    assert all(each.isfinite().all() for each in gradients)


def test_costs_follow() -> None:
    sizes = [
        cost_model("qwen2.5-3b", ahn.AHNConfig(window=2048, sinks=32, cache_dtype=dtype), dtype="float32")
        .at(100_000)["gated_delta_net"]
        .cache_bytes
        for dtype in (None, "bfloat16")
    ]
    ring = 36 * 2 * 2 * 128 * 2080 * 2
    assert sizes[0] - sizes[1] == ring


@pytest.mark.skipif(native.why_not() is not None, reason="no kernels here")
class TestKernel:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize(("heads", "groups", "size", "places"), [(2, 2, 16, 1), (9, 3, 64, 301), (4, 1, 48, 33)])
    def test_against_float64(self, dtype: torch.dtype, heads: int, groups: int, size: int, places: int) -> None:
        query = torch.randn(2, heads, 1, size)
        keys, values = (torch.randn(2, groups, places, size).to(dtype) for _ in range(2))
        got = native.attend_one([Segment(query, keys, values)], places, size**-0.5)
        wide = (each.double().repeat_interleave(heads // groups, 1) for each in (keys, values))
        expected = torch.nn.functional.scaled_dot_product_attention(query.double(), *wide)
        torch.testing.assert_close(got.double(), expected.transpose(1, 2), atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("dtype", DTYPES)
    @torch.no_grad()
    def test_rounds_as_torch_does(self, dtype: Any) -> None:
        """What a kernel puts into the ring is what torch rounds the key and value to."""
        model, ids = model_of(cache_dtype=dtype), text(1, 40)
        for layer in model.model.layers:  # keys of many sizes, down to subnormal numbers of float16
            layer.self_attn.k_proj.weight.mul_(torch.logspace(-7, 4, layer.self_attn.k_proj.weight.size(0))[:, None])
        rings = []
        for kernels in (True, False):
            cache = ahn.HippocampalCache(model)
            model(ids[:, :20], cache=cache)
            model(ids[:, 20:21], cache=cache)
            if not kernels:
                ahn.attention.decoder_layers.restore(model.model)
            model(ids[:, 21:22], cache=cache)
            rings.append(layer_tensors(cache.layers[0])["keys"])
        away = (rings[0].float() - rings[1].float()).abs() / rings[1].float().abs().clamp(min=1e-7)
        assert float(away.max()) <= (2**-7 if dtype == "bfloat16" else 0.6)
        assert float((away > 0).float().mean()) < 0.01  # a key between two numbers may fall on either
