"""Positions: bounded sinks against the base model itself, and memories that see no rotation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ahn
from ahn.attachment import attachment_of
from tests.tiny import FAMILIES, read, text, tiny, with_memory

SINKS, WINDOW, TRAINED = 5, 16, 64
ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 32},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "dynamic": {"factor": 2.0},
    "longrope": {
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 2.1, 2.5, 3.0],
    },
}
STATELESS = [name for name in ROPES if name not in ("dynamic", "longrope")]
ROTARY_FAMILIES = ("llama", "qwen3", "glm4", "phi3", "gemma2", "gpt_oss", "granite", "smollm3", "cohere2")


def rope(kind: str, **model: Any) -> dict[str, Any]:
    parameters = {"rope_type": kind, "rope_theta": 1e4, **ROPES[kind]}
    return {"max_position_embeddings": TRAINED, "rope_parameters": parameters, **model}


def one_layer(family: str) -> dict[str, Any]:
    sizes: dict[str, Any] = {"num_hidden_layers": 1, "max_position_embeddings": TRAINED}
    if family in ("cohere2", "gpt_oss", "gemma2"):
        sizes["layer_types"] = ["full_attention"]
    if family == "smollm3":
        sizes["no_rope_layers"] = [1]
    return sizes


@torch.no_grad()
def streamed(model: Any, ids: torch.Tensor, query: int) -> torch.Tensor:
    """What StreamingLLM asks for at one query: the base model on sinks and window, the query at a trained position."""
    place = min(query, TRAINED - 1)
    tokens = torch.cat((ids[:, :SINKS], ids[:, query - WINDOW + 1 : query + 1]), dim=1)
    positions = torch.cat((torch.arange(SINKS), torch.arange(place - WINDOW + 1, place + 1)))[None]
    ones = torch.ones_like(tokens)
    return model(tokens, position_ids=positions, attention_mask=ones, use_cache=False).logits[:, -1]


@pytest.mark.parametrize("family", ROTARY_FAMILIES)
def test_bounded_sinks_are_what_the_base_model_sees_within_its_context(family: str) -> None:
    model, ids = with_memory(family, model=one_layer(family), sink_positions="bounded"), text(1, 150)
    with ahn.mode(model, "window"):
        logits, slowly = read(model, ids), read(model, ids, 1)
    torch.testing.assert_close(slowly, logits, rtol=0, atol=1e-4)
    with ahn.mode(model, "full"):
        for query in range(SINKS + WINDOW, 150, 7):
            torch.testing.assert_close(logits[:, query], streamed(model, ids, query), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", STATELESS)
@pytest.mark.parametrize("memory_positions", ["rope", "none"])
def test_every_way_of_reading_agrees_past_the_trained_context(kind: str, memory_positions: Any) -> None:
    model = with_memory(model=rope(kind), sink_positions="bounded", memory_positions=memory_positions)
    ids = text(2, 150)
    at_once = read(model, ids)
    assert all(layer.rotation is not None for layer in attachment_of(model).layers)
    for chunks in (1, [40, 7, 1, 1, 61, 40]):
        torch.testing.assert_close(read(model, ids, chunks), at_once, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ROPES)
@torch.no_grad()
def test_a_memory_without_positions_stores_unrotated_keys(kind: str) -> None:
    """The state of the first layer against one computed from the projections, also where frequencies change."""
    model = with_memory(model=rope(kind), memory_positions="none")
    ids, cache = text(1, 150), ahn.HippocampalCache(model)
    read(model, ids, [50, 50, *[1] * 50], cache=cache)
    layer = model.model.layers[0]
    hidden = layer.input_layernorm(model.model.embed_tokens(ids))
    attention = layer.self_attn
    evicted = slice(SINKS, 150 - WINDOW)
    keys, values = (project(hidden).view(1, 150, 2, 8)[:, evicted] for project in (attention.k_proj, attention.v_proj))
    gates = attention.memory.gates(hidden)[:, evicted]
    queries = torch.zeros(1, keys.size(1), 4, 8)
    _, state = attention.memory.scan(queries, keys, values, gates, None)
    torch.testing.assert_close(cache.layers[0].state, state, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ROTARY_FAMILIES)
def test_families_with_all_settings(family: str) -> None:
    model = with_memory(family, sink_positions="bounded", memory_positions="none")
    ids = text(2, 70)
    torch.testing.assert_close(read(model, ids, [30, 1, 1, 38]), read(model, ids), rtol=0, atol=1e-4)


def test_padded_rows_with_all_settings(memory: str) -> None:
    model = with_memory(memory=memory, model=rope("yarn"), sink_positions="bounded", memory_positions="none")
    row = text(1, 90)
    ids = torch.cat((torch.nn.functional.pad(row, (40, 0)), text(1, 130, seed=9)))
    mask = (ids != 0).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for chunks in (None, 13, 1):
        logits = read(model, ids, chunks, attention_mask=mask, position_ids=positions)
        torch.testing.assert_close(logits[:1, 40:], read(model, row), rtol=0, atol=1e-4)


def test_layers_without_rotation_are_left_alone() -> None:
    layers = attachment_of(with_memory("smollm3", sink_positions="bounded")).layers
    assert [layer.rotation is not None for layer in layers] == [True, False, True]
    layers = attachment_of(with_memory("gpt2", sink_positions="bounded", memory_positions="none")).layers
    assert not any(layer.rotation for layer in layers)


def test_bounded_sinks_must_fit_before_the_window() -> None:
    model = tiny("llama", max_position_embeddings=TRAINED)
    with pytest.raises(ahn.AHNError, match="64 positions"):
        ahn.attach(model, ahn.AHNConfig(window=60, sinks=5, sink_positions="bounded"))
    ahn.attach(model, ahn.AHNConfig(window=16, sinks=5))
    ahn.HippocampalCache(model, window=60)
    with pytest.raises(ahn.AHNError, match="bounded"), ahn.mode(model, "window", window=60, sink_positions="bounded"):
        pass


def test_bounded_sinks_are_a_setting_of_a_run() -> None:
    """One attached model reads both ways, whatever it was attached with."""
    ids = text(1, 150)
    models = [with_memory(model=rope("default"), sink_positions=positions) for positions in ("absolute", "bounded")]
    for positions in ("absolute", "bounded"):
        logits = []
        for model in models:
            with ahn.mode(model, "ahn", sink_positions=positions):
                logits.append(read(model, ids))
        assert torch.equal(*logits)
    assert not torch.equal(read(models[0], ids), read(models[1], ids))


def test_a_rotation_that_cannot_be_undone_is_refused_where_it_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    monkeypatch.setattr("ahn.backbone.rotary.Rotation.unrotate", lambda self, x, tables: x)
    ahn.attach(model, ahn.AHNConfig(window=16, sinks=5))
    with pytest.raises(ahn.AHNError, match="cannot be undone"), ahn.mode(model, "ahn", sink_positions="bounded"):
        pass
    ahn.detach(model)
    for settings in ({"sink_positions": "bounded"}, {"memory_positions": "none"}):
        with pytest.raises(ahn.AHNError, match="cannot be undone"):
            ahn.attach(model, ahn.AHNConfig(window=16, sinks=5, **settings))


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() & {"gptj", "codegen"}))
def test_a_family_that_rotates_in_its_own_way_has_absolute_sinks(family: str) -> None:
    with pytest.raises(ahn.AHNError, match="queries, keys, cos and sin"):
        with_memory(family, sink_positions="bounded")


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() & {"gpt2", "gptj", "codegen"}))
def test_a_table_of_positions_ends_with_a_clear_word(family: str) -> None:
    length = {"n_positions": 40} if family == "gpt2" else {"max_position_embeddings": 40}
    model = with_memory(family, model=length)
    with pytest.raises(ahn.AHNError, match="40 tokens"):
        read(model, text(1, 41))
    with pytest.raises(ahn.AHNError, match="40 tokens"):
        read(model, text(1, 41), 1)
