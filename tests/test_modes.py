"""Modes: one model object for every comparison, nested and in threads, and caches that keep their settings."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers

import ahn
from ahn.attachment import attachment_of
from ahn.backbone.compat import CACHE
from tests.tiny import read, text, tiny, with_memory

IDS = text(1, 70)


@pytest.fixture(scope="module")
def model() -> Any:
    return with_memory("llama")


@torch.no_grad()
def masked_base(ids: torch.Tensor, window: int, sinks: int) -> torch.Tensor:
    """The base model with a dense mask of sinks and window: what `window` mode must equal."""
    base = tiny()
    query, key = torch.arange(ids.size(1))[:, None], torch.arange(ids.size(1))[None]
    allowed = (key <= query) & ((key < sinks) | (query - key < window))
    mask = torch.zeros(ids.size(1), ids.size(1)).masked_fill(~allowed, float("-inf"))
    return base(ids, attention_mask=mask[None, None]).logits


@pytest.mark.parametrize(("window", "sinks"), [(16, 5), (1, 0), (7, 0), (20, 1), (200, 3), (3, 40)])
def test_window_mode_is_masked_attention(model: Any, window: int, sinks: int) -> None:
    expected = masked_base(IDS, window, sinks)
    with ahn.mode(model, "window", window=window, sinks=sinks):
        for chunks in (None, 1, 11):
            torch.testing.assert_close(read(model, IDS, chunks), expected, rtol=0, atol=1e-4)


def test_nested_modes_restore_the_outer_one(model: Any) -> None:
    outer = read(model, IDS)
    with ahn.mode(model, "window", window=9):
        inner = read(model, IDS)
        with ahn.mode(model, "full"):
            pass
        with pytest.raises(RuntimeError), ahn.mode(model, "full"):
            raise RuntimeError
        assert torch.equal(read(model, IDS), inner)
    assert torch.equal(read(model, IDS), outer)
    assert not torch.equal(inner, outer)


def test_inner_mode_inherits_the_outer_settings(model: Any) -> None:
    with ahn.mode(model, "ahn", window=9, sinks=2), ahn.mode(model, "window"):
        settings = ahn.HippocampalCache(model).settings
    assert (settings.mode, settings.window, settings.sinks) == ("window", 9, 2)


def test_a_thread_without_a_block_reads_in_the_one_that_is_open(model: Any) -> None:
    """The usual way to stream: `generate` runs in a thread that was started inside of a block."""
    found = {}

    def work() -> None:
        found["ids"] = model.generate(IDS, max_new_tokens=8, do_sample=False, eos_token_id=None)

    outside = model.generate(IDS, max_new_tokens=8, do_sample=False, eos_token_id=None)
    for name in ("full", "window"):
        with ahn.mode(model, name):
            expected = model.generate(IDS, max_new_tokens=8, do_sample=False, eos_token_id=None)
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        assert torch.equal(found["ids"], expected)
    work()
    assert torch.equal(found["ids"], outside)


def test_a_thread_that_outlives_the_block_keeps_its_mode(model: Any) -> None:
    """A cache takes the settings along, so that nothing changes in the middle of a text."""
    with ahn.mode(model, "window", window=9):
        expected = read(model, IDS, 10)
        cache = ahn.HippocampalCache(model)
        first = model(IDS[:, :30], cache=cache).logits
    rest = model(IDS[:, 30:], cache=cache).logits
    torch.testing.assert_close(torch.cat((first, rest), dim=1), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("first", [0, 1])
def test_interleaved_generators_leave_nothing_behind(model: Any, first: int) -> None:
    def reading(name: Any) -> Iterator[str]:
        with ahn.mode(model, name):
            yield attachment_of(model).settings.mode
            yield name

    before = attachment_of(model).settings
    both = [reading("full"), reading("window")]
    assert [next(each) for each in both] == ["full", "window"]
    both[first].close()
    assert attachment_of(model).settings.mode == ("window", "full")[first]
    both[1 - first].close()
    assert attachment_of(model).settings == before


def test_tasks_do_not_see_each_others_mode(model: Any) -> None:
    async def reading(name: Any) -> str:
        with ahn.mode(model, name):
            for _ in range(3):
                await asyncio.sleep(0)
            return attachment_of(model).settings.mode

    async def both() -> list[str]:
        return await asyncio.gather(reading("full"), reading("window"))

    assert asyncio.run(both()) == ["full", "window"]


def test_a_block_is_of_one_model(model: Any) -> None:
    other = with_memory()
    with ahn.mode(model, "full"):
        assert attachment_of(other).settings.mode == "ahn"
        assert attachment_of(copy.deepcopy(model)).settings.mode == "ahn"


def test_threads_do_not_see_each_others_mode(model: Any) -> None:
    expected = {}
    for name in ("full", "window", "ahn"):
        with ahn.mode(model, name):
            expected[name] = read(model, IDS)
    barrier, found = threading.Barrier(3), {}

    def work(name: Any) -> None:
        with ahn.mode(model, name):
            barrier.wait()
            found[name] = read(model, IDS)

    threads = [threading.Thread(target=work, args=(name,)) for name in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_live_cache_keeps_its_settings(model: Any) -> None:
    with ahn.mode(model, "window", window=9, sinks=2):
        cache, expected = ahn.HippocampalCache(model), read(model, IDS, [40, 30])
    first = read(model, IDS[:, :40], cache=cache)
    with ahn.mode(model, "full"):
        rest = read(model, IDS[:, 40:], cache=cache)
    assert torch.equal(torch.cat((first, rest), 1), expected)


@torch.no_grad()
def test_a_cache_of_full_mode_goes_on_in_full_mode(model: Any) -> None:
    with ahn.mode(model, "full"):
        expected = model(IDS).logits[:, 40:]
        cache = model(IDS[:, :40])[CACHE]
    assert isinstance(cache, transformers.DynamicCache)
    torch.testing.assert_close(model(IDS[:, 40:], cache=cache).logits, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_an_empty_foreign_cache_is_refused(model: Any) -> None:
    with pytest.raises(ahn.AHNError, match="HippocampalCache"):
        model(IDS, cache=transformers.DynamicCache())


def test_no_cache_of_ours_in_full_mode(model: Any) -> None:
    with ahn.mode(model, "full"), pytest.raises(ahn.AHNError, match="DynamicCache"):
        ahn.HippocampalCache(model)


@torch.no_grad()
def test_the_backbone_alone_reads_with_the_memory(model: Any) -> None:
    expected = model(IDS, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(model.model(IDS).last_hidden_state, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.model(IDS, None, None).last_hidden_state, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("fast", {}),
        ("ahn", {"window": 0}),
        ("ahn", {"sinks": -3}),
        ("ahn", {"sink_positions": "near"}),
        ("ahn", {"anchor_layers": 2}),
        ("ahn", {"mode": "full"}),
        ("ct_max", {"anchors": 4}),
        ("ct_mean", {"anchors": 4}),
    ],
    ids=str,
)
def test_bad_modes(model: Any, name: Any, settings: dict[str, Any]) -> None:
    with pytest.raises(ahn.AHNError), ahn.mode(model, name, **settings):
        pass


def test_an_unknown_setting_is_told_with_the_known_ones(model: Any) -> None:
    known = r"unknown settings wndow \(did you mean window\?\); known are anchor_layers, .*sinks, window"
    with pytest.raises(ahn.errors.ConfigError, match=known), ahn.mode(model, "ahn", wndow=2):  # type: ignore[call-arg]
        pass


def test_full_mode_has_no_window_that_could_be_too_short() -> None:
    """Nor sinks and anchors: what such a mode cannot be read with is told by the mode inside that would read so."""
    ids, anchored = text(1, 40), with_memory(anchors=8)
    sliding = with_memory("mistral", model={"sliding_window": 12}, sinks=3)
    for model, settings in [
        (anchored, {"window": 2}),
        (anchored, {"anchors": 9, "window": 1}),
        (sliding, {"sinks": 12}),
    ]:
        with ahn.mode(model, "full"):
            expected = read(model, ids)
        with ahn.mode(model, "full", **settings):
            assert torch.equal(read(model, ids), expected)
            with pytest.raises(ahn.AHNError, match="window"), ahn.mode(model, "ahn"):
                pass
    with ahn.mode(anchored, "ct_max", window=2):  # its config's anchors are not read
        read(anchored, ids)


def test_mode_needs_a_memory() -> None:
    with pytest.raises(ahn.AHNError, match=r"ahn\.attach"), ahn.mode(tiny(), "full"):
        pass


@torch.no_grad()
def test_masks_that_cannot_be_read(model: Any) -> None:
    holes = torch.ones(1, 70, dtype=torch.long)
    holes[0, 30] = 0
    right = torch.ones(1, 70, dtype=torch.long)
    right[0, 60:] = 0
    for mask in (holes, right, torch.ones(1, 60), torch.ones(1, 1, 70, 70, dtype=torch.bool)):
        with pytest.raises(ahn.AHNError) as error:
            model(IDS, attention_mask=mask)
        assert "\n" not in str(error.value)
    with pytest.raises(ahn.AHNError):
        model(IDS, attention_mask=holes, use_cache=False)


@torch.no_grad()
def test_right_padding_without_a_cache(model: Any) -> None:
    mask = torch.ones(1, 70, dtype=torch.long)
    mask[0, 60:] = 0
    logits = model(IDS, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(logits[:, :60], read(model, IDS[:, :60]), rtol=0, atol=1e-5)
