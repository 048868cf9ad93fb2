"""`model.generate` in all its forms, against reading the whole text anew for every token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import ahn
from ahn.backbone.compat import CACHE
from tests.test_families import padded
from tests.tiny import read, text, tiny, with_memory

NEW = 24


@pytest.fixture(scope="module")
def model(memory: str) -> Any:
    model = with_memory("llama", memory)
    model.generation_config.eos_token_id = None
    return model


@torch.no_grad()
def greedy(model: Any, ids: torch.Tensor, new: int = NEW) -> torch.Tensor:
    """The ground truth: no cache, every token from one pass over everything before it."""
    for _ in range(new):
        ids = torch.cat((ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
    return ids


@pytest.mark.parametrize("options", [{}, {"use_cache": False}], ids=["cache", "no-cache"])
def test_greedy(model: Any, options: dict[str, Any]) -> None:
    ids = text(2, 40)
    assert torch.equal(model.generate(ids, max_new_tokens=NEW, do_sample=False, **options), greedy(model, ids))


@pytest.mark.parametrize("chunk", [1, 3, 16, 39, 64])
def test_prefill_in_chunks(model: Any, chunk: int) -> None:
    ids = text(1, 40)
    out = model.generate(ids, max_new_tokens=NEW, do_sample=False, prefill_chunk_size=chunk)
    assert torch.equal(out, greedy(model, ids))


def test_several_turns_on_one_cache(model: Any) -> None:
    cache, ids = ahn.HippocampalCache(model), text(1, 18)
    for turn in range(3):
        ids = model.generate(ids, **{CACHE: cache}, max_new_tokens=9, do_sample=False)
        ids = torch.cat((ids, text(1, 7, seed=turn)), dim=1)
    out = model.generate(ids, **{CACHE: cache}, max_new_tokens=9, do_sample=False)
    assert torch.equal(out, greedy(model, ids, 9))


@pytest.mark.parametrize(
    "options", [{}, {"prefill_chunk_size": 7}, {"prefill_chunk_size": 1}, {"use_cache": False}], ids=str
)
@pytest.mark.parametrize("beams", [1, 3])
def test_padded_batch(model: Any, options: dict[str, Any], beams: int) -> None:
    if beams > 1 and options:
        pytest.skip("beams are tested with the plain prefill")
    rows = [text(1, n, seed=n) for n in (40, 33, 10, 3)]
    ids, mask = padded(rows)
    settings = {"max_new_tokens": NEW, "do_sample": False, "num_beams": beams}
    out = model.generate(ids, attention_mask=mask, **settings, **options)[:, ids.size(1) :]
    alone = [model.generate(row, **settings)[:, row.size(1) :] for row in rows]
    assert torch.equal(out, torch.cat(alone))


def test_several_samples(model: Any) -> None:
    ids, settings = text(2, 40), {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": NEW}
    results = []
    for options in ({}, {"use_cache": False}):
        torch.manual_seed(0)
        results.append(model.generate(ids, **settings, **options))
    assert torch.equal(*results)
    assert results[0].shape == (6, 40 + NEW)


def test_beams_equal_no_cache(model: Any) -> None:
    settings = {"num_beams": 4, "max_new_tokens": NEW, "do_sample": False, "num_return_sequences": 2}
    ids = text(2, 40)
    assert torch.equal(model.generate(ids, **settings), model.generate(ids, use_cache=False, **settings))


def test_two_caches_interleaved(model: Any) -> None:
    texts = [text(1, 60, seed=seed) for seed in (1, 2)]
    caches = [ahn.HippocampalCache(model), ahn.HippocampalCache(model, window=9, sinks=2)]
    parts: list[list[torch.Tensor]] = [[], []]
    for start in range(0, 60, 6):
        for cache, ids, logits in zip(caches, texts, parts, strict=True):
            logits.append(read(model, ids[:, start : start + 6], [4, 2], cache=cache))
    torch.testing.assert_close(torch.cat(parts[0], 1), read(model, texts[0]), rtol=0, atol=1e-4)
    with ahn.mode(model, "ahn", window=9, sinks=2):
        torch.testing.assert_close(torch.cat(parts[1], 1), read(model, texts[1]), rtol=0, atol=1e-4)


def test_returned_cache_goes_on(model: Any) -> None:
    ids = text(1, 40)
    out = model.generate(ids, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    assert isinstance(out[CACHE], ahn.HippocampalCache)
    assert out[CACHE].seen_tokens == 47
    more = model.generate(out.sequences, **{CACHE: out[CACHE]}, max_new_tokens=8, do_sample=False)
    assert torch.equal(more, greedy(model, ids, 16))


REFUSALS = {
    "prompt-lookup": ({"prompt_lookup_num_tokens": 3}, "assisted"),
    "assistant": ({"assistant_model": None}, "assisted"),
    "static-cache": ({"cache_implementation": "static"}, "cache_implementation"),
    "no-chunks": ({"prefill_chunk_size": 0}, "prefill_chunk_size must be a whole number of at least 1"),
    "dynamic-cache": ({CACHE: transformers.DynamicCache()}, "HippocampalCache"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refused_forms(model: Any, case: str) -> None:
    options, word = REFUSALS[case]
    if "assistant_model" in options:
        options = {"assistant_model": tiny()}
    with pytest.raises(ahn.AHNError, match=word) as error:
        model.generate(text(1, 30), max_new_tokens=4, **options)
    assert "\n" not in str(error.value)


def test_assisted_decoding_in_full_mode(model: Any) -> None:
    with ahn.mode(model, "full"):
        out = model.generate(text(1, 30), max_new_tokens=6, do_sample=False, prompt_lookup_num_tokens=3)
    assert out.size(1) == 36
