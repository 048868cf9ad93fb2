"""The score that keeps queries: which are kept, against a loop, and that they find what answers would look at."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from ahn.anchors.queries import NEVER_ASKED, AnchorQueries
from ahn.errors import ConfigError
from ahn.training.anchors.asked import _is_long, _Layer, _read, _Response, _scoring_layers, collect
from ahn.training.anchors.documents import FactText
from tests.tiny import text, tiny, with_memory

ASKED, WINDOW = 31, 12


def documents(count: int = 4) -> list[FactText]:
    return [FactText(text(1, 40, seed)[0], ASKED, (("code", (7 + seed, 8 + seed)),)) for seed in range(count)]


def test_votes_against_a_loop() -> None:
    weights = AnchorQueries((3, 1, 0), 3, 8, long=[False, True, True])
    weights.queries.normal_(generator=torch.Generator().manual_seed(1))
    responses = ((0, 0.5), (0, -1.0), (2, 0.25), (1, 0.75))
    for row, (head, offset) in enumerate(responses):
        weights.offsets[row, head] = offset
    keys = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(2))
    both = weights(keys)
    assert both.shape == (2, 5, 3, 2)
    votes, far = both.unbind(-1)
    assert votes[..., 2].isnan().all()
    assert far[..., [0, 2]].isnan().all()
    assert torch.equal(far[..., 1], votes[..., 1])
    assert weights.kinds.tolist() == [[1, 0, 0], [1, 0, 0], [1, 0, 0], [0, 1, 0]]
    placed = [(row, head, offset) for row, (head, offset) in enumerate(responses)]
    for row in range(2):
        for token in range(5):
            for kind, own in enumerate((placed[:3], placed[3:])):
                best = max(
                    float(keys[row, head, token].double() @ weights.queries[n].double()) + offset
                    for n, head, offset in own
                )
                assert float(votes[row, token, kind]) == pytest.approx(best, abs=1e-5)


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
    shares = {}
    for layer in range(layers):
        by_hand[layer] = []
        for group, number, query, rest in kept[layer]:
            others = torch.cat([key[group, 4:ASKED] for other, key in enumerate(keys[layer]) if other != number])
            usual = float((others @ query).double().exp().mean()) * 1024
            by_hand[layer].append((group, number, query, -math.log(rest + usual)))

        def look(text_: int, token: int, layer: int = layer) -> tuple[float, int]:
            """The most that a query of another text gives a token, and which."""
            return max(
                (float(keys[layer][text_][g, token] @ q) + offset, n)
                for n, (g, own, q, offset) in enumerate(by_hand[layer])
                if own != text_
            )

        best = {look(number, at)[1] for number, document in enumerate(made) for at in document.values[0][1]}
        by_hand[layer] = [query for n, query in enumerate(by_hand[layer]) if n in best]

        others = torch.tensor([look(number, token)[0] for number in range(len(made)) for token in range(4, ASKED)])
        facts = torch.tensor(
            [look(number, at)[0] for number, document in enumerate(made) for at in document.values[0][1]]
        )
        shares[layer] = float((facts > others.quantile(1 - 0.02)).float().mean())
        rare = float(others.quantile(1 - 0.003))
        by_hand[layer] = [(group, number, query, offset - rare) for group, number, query, offset in by_hand[layer]]
    [(layer, weights)] = collect(with_memory("llama"), made, WINDOW).items()
    assert shares[layer] == max(shares.values())
    assert weights.counts == (len(weights.queries),) == (len(by_hand[layer]),)
    for group, _, query, offset in by_hand[layer]:
        gap = (weights.queries - query).abs().amax(-1)
        assert float(gap.min()) < 1e-4
        assert float(weights.offsets[gap.argmin(), group]) == pytest.approx(offset, abs=1e-3)
    assert int((weights.offsets > NEVER_ASKED).sum()) == len(weights.queries)


def placed(model: Any, vector: torch.Tensor, position: int) -> torch.Tensor:
    """A query or key turned to a position."""
    cos, sin = model.model.rotary_emb(vector, torch.tensor([[position]]))
    turned, _ = apply_rotary_pos_emb(vector[None, None, None], vector[None, None, None], cos, sin)
    return turned[0, 0, 0]


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "gemma2", "gpt_oss"])
def test_other_families(family: str) -> None:
    positions = {"memory_positions": "rope"} if family == "gpt2" else {}
    shares = collect(with_memory(family, **positions), documents(), WINDOW)
    assert shares
    assert all(0 < len(weights.queries) <= 8 for weights in shares.values())
    assert all(torch.isfinite(weights.queries).all() for weights in shares.values())


def test_a_rotation_that_cannot_be_undone() -> None:
    settings = {"sink_positions": "absolute", "memory_positions": "rope"}
    with pytest.raises(ConfigError, match='"asked" cannot be made; make "learned" alone'):
        collect(with_memory("deepseek_v3", **settings), documents(), WINDOW)


def test_texts_without_a_kind_in_common() -> None:
    made = [dataclasses.replace(each, values=((kind, (7, 8)),)) for each, kind in zip(documents(2), ("code", "letter"))]
    with pytest.raises(ConfigError, match="no two texts have facts of one kind"):
        collect(with_memory("llama"), made, WINDOW)


def seen(seed: int) -> dict[str, _Response]:
    """How the queries of two kinds look at texts."""
    generator = torch.Generator().manual_seed(seed)
    known = {
        kind: _Response([], torch.rand(40, generator=generator) + 0.6, torch.rand(500, generator=generator))
        for kind in ("code", "letter")
    }
    known["code"].sample_S[:7] = float("-inf")
    return known


def test_each_kind_has_the_layers_that_find_it_best_and_is_as_rare_as_the_others() -> None:
    layers = {3 * number: seen(number) for number in range(13)}
    is_code = torch.arange(40) < 25
    voters = _scoring_layers(layers, {"code": is_code, "letter": ~is_code})
    for kind, meant, first in (("code", slice(25), 7), ("letter", slice(25, 40), 0)):
        shares = {}
        for index, layer in layers.items():
            responses = layer[kind]
            shares[index] = float((responses.facts_F[meant] > responses.sample_S[first:].quantile(0.98)).float().mean())
        best = {index for index, least in voters.items() if kind in least}
        assert len(best) == 2
        assert min(shares[index] for index in best) >= sorted(shares.values())[-2]
        assert max(shares.values()) > sorted(shares.values())[-3]
        mean = torch.stack([layers[index][kind].sample_S[first:] for index in best]).mean(0)
        assert all(voters[index][kind] == pytest.approx(float(mean.quantile(0.997)), abs=1e-6) for index in best)


def test_weights_hold_the_kinds_that_a_layer_votes_by() -> None:
    model, layer = with_memory("llama"), _Layer()
    for seed, kind in enumerate(["code", "letter", "code", "letter"]):
        document = FactText(text(1, 40, seed)[0], ASKED, ((kind, (7, 8)),))
        (asked,) = (each for each in _read(model, document, WINDOW) if each.layer == 1)
        layer.keep(asked, [kind, kind])
    is_code = torch.tensor([True, True, False, False] * 2)
    responses = layer.responses({"code": is_code, "letter": ~is_code})
    weights = layer.weights(responses, {"letter": 0.5}, {"code": False, "letter": True, "serial": False})
    meant = responses.by_kind["letter"].queries
    assert weights.counts == (0, len(meant), 0)
    assert {layer.kinds[n] for n in meant} == {"letter"}
    assert weights.long.tolist() == [0, 1, 0]
    for row, n in enumerate(meant):
        assert torch.equal(weights.queries[row], layer.queries[n])
        expected = torch.full((weights.offsets.size(1),), NEVER_ASKED)
        expected[layer.heads[n]] = responses.offsets_N[n] - 0.5
        torch.testing.assert_close(weights.offsets[row], expected)


def test_facts_that_fill_more_than_ten_tokens_in_the_mean_are_long() -> None:
    ids = text(1, 40)[0]
    values = (("serial", tuple(range(2, 11))), ("code", tuple(range(11, 21))))
    made = [FactText(ids, ASKED, values), FactText(ids, ASKED, (("serial", tuple(range(2, 15))),))]
    assert _is_long("serial", made)  # 9 and 13 tokens
    assert not _is_long("code", made)  # 10
