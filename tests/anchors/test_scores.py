"""Scores that need no weights, each against the same in float64, and the contract that every score keeps."""

from __future__ import annotations

import inspect
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

import ahn
from ahn.anchors import simple
from ahn.anchors.base import LayerTokens, Score
from ahn.anchors.pooling import Pooling
from ahn.anchors.scores import SCORES
from ahn.anchors.selection import Scoreboard
from ahn.anchors.simple import Recent
from ahn.attachment import attachment_of
from ahn.evaluation.controls import Random
from tests.tiny import give_score_weights, read, text, with_memory

SINKS, WINDOW, ANCHORS, TOKENS = 5, 16, 6, 75
CONTRIBUTING = Path(__file__).parents[2] / "CONTRIBUTING.md"


class Recording(Score):
    """Another score that keeps what each layer was given.

    Args:
        score: The other.
    """

    def __init__(self, score: Score) -> None:
        self.of, self.name, self.pooling = score, score.name, score.pooling
        self.accumulates = score.accumulates  # type: ignore[misc]
        self.delay, self.default_layers = score.delay, score.default_layers  # type: ignore[method-assign]
        self.given: list[LayerTokens] = []

    def score(self, tokens: LayerTokens) -> torch.Tensor:
        self.given.append(tokens)
        return self.of.score(tokens)


def scored_by(score: Score) -> Any:
    model = with_memory(anchors=ANCHORS, anchor_score=score.name)
    give_score_weights(model)
    return model


def held_scores(cache: Any, token: int) -> float:
    votes = cache.scoreboard.stored["votes"]
    return float(votes[0, token % votes.size(1), 0])


def test_value_norm_against_float64() -> None:
    model, ids = with_memory(anchors=ANCHORS, anchor_score="value_norm"), text(1, TOKENS)
    values: dict[int, list[torch.Tensor]] = {0: [], 1: [], 2: []}
    for layer, parts in values.items():
        project = model.model.layers[layer].self_attn.v_proj
        project.register_forward_hook(lambda module, args, output, parts=parts: parts.append(output))
    cache = ahn.HippocampalCache(model)
    read(model, ids, [13] * 5 + [10], cache=cache)
    lengths = [torch.cat(parts, 1)[0].double().unflatten(-1, (2, 8)).norm(dim=-1).mean(-1) for parts in values.values()]
    scores = torch.stack(lengths).mean(0)
    pooled = {j: float(scores[j - 3 : j + 4].mean()) for j in range(SINKS, TOKENS - WINDOW)}
    assert cache.anchor_tokens == [sorted(pooled, key=lambda j: -pooled[j])[:ANCHORS]]


@pytest.mark.parametrize("chunks", [1, 4, [5, 1, 1, 3] * 7 + [5]], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_window_attention_against_float64(family: str, chunks: Any) -> None:
    """Weights of one softmax over sinks, anchors and window, spelled out for each query."""
    model, ids = with_memory(family, anchors=ANCHORS), text(1, TOKENS)
    score, banks = Recording(simple.WindowAttention()), list[set[int]]()
    cache = ahn.HippocampalCache(model, anchor_score=score)
    for token in ids[0]:
        read(model, token[None, None], cache=cache)
        banks.append({place for place in cache.anchor_tokens[0] if place >= 0})
    layers = sorted(cache.scoreboard.layers) if cache.scoreboard else []
    delay, given = WINDOW // 2, torch.zeros(TOKENS, dtype=torch.float64)
    for number, layer in enumerate(layers):
        own = score.given[number :: len(layers)]
        query, key = (torch.cat([getattr(each, name) for each in own], 2)[0] for name in ("queries", "keys"))
        key = key.repeat_interleave(query.size(0) // key.size(0), 0).double()
        rest = getattr(model.model.layers[layer].self_attn, "sinks", None)
        for i in range(TOKENS):
            near = range(max(SINKS, i - WINDOW + 1), i + 1)
            read_by_i = [*range(min(SINKS, i + 1)), *sorted(banks[i]), *near]
            products = torch.einsum("hk,hjk->hj", query[:, i].double(), key[:, read_by_i]) * 8**-0.5
            if rest is not None:
                products = torch.cat((products, rest.double()[:, None]), 1)
            weights = products.softmax(-1).mean(0)
            for j in near:
                if 0 < i - j <= delay:
                    given[j] += weights[read_by_i.index(j, len(read_by_i) - len(near))] / delay / len(layers)
    again = ahn.HippocampalCache(model, anchor_score=simple.WindowAttention())
    read(model, ids, chunks, cache=again)
    final = range(TOKENS - WINDOW, TOKENS - delay)
    assert [held_scores(again, j) for j in final] == pytest.approx([float(given[j]) for j in final], abs=1e-6)
    pooled = {j: float(given[j - 3 : j + 4].mean()) for j in range(SINKS + 3, TOKENS - WINDOW)}
    best = sorted(pooled, key=lambda j: -pooled[j])[: ANCHORS - 2]
    assert set(best) <= set(again.anchor_tokens[0])


@pytest.mark.parametrize("chunks", [[12], [1] * 12, [7, 1, 4]], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "smollm3"])
def test_attention_weights_make_the_attention_output(family: str, chunks: list[int]) -> None:
    """Without sinks, and before a token leaves, weights on the window times its values are what the layer writes."""
    model = with_memory(family, sinks=0, window=12, anchors=ANCHORS)
    score, written = Recording(Recent()), list[torch.Tensor]()
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args: written.append(args[0]))
    cache = ahn.HippocampalCache(model, anchor_score=score)
    blocks: list[list[Any]] = []
    score.of.score = lambda tokens: (blocks.append(list(tokens.attention())), Recent().score(tokens))[1]  # type: ignore
    read(model, text(1, 12), chunks, cache=cache)
    served = list(attachment_of(model).weighted_layers)
    for number, layer in enumerate(served):
        values = torch.cat([each.values for each in score.given[number :: len(served)]], 2)[0]
        made = torch.cat([each[0] for each in written[layer::3]])
        values = values.repeat_interleave(made.size(1) // values.size(2) // values.size(0), 0)
        for block in (block for call in blocks[number :: len(served)] for block in call):
            seen = slice(block.key, block.key + block.weights_BHQJ.size(3))
            out = (block.weights_BHQJ[0] @ values[:, seen]).transpose(0, 1).flatten(1)
            torch.testing.assert_close(out, made[block.query : block.query + len(out)], rtol=0, atol=1e-5)


def test_parts_of_a_score_are_added_up() -> None:
    board = Scoreboard(4, 2, {16}, frozenset([0]), simple.WindowAttention())
    expected = torch.zeros(60)
    generator, seen = torch.Generator().manual_seed(1), 0
    for new in (5, 1, 1, 5, 3, 1, 5, 5, 5, 5, 5):
        first = max(0, seen - 8)
        parts = torch.rand(1, seen + new - first, 1, generator=generator)
        expected[first : seen + new] += parts[0, :, 0]
        board.record(parts, seen)
        seen += new
    held = board.stored["votes"][0, :, 0]
    kept = torch.arange(seen - 16, seen)
    torch.testing.assert_close(held[kept % len(held)], expected[kept])


@pytest.mark.parametrize("score", SCORES.values(), ids=list(SCORES))
class TestContract:
    def test_name_and_delay(self, score: Score) -> None:
        assert SCORES[score.name] is score
        assert all(0 <= score.span(window) < window for window in (32, 256, 32640))
        assert set(score.default_layers(range(30))) <= set(range(30))

    def test_weights_have_the_names_that_it_says(self, score: Score) -> None:
        if not score.weight_names:
            with pytest.raises(NotImplementedError):
                score.build({}, hidden_size=8, kv_heads=2, key_size=4)
            return
        stored = {
            "inner.weight": torch.zeros(3, 8),
            "inner.bias": torch.zeros(3),
            "outer.bias": torch.zeros(2),
            "kinds": torch.eye(3),
        }
        weights = score.build(stored, hidden_size=8, kv_heads=2, key_size=4)
        assert tuple(weights.state_dict()) == score.weight_names
        assert score.disagreement([weights, weights]) is None

    def test_beams(self, score: Score) -> None:
        model, ids = scored_by(score), text(2, 50)
        both = model.generate(ids, max_new_tokens=10, do_sample=False, num_beams=2)
        for row in range(2):
            alone = model.generate(ids[row : row + 1], max_new_tokens=10, do_sample=False, num_beams=2)
            assert torch.equal(both[row : row + 1, : alone.size(1)], alone)

    def test_saved_and_forked_caches_continue_bit_for_bit(self, score: Score, tmp_path: Path) -> None:
        model = scored_by(score)
        cache = ahn.HippocampalCache(model)
        read(model, text(2, 61), 20, cache=cache)
        cache.save(tmp_path / "cache")
        twins = cache.fork(), ahn.HippocampalCache.load(tmp_path / "cache", model)
        more = [read(model, text(2, 30, seed=8), [9, 1, 20], cache=each) for each in (cache, *twins)]
        assert torch.equal(more[0], more[1])
        assert torch.equal(more[0], more[2])


class TestPooling:
    @pytest.mark.parametrize(
        "pooling",
        [
            Pooling(),
            Pooling((1, 4), 0.5, (6, 2), 0.25),
            Pooling((0,), firm=0.8),
            Pooling((1, 4), 0.1, (3, 2), 0.25, firm=0.5),
            SCORES["asked"].pooling,
            SCORES["learned"].pooling,
        ],
        ids=str,
    )
    def test_against_a_loop(self, pooling: Pooling) -> None:
        window, tokens, begin = 16, 40, 7
        left, right = pooling.margins(window)
        line = torch.arange(-left, tokens + right)
        scores = torch.randn(1, len(line), pooling.scores, generator=torch.Generator().manual_seed(4))
        scores[0, left + 20 : left + 26] += 2
        found = pooling.apply(scores, (line >= begin)[None].float(), window)[0]
        assert len(found) == tokens
        for j in range(begin, tokens):
            best = []
            for number, kernel in enumerate(pooling.kernels):
                after = pooling.spread[1] + kernel - pooling.kernels[0]
                for k in range(j - after, j + min(pooling.spread[0], window // 4) + 1):
                    own = [float(scores[0, left + n, number]) for n in range(max(begin, k - kernel), k + kernel + 1)]
                    if own:
                        mean = sum(own) / len(own)
                        if pooling.firm is None or mean >= pooling.firm:
                            best.append(mean + pooling.bonus * (number > 0) - pooling.slope * abs(k - j))
            near = scores[0, left + max(begin, j - 1) : left + j + 2, -1]
            best = best or [float(near.mean()) - 100]
            assert float(found[j]) == pytest.approx(max(best), abs=1e-5)

    def test_a_span_is_kept_whole_or_not_at_all(self) -> None:
        """Two spans that differ by little, and a token that scores almost as high and spreads to none."""
        pooling, scores = Pooling((0,), spread=(4, 2), firm=1.0), torch.zeros(1, 80, 2)
        scores[0, [24, 44, 60], 0] = torch.tensor([2.0, 1.9, 0.9])
        scores[0, [25, 60], 1] = torch.tensor([5.0, 0.9])
        left, right = pooling.margins(64)
        pooled = torch.full((80,), float("-inf"))
        pooled[left : 80 - right] = pooling.apply(scores, torch.ones(1, 80), 64)[0]
        ranked = pooled.sort(descending=True, stable=True).indices.tolist()
        assert ranked[:14] == [*range(20, 27), *range(40, 47)]
        assert set(ranked[14:17]) == {59, 60, 61}
        assert float(pooled[60]) == pytest.approx(0.3 - 100)


class TestAdding:
    def test_a_class_and_a_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What CONTRIBUTING says is all there is to a new score."""

        class KeySpread(Score):
            """The spread of a key over its channels."""

            name = "key_spread"

            def score(self, tokens: LayerTokens) -> torch.Tensor:
                return tokens.keys.float().std(-1).mean(1)

        monkeypatch.setitem(SCORES, "key_spread", KeySpread())
        model, ids = with_memory(anchors=ANCHORS, anchor_score="key_spread"), text(2, TOKENS)
        torch.testing.assert_close(read(model, ids, [30, 1, 1, 43]), read(model, ids), rtol=0, atol=3e-5)
        assert not torch.equal(read(with_memory(anchors=ANCHORS), ids), read(model, ids))

    def test_the_example_of_contributing_is_the_class(self) -> None:
        section = CONTRIBUTING.read_text().partition("## Adding an anchor score")[2].partition("\n## ")[0]
        example = re.findall(r"```python\n(class .*?)```", section, flags=re.DOTALL)[0]
        assert textwrap.dedent(inspect.getsource(simple.ValueNorm)) == example
        assert "ValueNorm()," in section

    def test_a_cache_of_a_score_without_a_name_is_not_read_again(self, tmp_path: Path) -> None:
        model = with_memory(anchors=ANCHORS)
        cache = ahn.HippocampalCache(model, anchor_score=Random())
        read(model, text(1, 40), cache=cache)
        cache.save(tmp_path / "cache")
        with pytest.raises(ahn.AHNError, match=r"anchor_score 'random'.*known are"):
            ahn.HippocampalCache.load(tmp_path / "cache", model)

    def test_a_window_that_is_too_short_in_one_layer(self) -> None:
        """Layers that slide over 12 tokens by themselves have 7 left beside five sinks."""
        with pytest.raises(ahn.AHNError, match=r"anchors need a window of at least 14 tokens .*, not 7"):
            with_memory("mistral", model={"sliding_window": 12}, anchors=ANCHORS, anchor_score="asked")
