"""The slots of the Compressive Transformer against attention spelled out, and in every way of reading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ahn
from ahn.attachment import attachment_of
from ahn.attention.masks import visible_extra
from ahn.cache.compressive import POOLED, PooledStore, state_slots
from ahn.tokens import Padding, Tokens
from tests.tiny import read, state_size, text, with_memory

MODES = ("ct_max", "ct_mean")
SINKS, WINDOW = 5, 16


@pytest.fixture(scope="module", params=MODES)
def mode(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(scope="module", params=["llama", "qwen2", "gpt2", "gpt_oss", "gemma2"])
def model(request: pytest.FixtureRequest) -> Any:
    return with_memory(request.param)


def naive(keys: torch.Tensor, evicted: int, slots: int, mode: str) -> torch.Tensor:
    """Slots after so many evictions of `[E, size]` tokens, oldest first."""
    groups = [keys[start : start + POOLED] for start in range(0, evicted - POOLED + 1, POOLED)]
    pooled = [group.amax(0) if mode == "ct_max" else group.mean(0) for group in groups]
    return torch.stack(pooled[-slots:]) if pooled else keys[:0]


def seen_by(extra: Any, query: int, row: int = 0) -> torch.Tensor:
    """Keys that a query reads, in the order of their birth, `[n, size]` of the first head."""
    if extra is None:
        return torch.zeros(0, 3)
    visible_from = extra.visible_from[min(row, extra.visible_from.size(0) - 1)]
    allowed = visible_extra(extra, query, query + 1)[min(row, extra.visible_from.size(0) - 1), 0]
    order = [int(i) for i in visible_from.argsort() if allowed[i]]
    return extra.keys[row, 0, order]


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 8, 33, 100])
def test_store_against_the_loop(mode: str, chunk: int) -> None:
    slots, tokens = 3, 41
    keys = torch.randn(1, 2, tokens, 3, generator=torch.Generator().manual_seed(0))
    pooling: Any = mode.removeprefix("ct_")
    store = PooledStore(slots, pooling, SINKS, WINDOW)
    for start in range(0, tokens, chunk):
        part = keys[:, :, start : start + chunk]
        evicted = Tokens(part, part, part[:, :1, :, :0])
        first = SINKS + start
        view = store.append(evicted, first, None)
        for step in range(part.size(2)):
            expected = naive(keys[0, 0], start + step + 1, slots, mode)
            torch.testing.assert_close(seen_by(view, first + step + WINDOW), expected, rtol=0, atol=1e-6)


def test_rows_that_begin_later_have_their_own_groups(mode: str) -> None:
    tokens, slots = 30, 2
    keys = torch.randn(2, 1, tokens, 3, generator=torch.Generator().manual_seed(1))
    padding = Padding(torch.tensor([0, 6]), 6)
    store = PooledStore(slots, "max" if mode == "ct_max" else "mean", SINKS, WINDOW)
    for start in range(0, tokens, 7):
        part = keys[:, :, start : start + 7]
        view = store.append(Tokens(part, part, part[:, :, :, :0]), SINKS + start, padding)
        for step in range(part.size(2)):
            for row, pad in enumerate((0, 6)):
                real = keys[row, 0, pad:]
                expected = naive(real, max(0, start + step + 1 - pad), slots, mode)
                actual = seen_by(view, SINKS + start + step + WINDOW, row)
                torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("chunks", [1, 7, 33, [50, 1, 1, 1, 22]], ids=str)
def test_any_chunking_reads_alike(model: Any, mode: Any, chunks: Any) -> None:
    ids = text(2, 75)
    with ahn.mode(model, mode), torch.no_grad():
        expected = model(ids, use_cache=False).logits
        torch.testing.assert_close(read(model, ids, chunks), expected, rtol=0, atol=2e-5)
    with ahn.mode(model, "window"):
        assert not torch.allclose(read(model, ids)[:, 40:], expected[:, 40:], atol=1e-3)


def test_up_to_the_first_slot_it_reads_as_the_window(model: Any, mode: Any) -> None:
    ids = text(1, SINKS + WINDOW + POOLED)
    with ahn.mode(model, mode):
        slots = read(model, ids, 9)
    with ahn.mode(model, "window"):
        alone = read(model, ids)
    torch.testing.assert_close(slots[:, :-1], alone[:, :-1], rtol=0, atol=2e-5)
    assert not torch.allclose(slots[:, -1], alone[:, -1], atol=1e-4)


@pytest.mark.parametrize("sink_positions", ["absolute", "bounded"])
def test_padded_rows_read_as_alone(mode: Any, sink_positions: Any) -> None:
    changes = {"max_position_embeddings": 40}
    model = with_memory("llama", model=changes, sink_positions=sink_positions)
    ids, mask = text(2, 80), torch.ones(2, 80, dtype=torch.long)
    mask[1, :23] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with ahn.mode(model, mode):
        for chunks in (None, 11, [60, *[1] * 20]):
            both = read(model, ids, chunks, attention_mask=mask, position_ids=positions)
            torch.testing.assert_close(both[:1], read(model, ids[:1]), rtol=0, atol=2e-5)
            torch.testing.assert_close(both[1:, 23:], read(model, ids[1:, 23:]), rtol=0, atol=2e-5)


def test_slots_fill_the_bytes_of_the_state(memory: str, mode: Any) -> None:
    model = with_memory("llama", memory)
    found = attachment_of(model).layers[0].memory
    assert found is not None
    slots = 4 * state_size(memory, 8) ** 2 // (2 * 16)
    assert state_slots(found, 4) == slots
    with ahn.mode(model, mode):
        cache = ahn.HippocampalCache(model)
        sizes = set()
        for start in range(0, 120, 10):
            read(model, text(1, 120)[:, start : start + 10], [6, 1, 1, 1, 1], cache=cache)
            sizes.add(cache.nbytes) if start >= 20 else None
    assert len(sizes) == 1
    assert cache.layers[0].tensors()["slot_keys"].shape == (1, 2, slots, 8)


def test_fork_and_saved_file_continue_bit_for_bit(mode: Any, tmp_path: Path) -> None:
    model = with_memory()
    with ahn.mode(model, mode):
        cache = ahn.HippocampalCache(model)
        read(model, text(2, 62), 20, cache=cache)
        cache.save(tmp_path / "cache.safetensors")
        twin, loaded = cache.fork(), ahn.HippocampalCache.load(tmp_path / "cache.safetensors", model)
        more = text(2, 30, seed=8)
        logits = [read(model, more, [20, 1, 9], cache=each) for each in (cache, twin, loaded)]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


def test_rows_can_be_reordered_and_forgotten(mode: Any) -> None:
    model, ids = with_memory(), text(2, 60)
    with ahn.mode(model, mode):
        cache = ahn.HippocampalCache(model)
        read(model, ids, 20, cache=cache)
        cache.reorder_cache(torch.tensor([1, 1]))
        more = text(1, 20, seed=8).expand(2, -1)
        after = read(model, more, [7, 1, 12], cache=cache)
        expected = read(model, torch.cat((ids[1:], more[:1]), 1))[:, 60:]
        torch.testing.assert_close(after, expected.expand(2, -1, -1), rtol=0, atol=2e-5)
        cache.reset()
        torch.testing.assert_close(read(model, ids, 13, cache=cache), read(model, ids), rtol=0, atol=2e-5)


def test_generates(mode: Any) -> None:
    model, ids = with_memory(), text(1, 60)
    with ahn.mode(model, mode):
        made = model.generate(ids, max_new_tokens=12, do_sample=False, num_beams=2)
        again = read(model, made)
    assert made.shape[1] > 60
    assert torch.isfinite(again).all()
