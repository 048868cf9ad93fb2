"""Decoding together: what all layers do at once gives what each does alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ahn
from ahn.attention import hooks
from ahn.cache.layer_kinds import layer_tensors
from ahn.memories import Memory, MemoryShape, build_memory
from tests.tiny import awaken, text, tiny, with_memory

SINKS, WINDOW = 3, 14
SHAPE = MemoryShape(hidden_size=12, query_heads=4, kv_heads=2, key_size=8, value_size=8)
LAYERS, ROWS = 3, 2


@pytest.fixture
def memories(memory: str) -> list[Memory]:
    torch.manual_seed(0)
    return [build_memory(memory, SHAPE) for _ in range(LAYERS)]


@torch.no_grad()
def test_gates_of_layers(memories: list[Memory]) -> None:
    x = torch.randn(LAYERS, ROWS, SHAPE.hidden_size)
    expected = torch.stack([each.gates(x[layer][:, None])[:, 0] for layer, each in enumerate(memories)])
    torch.testing.assert_close(type(memories[0]).gates_of_layers(memories, x), expected)


@torch.no_grad()
def test_update_and_read_are_what_the_scan_does(memories: list[Memory]) -> None:
    keys, values = (torch.randn(LAYERS, ROWS, SHAPE.kv_heads, SHAPE.key_size) for _ in range(2))
    gates = type(memories[0]).gates_of_layers(memories, torch.randn(LAYERS, ROWS, SHAPE.hidden_size))
    query = torch.randn(ROWS, 1, SHAPE.query_heads, SHAPE.key_size)
    before = torch.randn(LAYERS, ROWS, *memories[0].state_shape())
    states = before.clone()
    type(memories[0]).update(memories, keys, values, gates, states)
    for layer, each in enumerate(memories):
        token = (tensor[layer][:, None] for tensor in (keys, values, gates))
        read, after = each.scan(query, *token, before[layer])
        torch.testing.assert_close(states[layer], after)
        torch.testing.assert_close(each.read(query, states[layer]), read)


def decoded(model: Any, ids: torch.Tensor, start: int, **arguments: Any) -> tuple[torch.Tensor, Any]:
    """Logits of the tokens from `start` on, read one by one, and the cache."""
    cache = ahn.HippocampalCache(model)
    mask = arguments.get("attention_mask")
    parts = []
    for begin, end in [(0, start), *((at, at + 1) for at in range(start, ids.size(1)))]:
        given = {} if mask is None else {"attention_mask": mask[:, :end]}
        parts.append(model(ids[:, begin:end], cache=cache, **given).logits)
    return torch.cat(parts[1:], dim=1), cache


def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "begin_step", lambda *call: None)


@pytest.mark.parametrize("start", [1, 8, 16, 30])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3"])
@pytest.mark.parametrize("mode", ["ahn", "window"])
@torch.no_grad()
def test_together_as_alone(family: str, start: int, mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(family)
    ahn.attach(model, ahn.AHNConfig(window=WINDOW - 4, sinks=SINKS))
    awaken(model)
    ids = text(2)[:, :44]
    with ahn.mode(model, mode):
        together, cache = decoded(model, ids, start)
        assert bool(cache.groups)
        alone(monkeypatch)
        expected, other = decoded(model, ids, start)
    torch.testing.assert_close(together, expected, rtol=0, atol=1e-4)
    assert cache.nbytes == other.nbytes
    for mine, theirs in zip(cache.layers, other.layers, strict=True):
        for name, tensor in layer_tensors(mine).items():
            torch.testing.assert_close(tensor, layer_tensors(theirs)[name], rtol=0, atol=1e-4)


@torch.no_grad()
def test_padded_rows_decode_together_once_their_padding_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_memory("llama", window=WINDOW, sinks=SINKS)
    ids, mask = text(2)[:, :50], torch.ones(2, 50, dtype=torch.long)
    mask[0, :6] = 0
    together, _ = decoded(model, ids, 9, attention_mask=mask)
    alone(monkeypatch)
    expected, _ = decoded(model, ids, 9, attention_mask=mask)
    torch.testing.assert_close(together, expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_states_that_were_replaced_are_gathered_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_memory("llama", window=WINDOW, sinks=SINKS)
    ids = text(2)[:, :40]
    _, cache = decoded(model, ids[:, :30], 20)
    cache.save(tmp_path / "cache.safetensors")
    twin, loaded = cache.fork(), ahn.HippocampalCache.load(tmp_path / "cache.safetensors", model)
    cache.reorder_cache(torch.tensor([1, 0]))
    model(ids.flip(0)[:, 30:33], cache=cache)  # a chunk in between
    model(ids[:, 30:33], cache=twin)
    model(ids[:, 30:33], cache=loaded)
    ends = [
        model(rows[:, 33:34], cache=held).logits for rows, held in ((ids.flip(0), cache), (ids, twin), (ids, loaded))
    ]
    alone(monkeypatch)
    expected, _ = decoded(model, ids[:, :34], 33)
    for end in (ends[0].flip(0), *ends[1:]):
        torch.testing.assert_close(end, expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_fork_does_not_change_what_it_was_taken_from() -> None:
    model = with_memory("llama", window=WINDOW, sinks=SINKS)
    ids = text(2)[:, :40]
    _, cache = decoded(model, ids[:, :30], 20)
    before = {name: tensor.clone() for layer in cache.layers for name, tensor in layer.tensors().items()}
    model(ids[:, 30:31], cache=cache.fork())
    after = {name: tensor for layer in cache.layers for name, tensor in layer.tensors().items()}
    assert all(torch.equal(before[name], after[name]) for name in before)
