"""A call is all or nothing for its cache, and nobody can tell that a long one with anchors is read in chunks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ahn
from ahn.attachment import attachment_of
from ahn.attention import chunks
from ahn.backbone.compat import CACHE
from ahn.cache.layer_kinds import layer_tensors
from ahn.evaluation.arms import OtherTextCache
from tests.tiny import FAMILIES, read, text, tiny, with_memory

GREEDY = {"do_sample": False, "eos_token_id": None}
ANCHORS = {"anchors": 3, "anchor_score": "key_norm", "sinks": 3}

NORMED_KEYS = ("qwen3", "qwen3_moe", "gemma3_text", "olmo2")
"""Families whose keys are all of one length, by which no anchors can be chosen."""


def with_anchors(family: str) -> Any:
    """A tiny model with a memory and anchors that the family's keys can choose."""
    return with_memory(family, **{**ANCHORS, "anchor_score": "value_norm" if family in NORMED_KEYS else "key_norm"})


def everything(cache: Any) -> dict[str, torch.Tensor]:
    """A copy of every tensor that a cache holds."""
    held = {
        f"{n}.{name}": t.clone() for n, layer in enumerate(cache.layers) for name, t in layer_tensors(layer).items()
    }
    if cache.scoreboard is not None:
        held |= {name: tensor.clone() for name, tensor in cache.scoreboard.stored.items()}
    return held


def same(mine: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return mine.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in mine.items())


class BreaksError(Exception):
    """What a layer raises in the middle of a call."""


def breaking(module: Any) -> Any:
    """Lets a module fail once it is called."""

    def fail(*_: Any) -> None:
        raise BreaksError

    return module.register_forward_hook(fail)


PLACES = {
    "embedding": lambda model: model.get_input_embeddings(),
    "first layer": lambda model: attachment_of(model).layers[0].module,
    "last layer": lambda model: attachment_of(model).layers[-1].module,
    "head": lambda model: model.get_output_embeddings(),
}


class TestAFailedCall:
    @pytest.mark.parametrize("place", PLACES)
    @pytest.mark.parametrize("new", [1, 50])
    @pytest.mark.parametrize("case", ["memory", "anchors", "window", "hybrid", "empty", "padded"])
    @torch.no_grad()
    def test_leaves_the_cache_as_it_was(self, case: str, new: int, place: str) -> None:
        settings: Any = {"anchors": ANCHORS, "hybrid": {**ANCHORS, "layers": (1,)}}.get(case, {"sinks": 3})
        model, ids = with_memory(**settings), text(2, 100)
        cache = ahn.HippocampalCache(model)
        mask = torch.ones(2, 100, dtype=torch.long)
        mask[1, : 5 * (case == "padded")] = 0
        with ahn.mode(model, "window" if case == "window" else "ahn"):
            cache = ahn.HippocampalCache(model)
            seen = 0 if case == "empty" else 40
            for start, stop in ((0, 39), (39, 40)) if seen else ():
                model(ids[:, start:stop], attention_mask=mask[:, :stop], **{CACHE: cache})
            before, twin = everything(cache), cache.fork()
            given = {"attention_mask": mask[:, : seen + new]}
            handle = breaking(PLACES[place](model))
            with pytest.raises(BreaksError):
                model(ids[:, seen : seen + new], **given, **{CACHE: cache})
            handle.remove()
            assert cache.seen_tokens == seen
            assert same(everything(cache), before)
            again = model(ids[:, seen : seen + new], **given, **{CACHE: cache}).logits
            assert torch.equal(again, model(ids[:, seen : seen + new], **given, **{CACHE: twin}).logits)
            assert same(everything(cache), everything(twin))

    @torch.no_grad()
    def test_that_nobody_could_end_is_taken_back_before_the_next(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """An interrupt runs no hook."""
        model, ids = with_memory(**ANCHORS), text(1, 100)
        cache = ahn.HippocampalCache(model)
        model(ids[:, :30], **{CACHE: cache})
        twin = cache.fork()
        handle = attachment_of(model).layers[1].module.register_forward_hook(_interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(ids[:, 30:90], **{CACHE: cache})
        handle.remove()
        again = model.generate(ids[:, :40], max_new_tokens=4, **GREEDY, **{CACHE: cache})
        assert torch.equal(again, model.generate(ids[:, :40], max_new_tokens=4, **GREEDY, **{CACHE: twin}))


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("family", FAMILIES)
class TestAnchorsInEveryFamily:
    @torch.no_grad()
    def test_without_a_cache(self, family: str) -> None:
        model, ids = with_anchors(family), text(2, 50)
        output, expected = model(ids, use_cache=False), model(ids)
        assert not any(isinstance(part, ahn.HippocampalCache) for part in output.values())
        assert torch.equal(output.logits, expected.logits)
        torch.testing.assert_close(read(model, ids, 1), expected.logits, rtol=0, atol=2e-4)
        as_tuple = model(ids, use_cache=False, return_dict=False)
        assert torch.equal(as_tuple[0], output.logits)
        assert not any(isinstance(part, ahn.HippocampalCache) for part in as_tuple)

    @torch.no_grad()
    def test_written_texts(self, family: str) -> None:
        model, ids = with_anchors(family), text(2, 40)
        for beams in (1, 2):
            given = {"max_new_tokens": 4, "num_beams": beams, **GREEDY}
            assert torch.equal(model.generate(ids, **given), model.generate(ids, use_cache=False, **given))

    def test_gradients_and_checkpointing(self, family: str) -> None:
        plain = gradients(with_anchors(family))
        assert all(gradient.abs().sum() > 0 for name, gradient in plain.items() if ".memory." in name)
        if attachment_of(with_memory(family)).keeps_base_layers:
            with pytest.raises(ahn.errors.CacheError, match="checkpointing"):
                gradients(with_anchors(family), use_reentrant=False)
            return
        again = gradients(with_anchors(family), use_reentrant=False)
        assert plain.keys() == again.keys()
        for name, gradient in plain.items():
            torch.testing.assert_close(again[name], gradient)


def gradients(model: Any, cache: Any = None, **checkpointing: Any) -> dict[str, torch.Tensor]:
    """Gradients of the embeddings and memories of a loss at the end of a text that is read in many chunks."""
    model.train()
    if checkpointing:
        if hasattr(model, "activation_checkpointing_enable"):
            model.activation_checkpointing_enable(checkpointing)
        else:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".memory." in name)
    model.get_input_embeddings().requires_grad_(True)
    given = {"use_cache": False} if cache is None else {"cache": cache}
    model(text(2, 60), **given).logits[:, -1].square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_checkpointing_keeps_the_kind_of_the_caches_layers() -> None:
    found = []
    for checkpointing in ({}, {"use_reentrant": False}):
        model = with_memory()
        found.append(gradients(model, OtherTextCache(model), **checkpointing))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


def test_gradients_are_those_of_one_call() -> None:
    """With as many anchors as tokens, nothing is lost: the model is full attention plus memory, in chunks or not."""
    ids, found = text(1, 40), []
    for window in (16, 40):
        model = tiny()
        ahn.attach(model, ahn.AHNConfig(window=window, sinks=0, anchors=40, anchor_score="value_norm"))
        model.requires_grad_(False).get_input_embeddings().requires_grad_(True)
        model(ids, use_cache=False).logits[:, -1].square().sum().backward()
        found.append(model.get_input_embeddings().weight.grad)
    torch.testing.assert_close(*found, rtol=0, atol=1e-5 * float(found[0].abs().max()))


def test_reentrant_checkpointing_is_refused() -> None:
    with pytest.raises(ahn.errors.CacheError, match="use_reentrant=False"):
        gradients(with_memory(**ANCHORS), use_reentrant=True)


@torch.no_grad()
def test_outputs_of_every_layer() -> None:
    model, ids = with_memory(**ANCHORS, layers=(1,)), text(2, 60)
    whole = model(ids, logits_to_keep=7, output_hidden_states=True)
    cache = ahn.HippocampalCache(model)
    assert cache.scoreboard is not None
    chunked = ids.split(cache.scoreboard.longest_call, dim=1)
    parts = [model(part, output_hidden_states=True, **{CACHE: cache}) for part in chunked]
    assert whole.logits.shape[:2] == (2, 7)
    torch.testing.assert_close(whole.logits, torch.cat([part.logits for part in parts], 1)[:, -7:])
    for layer, hidden in enumerate(whole.hidden_states):
        torch.testing.assert_close(hidden, torch.cat([part.hidden_states[layer] for part in parts], 1))


class TestArguments:
    @torch.no_grad()
    def test_positions_of_several_parts_are_cut_by_their_tokens(self) -> None:
        """As many rows as tokens: a shape does not say which axis is meant."""
        positions = torch.arange(50).expand(3, 50, 50)
        parts = chunks.cut_all({"input_ids": torch.zeros(50, 50), "position_ids": positions}, 0, 20)
        assert [part["position_ids"].shape for part in parts] == [(3, 50, 20), (3, 50, 20), (3, 50, 10)]
        assert parts[1]["position_ids"][0, 0].tolist() == [*range(20, 40)]

    def test_each_is_cut_by_what_it_means(self) -> None:
        tables = torch.randn(1, 4, 8), torch.randn(1, 4, 8)
        given = {
            "inputs_embeds": torch.randn(4, 4, 4),
            "attention_mask": torch.ones(4, 9),
            "cache_position": torch.arange(5, 9),
            "position_embeddings": tables,
            "use_cache": True,
            "num_items": torch.tensor(4),
        }
        first, last = chunks.cut_all(given, 5, 3)
        assert (first["attention_mask"].shape, last["attention_mask"].shape) == ((4, 8), (4, 9))
        assert last["inputs_embeds"].equal(given["inputs_embeds"][:, 3:])
        assert last["cache_position"].tolist() == [8]
        assert torch.equal(last["position_embeddings"][1], tables[1][:, 3:])
        assert last["use_cache"] is True
        assert last["num_items"] is given["num_items"]

    @torch.no_grad()
    def test_an_unknown_one_is_refused_by_name(self) -> None:
        model, ids = with_memory(**ANCHORS), text(4, 40)
        model(ids[:, :5], something=torch.ones(4, 5))
        with pytest.raises(ahn.errors.CacheError, match="'something'"):
            model(ids, something=torch.ones(4, 40))

    @torch.no_grad()
    def test_own_positions(self) -> None:
        model, ids = with_memory(**ANCHORS), text(2, 60)
        positions = torch.arange(60).expand(2, 60)
        assert torch.equal(model(ids, position_ids=positions).logits, model(ids).logits)
        assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, model(ids).logits)


@torch.no_grad()
def test_padding_on_the_right_without_a_cache() -> None:
    model, ids = with_memory(**ANCHORS), text(2, 60)
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[1, 50:] = 0
    logits = model(ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(logits[1, :50], model(ids[1:, :50]).logits[0], rtol=0, atol=1e-4)


@torch.no_grad()
def test_heads_with_values_smaller_than_keys() -> None:
    """The kernel that merges two parts takes values of the size of the keys only."""
    model, ids = with_memory("deepseek_v3", **ANCHORS), text(2, 60)
    assert attachment_of(model).layers[0].shape.value_size < attachment_of(model).layers[0].shape.key_size
    chunked = read(model, ids, [30, *[1] * 12, 18])
    torch.testing.assert_close(chunked, model(ids).logits, rtol=0, atol=2e-4)
