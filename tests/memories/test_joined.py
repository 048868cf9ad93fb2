"""Memories joined by `+`: which layer gets which, and that all of it reads, decodes, is saved and counted as one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ahn
from ahn.attachment import attachment_of
from ahn.checkpoint import convert, describe
from ahn.checkpoint.content import memory_tensors
from ahn.cost import cost_model
from ahn.errors import AHNError
from ahn.memories import memory_kinds
from tests.tiny import MEMORIES, read, text, tiny, with_memory

JOINED = "gated_delta_net+linearized_attention"


def names(model: Any) -> list[str | None]:
    """The class of each layer's memory."""
    return [None if layer.memory is None else type(layer.memory).__name__ for layer in attachment_of(model).layers]


class TestWhichLayer:
    def test_they_share_the_layers_from_the_lowest_to_the_highest(self) -> None:
        assert memory_kinds("delta_net", 3) == ("delta_net",) * 3
        assert memory_kinds(JOINED, 4) == ("gated_delta_net",) * 2 + ("linearized_attention",) * 2
        assert memory_kinds(JOINED, 5) == ("gated_delta_net",) * 3 + ("linearized_attention",) * 2
        assert memory_kinds("mamba2+delta_net+mamba2", 3) == ("mamba2", "delta_net", "mamba2")

    def test_attached(self) -> None:
        assert names(with_memory("llama", JOINED)) == ["GatedDeltaNet", "GatedDeltaNet", "LinearizedAttention"]

    def test_only_layers_with_a_memory_count(self) -> None:
        model = with_memory("llama", JOINED, layers=(0, 2))
        assert names(model) == ["GatedDeltaNet", None, "LinearizedAttention"]

    @pytest.mark.parametrize(
        ("memory", "said"),
        [
            ("gated_delta_net+gru", "unknown memory 'gru'; known are"),
            ("gated_delta_net+", "unknown memory ''; known are"),
            ("+".join(["delta_net"] * 4), "names 4 memories, but only 3 of the layers get one; name at most 3"),
        ],
    )
    def test_what_cannot_be(self, memory: str, said: str) -> None:
        with pytest.raises(AHNError) as caught:
            ahn.attach(tiny(), ahn.AHNConfig(memory=memory))
        assert said in str(caught.value)


class TestReading:
    @pytest.mark.parametrize("family", ["llama:wide", "deepseek_v3"])
    def test_every_way_agrees(self, family: str) -> None:
        model, ids = with_memory(family, JOINED), text(2)
        whole = read(model, ids)
        for chunks in (1, 13, [40, 1, 1, 33]):
            torch.testing.assert_close(read(model, ids, chunks), whole, rtol=0, atol=1e-4 * float(whole.abs().max()))

    @torch.no_grad()
    def test_each_layer_does_what_its_own_kind_does(self) -> None:
        """With the other kind silent, it is a model of one kind in which the same layers are silent."""
        for kind, silent in (("gated_delta_net", (2,)), ("linearized_attention", (0, 1))):
            outputs = []
            for memory in (kind, JOINED):
                model = with_memory("llama", memory)
                for layer in attachment_of(model).layers:
                    built: Any = layer.memory
                    if layer.index in silent:
                        built.o_proj.zero_()
                    else:
                        generator = torch.Generator().manual_seed(layer.index)
                        for parameter in built.parameters():
                            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
                outputs.append(read(model, text()))
            assert torch.equal(*outputs), kind

    @pytest.mark.parametrize("chunks", [1, 13])
    def test_a_saved_cache_goes_on(self, tmp_path: Path, chunks: int) -> None:
        model, ids = with_memory("llama", JOINED), text()
        whole, cache = read(model, ids), ahn.HippocampalCache(model)
        read(model, ids[:, :50], chunks, cache=cache)
        cache.save(tmp_path / "cache.safetensors")
        again = ahn.HippocampalCache.load(tmp_path / "cache.safetensors", model)
        rest = read(model, ids[:, 50:], chunks, cache=again)
        torch.testing.assert_close(rest, whole[:, 50:], rtol=0, atol=1e-4 * float(whole.abs().max()))

    def test_gradients_reach_every_layer(self) -> None:
        model = with_memory("llama", JOINED)
        tensors = memory_tensors(model)
        for tensor in tensors.values():
            tensor.requires_grad_(True)
        model(text()).logits.square().mean().backward()
        assert all(float(tensor.grad.abs().max()) > 0 for name, tensor in tensors.items() if "o_proj" in name)


class TestCheckpoints:
    def test_round_trip(self, tmp_path: Path) -> None:
        model = with_memory("llama", JOINED)
        ahn.save(model, tmp_path)
        other = tiny()
        ahn.attach(other, ahn.AHNConfig(memory=JOINED, window=16, sinks=5))
        ahn.load(other, tmp_path)
        assert torch.equal(read(other, text()), read(model, text()))
        assert describe(tmp_path).memory == JOINED

    @pytest.mark.parametrize("memory", ["gated_delta_net", "linearized_attention", "linearized_attention+delta_net"])
    def test_weights_of_other_kinds_are_refused(self, tmp_path: Path, memory: str) -> None:
        ahn.save(with_memory("llama", JOINED), tmp_path)
        with pytest.raises(AHNError, match=r"gated_delta_net\+linearized_attention"):
            ahn.load(with_memory("llama", memory), tmp_path)

    def test_the_published_format_has_no_such_memory(self, tmp_path: Path) -> None:
        ahn.save(with_memory("qwen3", JOINED), tmp_path / "ours")
        with pytest.raises(AHNError, match="the published format has no memory"):
            convert(tmp_path / "ours", tmp_path / "theirs", to="published")


@pytest.mark.parametrize("convention", ["actual", "paper"])
def test_it_is_counted_as_the_layers_are(convention: Any) -> None:
    """Between its kinds: two layers of three as one, the third as the other."""
    config = ahn.AHNConfig(memory=JOINED, window=16, sinks=5)
    costs = cost_model(tiny().config, config, convention=convention).at(500)
    assert list(costs) == ["full", "window", "ct", *MEMORIES, JOINED]
    lower, upper, both = (vars(costs[name]) for name in (*JOINED.split("+"), JOINED))
    nothing = vars(costs["window"])
    for name in ("parameters", "cache_bytes", "mixer_flops"):
        expected = nothing[name] + (2 * (lower[name] - nothing[name]) + (upper[name] - nothing[name])) / 3
        assert both[name] == pytest.approx(expected), name
