"""Requests read together in blocks give what each text read alone gives, whatever the chunks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ahn import native
from ahn.backbone.survey import find_backbone
from ahn.serving.vllm import decoder
from tests import tiny
from tests.serving.vllm_engine import Engine, Request

LENGTHS = (75, 9, 31, 3)
JOINED = "gated_delta_net+linearized_attention"
MEMORIES = (*tiny.MEMORIES, JOINED, f"{JOINED}+gated_delta_net")
TOGETHER = pytest.mark.parametrize("together", [True, False])
KINDS = pytest.mark.parametrize("memory", ["gated_delta_net", JOINED])


def texts() -> list[list[int]]:
    return [tiny.text(tokens=count, seed=count)[0].tolist() for count in LENGTHS]


def check(model: Any, engine: Engine, seeds: int = 1) -> None:
    backbone = find_backbone(model)
    expected = [backbone(torch.tensor([text])).last_hidden_state[0] for text in texts()]
    for seed in range(seeds):
        for ours, alone in zip(engine.read(texts(), seed), expected, strict=True):
            torch.testing.assert_close(ours, alone, rtol=1e-4, atol=1e-4 * alone.abs().max().item())


@TOGETHER
@pytest.mark.parametrize("memory", MEMORIES)
def test_every_memory(memory: str, together: bool) -> None:
    model = tiny.with_memory("llama:wide", memory)
    engine = Engine(model, together=together)
    assert engine.runtime.decodes_together is together
    check(model, engine, 1 + together)


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "granite", "phi3", "gpt_oss", "smollm3", "olmo2", "qwen3_moe"])
def test_every_family(family: str) -> None:
    model = tiny.with_memory(family, layers=(0, 1, 2), sinks=3)
    check(model, Engine(model))


@KINDS
def test_without_kernels_and_with_sinks_at_a_bounded_distance(memory: str) -> None:
    model = tiny.with_memory("llama:wide", memory, sink_positions="bounded", model={"max_position_embeddings": 24})
    check(model, Engine(model))
    with native.switched_off():
        check(model, Engine(model))


@TOGETHER
@KINDS
@pytest.mark.parametrize("score", ["key_diff", "learned", "asked", "value_norm"])
def test_anchors(score: str, memory: str, together: bool) -> None:
    model = tiny.with_memory("llama:wide", memory, window=36, anchors=6, anchor_score=score)
    tiny.give_score_weights(model)
    engine = Engine(model, together=together)
    assert engine.runtime.decodes_together is together
    check(model, engine, 1 + together)


def test_anchors_that_are_read_request_by_request() -> None:
    model = tiny.with_memory("llama:wide", window=36, anchors=6, anchor_score="window_attention")
    engine = Engine(model)
    assert not engine.runtime.decodes_together
    check(model, engine)


@KINDS
def test_anchors_without_kernels_and_at_a_bounded_distance(memory: str) -> None:
    changes = {"max_position_embeddings": 48}
    model = tiny.with_memory("llama:wide", memory, window=36, anchors=6, sink_positions="bounded", model=changes)
    check(model, Engine(model))
    with native.switched_off():
        check(model, Engine(model))


def test_a_softcap() -> None:
    changes = {"layer_types": ["full_attention"] * 3, "attn_logit_softcapping": 5.0}
    model = tiny.with_memory("gemma2", model=changes)
    engine = Engine(model)
    assert engine.runtime.decodes_together
    check(model, engine)


@pytest.mark.skipif(native.why_not() is not None, reason=f"no kernels here: {native.why_not()}")
class TestKernels:
    """Whole decoder layers are left to the kernels where every request reads one token, and give what they give."""

    @pytest.fixture
    def spans(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
        """Layers and requests of each call of the kernels."""
        seen: list[tuple[int, int]] = []
        run = decoder.run_served

        def noted(paths: Any, inputs: Any, tokens: Any) -> Any:
            seen.append((len(paths), tokens.count))
            return run(paths, inputs, tokens)

        monkeypatch.setattr(decoder, "run_served", noted)
        return seen

    def check(self, model: Any, engine: Engine) -> None:
        """Reads the beginning of each text at once, and the rest token by token, together with the others."""
        backbone = find_backbone(model)
        expected = [backbone(torch.tensor([text])).last_hidden_state[0] for text in texts()]
        requests = [Request(text, block) for text, block in zip(texts(), (4, 1, 5, 2), strict=True)]
        for request in requests:
            engine.run([(request, max(1, min(len(request.tokens) - 20, 30)))])
        while unread := [request for request in requests if request.seen < len(request.tokens)]:
            engine.run([(request, 1) for request in unread])
        for request, alone in zip(requests, expected, strict=True):
            ours = torch.cat(request.hidden)
            torch.testing.assert_close(ours, alone, rtol=1e-4, atol=1e-4 * alone.abs().max().item())

    @pytest.mark.parametrize("memory", MEMORIES)
    def test_all_layers_of_all_requests_at_once(self, memory: str, spans: list[tuple[int, int]]) -> None:
        model = tiny.with_memory("llama:wide", memory)
        engine = Engine(model)
        self.check(model, engine)
        assert set(spans) >= {(1, 4), (3, 3), (3, 2), (3, 1)}

    @pytest.mark.parametrize("family", ["qwen3", "qwen2", "mistral"])
    def test_families(self, family: str, spans: list[tuple[int, int]]) -> None:
        model = tiny.with_memory(family, layers=(0, 1, 2), sinks=3, model={"head_dim": 16})
        self.check(model, Engine(model))
        assert (3, 3) in spans

    def test_sinks_at_a_bounded_distance(self, spans: list[tuple[int, int]]) -> None:
        model = tiny.with_memory("llama:wide", sink_positions="bounded", model={"max_position_embeddings": 24})
        self.check(model, Engine(model))
        assert (3, 3) in spans

    @KINDS
    @pytest.mark.parametrize("score", ["key_diff", "learned", "asked", "value_norm"])
    @pytest.mark.parametrize("positions", [{}, {"max_position_embeddings": 48}], ids=["", "bounded"])
    def test_anchors(self, score: str, memory: str, positions: dict[str, int], spans: list[tuple[int, int]]) -> None:
        settings = {"window": 36, "anchors": 6, "anchor_score": score, "model": positions}
        if positions:
            settings["sink_positions"] = "bounded"
        model = tiny.with_memory("llama:wide", memory, **settings)
        tiny.give_score_weights(model)
        self.check(model, Engine(model))
        assert (3, 3) in spans

    def test_a_layer_that_computes_otherwise_runs_its_own_code(self, spans: list[tuple[int, int]]) -> None:
        model = tiny.with_memory("granite", layers=(0, 1, 2), sinks=3, model={"head_dim": 16})
        engine = Engine(model)
        assert len(engine.fast) == 3
        self.check(model, engine)
        assert set(spans) == {(1, 4)}

    def test_a_hook_on_a_part(self, spans: list[tuple[int, int]]) -> None:
        model = tiny.with_memory("llama:wide")
        engine, seen = Engine(model), []
        self.check(model, engine)
        spans.clear()
        model.model.layers[1].mlp.register_forward_hook(lambda *args: seen.append(1))
        self.check(model, engine)
        assert seen
        assert max(layers for layers, _ in spans) == 1

    @pytest.mark.parametrize("inference", [False, True], ids=["no_grad", "inference_mode"])
    @pytest.mark.parametrize("change", ["replaced", "in place"])
    def test_something_comes_between(self, change: str, inference: bool, spans: list[tuple[int, int]]) -> None:
        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            return output * 1.5 if change == "replaced" else output.mul_(1.5)

        model = tiny.with_memory("llama:wide")
        engine = Engine(model)
        with torch.inference_mode() if inference else torch.no_grad():
            self.check(model, engine)
            assert spans[-1] == (3, 1)
            model.model.layers[1].register_forward_hook(hook)
            self.check(model, engine)
            assert spans[-1] != (3, 1)

    def test_too_many_requests(self, spans: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("ahn.serving.vllm.step.MOST_TOKENS", 2)
        model = tiny.with_memory("llama:wide")
        self.check(model, Engine(model))
        assert max(tokens for _, tokens in spans) == 2
