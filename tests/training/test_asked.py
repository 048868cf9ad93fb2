"""The score that keeps queries: which are kept, against a loop, and that they find what answers would look at."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from ahn.errors import ConfigError
from ahn.scores import AnchorQueries
from ahn.scores.queries import NEVER_ASKED
from ahn.training.anchors.asked import _Layer, _read, collect
from ahn.training.anchors.documents import Document
from tests.tiny import text, tiny, with_memory

ASKED, WINDOW = 31, 12


def documents(count: int = 4) -> list[Document]:
    return [Document(text(1, 40, seed)[0], ASKED, (("code", (7 + seed, 8 + seed)),)) for seed in range(count)]


def test_votes_against_a_loop() -> None:
    weights = AnchorQueries((2, 0, 1), 8)
    weights.queries.normal_(generator=torch.Generator().manual_seed(1))
    weights.offsets[0] = torch.tensor([0.5, -1.0])
    weights.offsets[2, 0] = 0.25
    keys = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(2))
    votes = weights(keys)
    assert weights.offsets.tolist()[1:] == [[NEVER_ASKED, NEVER_ASKED], [0.25, NEVER_ASKED]]
    for row in range(2):
        for token in range(5):
            best = max(
                float(keys[row, head, token].double() @ weights.queries[n].double()) + offset
                for n, (head, offset) in enumerate(((0, 0.5), (0, -1.0), (2, 0.25)))
            )
            assert float(votes[row, token]) == pytest.approx(best, abs=1e-5)


def test_what_is_kept_against_a_loop() -> None:
    """Queries and offsets of the layer that finds facts best, made by hand from attention weights."""
    plain, made = tiny("llama", attn_implementation="eager"), documents()
    layers, heads, groups = 3, plain.config.num_attention_heads, plain.config.num_key_value_heads
    kept: dict[int, list[tuple[int, int, torch.Tensor, float]]] = {layer: [] for layer in range(layers)}
    keys: dict[int, list[torch.Tensor]] = {layer: [] for layer in range(layers)}
    for number, document in enumerate(made):
        with torch.no_grad():
            output = plain(document.ids[None], output_attentions=True, output_hidden_states=True)
            for layer, (weights, hidden) in enumerate(zip(output.attentions, output.hidden_states)):
                attention = plain.model.layers[layer].self_attn
                read = plain.model.layers[layer].input_layernorm(hidden)
                query = attention.q_proj(read)[0].unflatten(-1, (heads, 8)).transpose(0, 1)
                key = attention.k_proj(read)[0].unflatten(-1, (groups, 8)).transpose(0, 1)
                value = attention.v_proj(read)[0].unflatten(-1, (groups, 8)).transpose(0, 1)
                keys[layer].append(key)
                chosen = set()
                for fact in document.values[0][1]:
                    best = (-1.0, 0, 0)
                    for head in range(heads):
                        out = attention.o_proj.weight[:, head * 8 : head * 8 + 8]
                        moved = float((out @ value[head * groups // heads, fact]).norm())
                        for asking in range(ASKED, 40):
                            share = float(weights[0, head, asking, fact]) * moved / float(hidden[0, asking].norm())
                            best = max(best, (share, head, asking))
                    chosen.add(best[1:])
                for head, asking in chosen:
                    turned = placed(plain, query[head, asking], WINDOW) / math.sqrt(8)
                    there = placed(plain, query[head, asking], asking) / math.sqrt(8)
                    group = head * groups // heads
                    rest = sum(math.exp(float(there @ placed(plain, key[group, place], place))) for place in range(4))
                    kept[layer].append((group, number, turned, rest))
    by_hand: dict[int, list[tuple[int, int, torch.Tensor, float]]] = {}
    found = {}
    for layer in range(layers):
        by_hand[layer] = []
        for group, number, query, rest in kept[layer]:
            others = torch.cat([key[group, 4:ASKED] for other, key in enumerate(keys[layer]) if other != number])
            usual = float((others @ query).double().exp().mean()) * 1024
            by_hand[layer].append((group, number, query, -math.log(rest + usual)))
        most = [
            max(float(key[g, t] @ q) + offset for g, text_, q, offset in by_hand[layer] if text_ != number)
            for number, key in enumerate(keys[layer])
            for t in range(4, ASKED)
        ]
        rare = float(torch.tensor(most).quantile(1 - 0.005))
        by_hand[layer] = [(group, number, query, offset - rare) for group, number, query, offset in by_hand[layer]]
        hits = []
        for number, document in enumerate(made):
            votes = [
                max(
                    float(keys[layer][number][g, t] @ q) + offset
                    for g, text_, q, offset in by_hand[layer]
                    if text_ != number
                )
                for t in range(ASKED)
            ]
            least = torch.tensor(votes[4:]).quantile(0.95)
            hits += [votes[fact] > least for fact in document.values[0][1]]
        found[layer] = sum(hits) / len(hits)
    [(layer, weights)] = collect(with_memory("llama"), made, WINDOW).items()
    assert found[layer] == max(found.values())
    assert sum(weights.counts) == len(kept[layer])
    for group, _, query, offset in by_hand[layer]:
        gap = (weights.queries.split(weights.counts)[group] - query).abs().amax(-1)
        assert float(gap.min()) < 1e-4
        assert float(weights.offsets[group, gap.argmin()]) == pytest.approx(offset, abs=1e-3)


def placed(model: Any, vector: torch.Tensor, position: int) -> torch.Tensor:
    """A query or key turned to a position."""
    cos, sin = model.model.rotary_emb(vector, torch.tensor([[position]]))
    turned, _ = apply_rotary_pos_emb(vector[None, None, None], vector[None, None, None], cos, sin)
    return turned[0, 0, 0]


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "gemma2", "gpt_oss"])
def test_other_families(family: str) -> None:
    positions = {"memory_positions": "rope"} if family == "gpt2" else {}
    found = collect(with_memory(family, **positions), documents(), WINDOW)
    assert found
    assert all(0 < sum(weights.counts) <= 8 for weights in found.values())
    assert all(torch.isfinite(weights.queries).all() for weights in found.values())


def test_a_rotation_that_cannot_be_undone() -> None:
    settings = {"sink_positions": "absolute", "memory_positions": "rope"}
    with pytest.raises(ConfigError, match='as the score "asked" needs; make "learned" alone'):
        collect(with_memory("deepseek_v3", **settings), documents(), WINDOW)


def test_layers_that_are_named_vote() -> None:
    model, made = with_memory("llama"), documents()
    named = collect(model, made, WINDOW, voters=(2, 0))
    assert list(named) == [0, 2]
    [(layer, weights)] = collect(model, made, WINDOW).items()
    assert layer not in named or torch.equal(weights.queries, named[layer].queries)
    with pytest.raises(ConfigError, match=r"asked_layers names \[7\], but the layers with a memory are \[0, 1, 2\]"):
        collect(model, made, WINDOW, voters=(2, 7))


def test_the_queries_of_every_kind_look_as_rarely_at_other_texts() -> None:
    """Two kinds of facts; with many texts, what each kind's queries give one in 200 of their tokens is nothing."""
    model, layer = with_memory("llama"), _Layer()
    for seed, kind in enumerate(["code", "letter", "code", "letter"]):
        document = Document(text(1, 40, seed)[0], ASKED, ((kind, (7, 8)),))
        (asked,) = (each for each in _read(model, document, WINDOW) if each.layer == 1)
        layer.keep(asked, [kind, kind])
    offsets = layer.offsets()
    for kind in ("code", "letter"):
        most = []
        for number, sample in enumerate(layer.samples):
            looks = [
                sample[head].double() @ query.double() + offset
                for query, head, own, each, offset in zip(layer.queries, layer.heads, layer.texts, layer.kinds, offsets)
                if each == kind and own != number
            ]
            most.append(torch.stack(looks).amax(0))
        assert float(torch.cat(most).quantile(1 - 0.005)) == pytest.approx(0, abs=1e-4)
