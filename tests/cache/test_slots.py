"""Rows of different length in one cache: they decode as each does alone, and leave as if they had been alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ahn
from ahn.cache.slots import SlotCache, can_share_slots
from ahn.errors import CacheError
from ahn.generation import Reader
from tests.tiny import MEMORIES, give_score_weights, text, tiny, with_memory

LENGTHS = (7, 18, 60)  # fewer tokens than the window holds, just as many, and many more
SCORES = (None, "key_diff", "window_attention", "learned", "asked")


def model_with(score: str | None, **settings: Any) -> Any:
    model = with_memory(**settings, anchors=0 if score is None else 4)
    if score in ("learned", "asked"):
        give_score_weights(model)
    return model


def alone(model: Any, ids: torch.Tensor, new: int) -> tuple[list[torch.Tensor], ahn.HippocampalCache]:
    """Logits after each of the last tokens of a text, read one by one, and the cache at the end."""
    reader = Reader(model, score=False)
    reader.prefill(ids[:-new])
    logits = []
    for token in ids[-new:]:
        reader.prefill(token[None])
        logits.append(reader.logits)
    cache: Any = reader.cache
    return logits, cache


@torch.no_grad()
def step(model: Any, slots: SlotCache, tokens: list[torch.Tensor]) -> torch.Tensor:
    """Reads one token in each row; logits, `[B, V]`."""
    ids = torch.stack(tokens)[:, None]
    logits: torch.Tensor = model(ids, position_ids=slots.positions(ids.device), cache=slots.cache).logits
    return logits[:, 0]


def begun(model: Any, ids: torch.Tensor) -> ahn.HippocampalCache:
    cache = ahn.HippocampalCache(model)
    with torch.no_grad():
        model(ids[None], cache=cache)
    return cache


def same(one: ahn.HippocampalCache, other: ahn.HippocampalCache, tmp_path: Path) -> None:
    """Whether two caches hold the same, as their files do."""
    from safetensors.torch import load_file

    held = []
    for name, cache in (("one", one), ("other", other)):
        cache.save(tmp_path / name)
        held.append(load_file(tmp_path / name))
    assert held[0].keys() == held[1].keys()
    for name, tensor in held[0].items():
        kept = slice(0, min(tensor.size(2), held[1][name].size(2))) if tensor.dim() == 4 else slice(None)
        index = (slice(None), slice(None), kept) if tensor.dim() == 4 else (slice(None),)
        torch.testing.assert_close(tensor[index], held[1][name][index], atol=2e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("kernels", [True, False])
def test_rows_join_decode_and_leave_as_if_alone(
    score: str | None, kernels: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernels:
        monkeypatch.setenv("AHN_NATIVE", "0")
    family = "llama:wide" if kernels else "llama"
    model = model_with(score, family=family, sink_positions="bounded")
    new = 8
    texts = [text(1, length + new, seed=length)[0] for length in LENGTHS]
    expected = [alone(model, ids, new) for ids in texts]
    slots = SlotCache(begun(model, texts[0][:1]), len(LENGTHS))
    place: list[int] = []  # of each row: which text
    done = [0] * len(texts)
    for round_ in range(30):
        if round_ % 3 == 0 and round_ // 3 < len(texts):  # one after the other joins
            number = round_ // 3
            slots.join(begun(model, texts[number][: LENGTHS[number]]))
            place.append(number)
        if not place:
            break
        assert slots.lengths == [LENGTHS[number] + done[number] for number in place]
        logits = step(model, slots, [texts[number][LENGTHS[number] + done[number]] for number in place])
        for row, number in enumerate(place):
            torch.testing.assert_close(logits[row], expected[number][0][done[number]], atol=3e-4, rtol=1e-4)
            done[number] += 1
        for row in [row for row, number in enumerate(place) if done[number] == new]:
            left = slots.leave(row)
            assert left is not None
            same(left, expected[place[row]][1], tmp_path)
            assert left.anchor_tokens == expected[place[row]][1].anchor_tokens
            place[row] = place[-1]
            place.pop()
    assert done == [new] * len(texts)


@pytest.mark.parametrize("memory", MEMORIES)
def test_every_memory(memory: str) -> None:
    model = with_memory("llama:wide", memory)
    texts = [text(1, length + 4, seed=length)[0] for length in (12, 60)]
    slots = SlotCache(begun(model, texts[0][:1]), 2)
    for ids in texts:
        slots.join(begun(model, ids[:-4]))
    expected = [alone(model, ids, 4)[0] for ids in texts]
    for token in range(4):
        logits = step(model, slots, [ids[token - 4] for ids in texts])
        for row in range(2):
            torch.testing.assert_close(logits[row], expected[row][token], atol=1e-4, rtol=1e-4)


def test_a_row_comes_back_after_the_cache_was_empty() -> None:
    model = with_memory()
    ids = text(1, 60)[0]
    slots = SlotCache(begun(model, ids[:9]), 2)
    for _ in range(2):
        slots.join(begun(model, ids[:50]))
        logits = step(model, slots, [ids[50]])
        torch.testing.assert_close(logits[0], alone(model, ids[:51], 1)[0][0], atol=1e-4, rtol=1e-4)
        assert slots.leave(0, keep=False) is None
        assert slots.used == 0


def test_bytes_do_not_depend_on_what_was_read() -> None:
    model = with_memory(anchors=4)
    sizes = []
    for length in (40, 400):
        slots = SlotCache(begun(model, text()[0]), 2)
        for _ in range(2):
            slots.join(begun(model, text(1, length)[0]))
        sizes.append(slots.cache.nbytes)
    assert sizes[0] == sizes[1]


def test_what_cannot_share_is_refused() -> None:
    assert not can_share_slots(with_memory("gpt2"))
    assert not can_share_slots(with_memory("gemma3_text", window=8, sinks=2))
    with pytest.raises(CacheError, match="one by one"):
        SlotCache(begun(with_memory("gpt2"), text()[0]), 2)


def test_what_fits_no_slot_is_refused() -> None:
    model = with_memory()
    slots = SlotCache(begun(model, text()[0]), 1)
    with pytest.raises(CacheError, match="5 sinks"):
        slots.join(begun(model, text()[0, :4]))
    with ahn.mode(model, "window"):
        other = begun(model, text()[0])
    with pytest.raises(CacheError, match="same settings"):
        slots.join(other)
    two = ahn.HippocampalCache(model)
    model(text(2), cache=two)
    with pytest.raises(CacheError, match="one row"):
        slots.join(two)
    slots.join(begun(model, text()[0]))
    with pytest.raises(CacheError, match="slots are in use"):
        slots.join(begun(model, text()[0]))


def test_a_rotation_that_changes_with_the_length_is_refused() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = tiny("llama", rope_parameters=rope)
    ahn.attach(model, ahn.AHNConfig(window=16, sinks=5))
    assert not can_share_slots(model)
