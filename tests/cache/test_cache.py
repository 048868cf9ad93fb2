"""The cache: constant size, a ring that moves nothing, save, load, fork, crop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ahn
from ahn.backbone.compat import CACHE
from ahn.cache import HippocampalLayer
from ahn.cache.storage import FORMAT, describe_cache
from ahn.errors import CacheError
from tests.tiny import read, state_size, text, tiny, with_memory


@pytest.fixture(scope="module")
def model(memory: str) -> Any:
    return with_memory("llama", memory)


def exact_layer(cache: Any, index: int = 0) -> HippocampalLayer:
    layer = cache.layers[index]
    assert isinstance(layer, HippocampalLayer)
    return layer


def test_bytes_stop_growing_once_the_window_is_full(model: Any) -> None:
    cache, ids = ahn.HippocampalCache(model), text(2, 400)
    sizes = []
    for start in range(0, 400, 10):
        read(model, ids[:, start : start + 10], [6, 1, 1, 1, 1], cache=cache)
        sizes.append(cache.nbytes)
    assert len(set(sizes[3:])) == 1


def test_nbytes_counts_every_tensor(model: Any, memory: str) -> None:
    cache = ahn.HippocampalCache(model)
    read(model, text(2, 60), 20, cache=cache)
    gates = cache.attachment.layers[0].memory.gate_count
    batch, layers, heads, kv_heads, size, exact = 2, 3, 4, 2, 8, 5 + 16
    per_layer = exact * (2 * kv_heads * size + gates * heads) + heads * state_size(memory, size) ** 2
    assert cache.nbytes == 4 * batch * layers * per_layer


def test_a_new_token_moves_no_other(model: Any) -> None:
    cache = ahn.HippocampalCache(model)
    read(model, text(1, 60), 20, cache=cache)
    layer = exact_layer(cache)
    assert layer.exact.buffer is not None
    before, where = layer.exact.buffer.map(torch.clone), layer.exact.buffer.keys.data_ptr()
    read(model, text(1, 1, seed=9), 1, cache=cache)
    after = layer.exact.buffer
    changed = (before.keys != after.keys).any(-1).any(1)[0].nonzero().flatten().tolist()
    assert changed == [5 + (60 - 5) % 16]
    assert after.keys.data_ptr() == where


def test_ring_holds_sinks_and_the_last_tokens(model: Any) -> None:
    """Every slot against the keys of a full cache."""
    ids, cache = text(1, 60), ahn.HippocampalCache(model)
    read(model, ids, [33, 1, 1, 25], cache=cache)
    with ahn.mode(model, "full"), torch.no_grad():
        keys = model(ids)[CACHE].layers[0].keys
    held = exact_layer(cache).exact.buffer
    assert held is not None
    order = [*range(5), *(max(j for j in range(44, 60) if (j - 5) % 16 == slot) for slot in range(16))]
    torch.testing.assert_close(held.keys, keys[:, :, order], rtol=0, atol=1e-5)


def test_fork_and_saved_file_continue_bit_for_bit(model: Any, tmp_path: Path) -> None:
    cache = ahn.HippocampalCache(model)
    read(model, text(2, 60), 20, cache=cache)
    cache.save(tmp_path / "cache.safetensors")
    twin, loaded = cache.fork(), ahn.HippocampalCache.load(tmp_path / "cache.safetensors", model)
    more = text(2, 30, seed=8)
    logits = [read(model, more, [20, 1, 9], cache=each) for each in (cache, twin, loaded)]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    assert cache.nbytes == twin.nbytes == loaded.nbytes
    assert [p.name for p in tmp_path.iterdir()] == ["cache.safetensors"]


def test_fork_is_independent(model: Any) -> None:
    cache = ahn.HippocampalCache(model)
    read(model, text(1, 60), 20, cache=cache)
    twin = cache.fork()
    expected = read(model, text(1, 5, seed=4), cache=twin.fork())
    read(model, text(1, 40, seed=5), 1, cache=cache)
    assert torch.equal(read(model, text(1, 5, seed=4), cache=twin), expected)


def test_padded_cache_survives_saving(model: Any, tmp_path: Path) -> None:
    ids, mask = text(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[1, :30] = 0
    expected = read(model, ids, [17, 23], attention_mask=mask)
    cache = ahn.HippocampalCache(model)
    first = read(model, ids[:, :17], [17], attention_mask=mask[:, :17], cache=cache)
    cache.save(tmp_path / "cache")
    with torch.no_grad():
        loaded = ahn.HippocampalCache.load(tmp_path / "cache", model)
        rest = model(ids[:, 17:], attention_mask=mask, cache=loaded).logits
    assert torch.equal(torch.cat((first, rest), 1), expected)


def test_layers_with_full_attention_are_saved_too(tmp_path: Path) -> None:
    model = with_memory("gemma3_text", layers=(1,))
    cache = ahn.HippocampalCache(model)
    read(model, text(1, 50), 20, cache=cache)
    cache.save(tmp_path / "cache")
    loaded = ahn.HippocampalCache.load(tmp_path / "cache", model)
    more = text(1, 20, seed=8)
    assert torch.equal(*(read(model, more, [11, 1, 8], cache=each) for each in (cache, loaded)))


def test_describe_without_a_model(model: Any, tmp_path: Path) -> None:
    cache = ahn.HippocampalCache(model)
    read(model, text(2, 60), 20, cache=cache)
    cache.save(tmp_path / "cache")
    found = describe_cache(tmp_path / "cache")
    assert (found["seen_tokens"], found["rows"], found["nbytes"]) == (60, 2, cache.nbytes)


def test_crop_while_nothing_has_left(model: Any) -> None:
    cache, ids = ahn.HippocampalCache(model), text(1, 21)
    read(model, ids[:, :15], cache=cache)
    read(model, text(1, 4, seed=6), cache=cache)
    cache.crop(-4)
    rest = read(model, ids[:, 15:], cache=cache)
    torch.testing.assert_close(rest, read(model, ids)[:, 15:], rtol=0, atol=1e-5)
    read(model, text(1, 3, seed=2), cache=cache)
    with pytest.raises(ahn.AHNError, match="fork"):
        cache.crop(-1)


def test_reset_forgets_everything(model: Any) -> None:
    cache, ids = ahn.HippocampalCache(model), text(1, 50)
    read(model, text(1, 70, seed=4), 20, cache=cache)
    cache.reset()
    assert cache.nbytes == 0
    assert cache.seen_tokens == 0
    assert torch.equal(read(model, ids, cache=cache), read(model, ids))


def damaged(kind: str, path: Path, model: Any) -> Any:
    """Spoils a saved cache in one way; returns the model to load it with."""
    content = path.read_bytes()
    if kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    if kind == "no-safetensors":
        path.write_text("hello")
    if kind == "missing":
        path.unlink()
    if kind == "another-safetensors":
        save_file({"weight": torch.zeros(2)}, path)
    if kind == "another-shape":
        return with_memory("llama", model={"num_key_value_heads": 4})
    if kind == "another-memory":
        return with_memory("llama", "mamba2" if model.config is not None else "")
    if kind == "nothing-attached":
        return tiny()
    return model


@pytest.mark.parametrize(
    "kind",
    [
        "truncated",
        "no-safetensors",
        "missing",
        "another-safetensors",
        "another-shape",
        "another-memory",
        "nothing-attached",
    ],
)
def test_bad_files_are_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    model = with_memory("llama")
    cache = ahn.HippocampalCache(model)
    read(model, text(1, 30), cache=cache)
    cache.save(tmp_path / "cache")
    other = damaged(kind, tmp_path / "cache", model)
    with pytest.raises(ahn.AHNError) as error:
        ahn.HippocampalCache.load(tmp_path / "cache", other)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("found", "remedy"), [(1, "read the text again and save it anew"), (FORMAT + 1, "update ahn")], ids=["old", "new"]
)
def test_another_format_is_refused(found: int, remedy: str, tmp_path: Path) -> None:
    """Since format 2, Mamba2 keeps one more number for each token and head."""
    model = with_memory("llama", "mamba2")
    cache = ahn.HippocampalCache(model)
    read(model, text(1, 30), cache=cache)
    cache.save(tmp_path / "cache")
    with safe_open(tmp_path / "cache", "pt") as file:
        header = json.loads(file.metadata()["ahn_cache"])
    header["format"] = found
    save_file(load_file(tmp_path / "cache"), tmp_path / "cache", metadata={"ahn_cache": json.dumps(header)})
    with pytest.raises(ahn.AHNError) as error:
        ahn.HippocampalCache.load(tmp_path / "cache", model)
    message = f"{tmp_path / 'cache'} has format {found}, this version of ahn reads {FORMAT}; {remedy}"
    assert str(error.value) == message


def test_saving_into_nowhere_is_refused(model: Any, tmp_path: Path) -> None:
    with pytest.raises(ahn.AHNError, match="cannot write"):
        ahn.HippocampalCache(model).save(tmp_path / "no" / "folder")


def test_file_holds_the_tensors_by_name(tmp_path: Path) -> None:
    model = with_memory("llama")
    cache = ahn.HippocampalCache(model)
    read(model, text(1, 30), cache=cache)
    cache.save(tmp_path / "cache")
    assert set(load_file(tmp_path / "cache")) == {
        f"{layer}.{name}" for layer in range(3) for name in ("keys", "values", "record", "state")
    }


@pytest.mark.parametrize(
    ("settings", "word"),
    [({"window": 0}, "window"), ({"sinks": -1}, "sinks"), ({"window": 2.5}, "window"), ({"window": True}, "window")],
    ids=str,
)
def test_bad_settings(model: Any, settings: dict[str, Any], word: str) -> None:
    with pytest.raises(ahn.AHNError, match=word):
        ahn.HippocampalCache(model, **settings)


def test_wrong_batch_is_refused(model: Any) -> None:
    cache = ahn.HippocampalCache(model)
    read(model, text(2, 30), cache=cache)
    with pytest.raises(ahn.AHNError, match="2 rows"):
        read(model, text(3, 4), cache=cache)


def test_cache_of_another_attachment_is_refused(model: Any) -> None:
    cache = ahn.HippocampalCache(model)
    with pytest.raises(ahn.AHNError, match="another model"):
        read(with_memory("llama"), text(1, 4), cache=cache)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_cache_is_refused_by_a_model_without_a_memory(family: str) -> None:
    """The base model's own attention would read nothing of what the cache holds, whether it had a memory or never."""
    model, ids = with_memory(family, sinks=2), text(1, 40)
    cache, refused = ahn.HippocampalCache(model), "the model that reads with it has none"
    expected = read(model, ids, [30, 10], cache=cache.fork())
    read(model, ids[:, :30], cache=cache)
    with pytest.raises(CacheError, match=refused):
        read(tiny(family), ids[:, :5], cache=cache)
    torch.testing.assert_close(read(model, ids[:, 30:], cache=cache), expected[:, 30:])
    ahn.detach(model)
    with pytest.raises(CacheError, match=refused):
        read(model, ids[:, :5], cache=cache)
    with pytest.raises(CacheError, match=refused):
        model.generate(text(1, 60), max_new_tokens=2, **{CACHE: cache})
