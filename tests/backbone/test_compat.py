"""What transformers renames: both names are taken as long as it takes them, and its warnings are not of our making."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaModel

import ahn
from ahn.backbone.compat import CACHE, find_cache, with_cache
from tests.tiny import read, text, tiny, with_memory

IDS = text(1, 70)
NAMES = ("cache", "past_key_values")


@pytest.fixture(scope="module")
def model() -> Any:
    return with_memory("llama")


def warned_of(name: str) -> contextlib.AbstractContextManager[Any]:
    """The warning that transformers gives whoever uses the name that it left behind."""
    if name == CACHE or CACHE == "past_key_values":
        return contextlib.nullcontext()
    return pytest.warns(FutureWarning, match=f"`{name}` is deprecated")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_a_cache_is_taken_under_both_names(family: str, name: str) -> None:
    model = with_memory(family)
    cache, expected = ahn.HippocampalCache(model), read(model, IDS, [40, 30])
    with warned_of(name):
        logits = [model(part, **{name: cache}).logits for part in (IDS[:, :40], IDS[:, 40:])]
    assert torch.equal(torch.cat(logits, 1), expected)
    assert cache.seen_tokens == 70


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_the_stack_of_layers_takes_a_cache_under_both_names(model: Any, name: str) -> None:
    cache = ahn.HippocampalCache(model)
    hidden = model.model(IDS, **{name: cache}).last_hidden_state
    assert torch.equal(hidden, model.model(IDS, **{name: None}).last_hidden_state)
    assert cache.seen_tokens == 70


@pytest.mark.parametrize("name", NAMES)
def test_generate_takes_a_cache_under_each_name_of_transformers(model: Any, name: str) -> None:
    if name == "cache" != CACHE:
        pytest.skip("transformers before 5.24 refuses the name")
    cache, settings = ahn.HippocampalCache(model), {"max_new_tokens": 5, "do_sample": False}
    with warned_of(name):
        out = model.generate(IDS, **{name: cache}, **settings)
    assert torch.equal(out, model.generate(IDS, **settings))
    assert cache.seen_tokens == 74


class OldStack(LlamaModel):
    """Like code that comes from the hub with its model and was written before the new name."""

    def forward(self, input_ids: Any = None, past_key_values: Any = None, use_cache: Any = None, **kwargs: Any) -> Any:
        assert "cache" not in kwargs
        return super().forward(input_ids, use_cache=use_cache, **{CACHE: past_key_values}, **kwargs)


def test_a_stack_of_layers_may_keep_the_old_name() -> None:
    model = with_memory("llama")
    expected = read(model, IDS), read(model, IDS, [40, 30])
    model.model.__class__ = OldStack
    assert torch.equal(read(model, IDS), expected[0])
    assert torch.equal(read(model, IDS, [40, 30]), expected[1])


def test_arguments_hold_one_cache() -> None:
    model, cache = tiny(), DynamicCache()
    given = {"past_key_values": cache, "cache": None, "use_cache": True}
    assert find_cache(given) is cache
    assert with_cache(model, given, cache) == {CACHE: cache, "use_cache": True}
    assert with_cache(model, given, None) == {"use_cache": True}
