"""The bank of anchors: the selection against a loop, and the store in every way of reading."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import ahn
from ahn.anchors.pooling import POOL
from ahn.anchors.scores import SCORES
from ahn.anchors.selection import Scoreboard, _Anchors, select
from ahn.anchors.simple import Recent
from ahn.backbone.compat import CACHE
from ahn.errors import ConfigError
from ahn.evaluation.controls import Oracle
from ahn.tokens import NEVER
from tests.tiny import give_score_weights, read, text, tiny, with_memory

SINKS, WINDOW, ANCHORS = 5, 16, 6


def anchored(family: str = "llama", memory: str = "gated_delta_net", **settings: Any) -> Any:
    model = with_memory(family, memory, **{"anchors": ANCHORS, **settings})
    if settings.get("anchor_score") in ("asked", "learned"):
        give_score_weights(model)
    return model


def held_after(scores: list[float], tokens: list[int], anchors: int) -> list[set[int]]:
    """Tokens in the bank after each of a row has left, by a loop."""
    banks: list[set[int]] = []
    for count in range(1, len(tokens) + 1):
        best = sorted(range(count), key=lambda i: (-scores[i], tokens[i]))
        banks.append({tokens[i] for i in best[:anchors] if scores[i] > float("-inf")})
    return banks


@pytest.mark.parametrize("chunks", [[1] * 30, [30], [7, 1, 2, 20], [13, 17]], ids=str)
@pytest.mark.parametrize("kind", ["random", "ties", "rising", "padded"])
def test_election_against_a_loop(kind: str, chunks: list[int]) -> None:
    anchors, count, first = 4, 30, 9
    generator = torch.Generator().manual_seed(2)
    scores = torch.rand(3, count, generator=generator)
    if kind == "ties":
        scores = (scores * 3).round()
    if kind == "rising":
        scores = torch.arange(count).float().expand(3, -1).clone()
    if kind == "padded":
        scores[1, :11] = scores[2] = float("-inf")
    tokens = torch.arange(first, first + count)
    held = _Anchors(torch.full((3, anchors), float("-inf")), torch.full((3, anchors), -1))
    bank, done = torch.full((3, anchors), -1), 0
    for size in chunks:
        new = _Anchors(scores[:, done : done + size], tokens[done : done + size].expand(3, -1))
        choice, after = select(held, new, WINDOW)
        candidates = torch.cat((bank, new.tokens[:, choice.entering]), 1)
        for row in range(3):
            expected = held_after(scores[row].tolist(), tokens.tolist(), anchors)
            for step in range(size):
                query = int(tokens[done + step]) + WINDOW
                reads = (choice.visible_from[row] <= query) & (query < choice.visible_until[row])
                assert set(candidates[row, reads].tolist()) == expected[done + step]
        held = held if after is None else after
        bank = bank if choice.source is None else candidates.gather(1, choice.source)
        assert torch.equal(torch.where(held.tokens < 0, bank, held.tokens), bank)
        done += size


@pytest.mark.parametrize(
    ("family", "chunks"),
    [
        ("llama", 1),
        ("gpt_oss", 1),
        *itertools.product(["llama", "qwen3", "gemma2", "gpt2", "gpt_oss", "smollm3"], [7, 33, [50, 1, 1, 1, 22]]),
    ],
    ids=str,
)
def test_any_chunking_reads_alike(family: str, chunks: Any) -> None:
    settings = {"anchor_score": "key_norm"} if family == "gpt2" else {}
    model, ids = anchored(family, **settings), text(2, 75)
    expected = read(model, ids)
    torch.testing.assert_close(read(model, ids, chunks), expected, rtol=0, atol=3e-5)
    with torch.no_grad():
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=0, atol=3e-5)
    with ahn.mode(model, "ahn", anchors=0):
        without = read(model, ids)
    torch.testing.assert_close(without[:, : SINKS + WINDOW], expected[:, : SINKS + WINDOW], rtol=0, atol=3e-5)
    assert not torch.allclose(without[:, 40:], expected[:, 40:], atol=1e-3)


@pytest.mark.parametrize("score", SCORES)
def test_every_score_and_memory(memory: str, score: str) -> None:
    model, ids = anchored(memory=memory, anchor_score=score), text(2, 70)
    torch.testing.assert_close(read(model, ids, [29, 1, 1, 39]), read(model, ids), rtol=0, atol=2e-4)


@pytest.mark.parametrize("chunks", [None, 9, [40, 1, 1, 1, 37]], ids=str)
@pytest.mark.parametrize("sink_positions", ["absolute", "bounded"])
def test_the_most_recent_anchors_are_a_larger_window(chunks: Any, sink_positions: Any) -> None:
    """With a memory that says nothing, they must read as a window that is larger by their number."""
    model, ids = tiny(), text(2, 80)
    config = ahn.AHNConfig(window=WINDOW, sinks=SINKS, sink_positions=sink_positions, anchors=ANCHORS)
    ahn.attach(model, config)
    with ahn.mode(model, "window", window=WINDOW + ANCHORS, anchors=0):
        expected = read(model, ids)
    for mode in ("ahn", "window"):
        with ahn.mode(model, mode):
            recent = ahn.HippocampalCache(model, anchor_score=Recent())
        torch.testing.assert_close(read(model, ids, chunks or [80], cache=recent), expected, rtol=0, atol=3e-5)
    assert not torch.allclose(read(model, ids, chunks), expected, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "llama:wide"])
@pytest.mark.parametrize("chunks", [None, 1, 9, [40, 1, 1, 1, 37]], ids=str)
def test_recent_anchors_and_a_memory_without_them_are_a_larger_window(chunks: Any, family: str) -> None:
    """Then window, anchors and state hold each token once, whatever the window."""
    model, ids = anchored(family, "linearized_attention"), text(2, 80)
    with ahn.mode(model, "ahn", window=WINDOW + ANCHORS, anchors=0):
        expected = read(model, ids)
    recent = ahn.HippocampalCache(model, anchor_score=Recent())
    torch.testing.assert_close(read(model, ids, chunks or [80], cache=recent), expected, rtol=0, atol=3e-5)
    with ahn.mode(model, "window", window=WINDOW + ANCHORS, anchors=0):
        assert not torch.allclose(read(model, ids), expected, atol=1e-3)


@pytest.mark.parametrize("chunks", [None, 1, 9, [40, 1, 1, 1, 37]], ids=str)
@pytest.mark.parametrize("score", ["key_diff", "key_norm", "learned"])
def test_a_state_without_anchors(chunks: Any, score: str) -> None:
    """With what the anchors add, the state of the first layer is the one of a text that is read without anchors."""
    model, ids = anchored("llama", "linearized_attention", anchor_score=score), text(2, 80)
    states = []
    for anchors in (0, ANCHORS):
        with ahn.mode(model, "ahn", anchors=anchors):
            cache = ahn.HippocampalCache(model)
        read(model, ids, chunks or [80], cache=cache)
        states.append(cache.layers[0].tensors()["state"])
    held, memory = cache.layers[0].tensors(), model.model.layers[0].self_attn.memory
    keys, values = (held[name].transpose(1, 2) for name in ("anchor_keys", "anchor_values"))
    gates = memory.gates(torch.zeros(2, ANCHORS, 32)).detach()
    _, added = memory.scan(torch.zeros(2, ANCHORS, 4, 8), keys, values, gates, states[1])
    torch.testing.assert_close(added, states[0], rtol=1e-4, atol=1e-5)
    assert bool(((states[0] - states[1])[:, :, -1, -1] > 0.5).all())


@pytest.mark.parametrize("chunks", [None, 1, [40, 1, 1, 1, 37]], ids=str)
def test_a_window_with_anchors_reads_no_memory(chunks: Any) -> None:
    """It reads what the same model with a silent memory reads with as many anchors."""
    silent, awake, ids = tiny(), anchored(), text(2, 80)
    ahn.attach(silent, ahn.AHNConfig(window=WINDOW, sinks=SINKS, anchors=ANCHORS))
    with ahn.mode(awake, "window"):
        found, cache = read(awake, ids, chunks), ahn.HippocampalCache(awake)
        read(awake, ids, [80], cache=cache)
    torch.testing.assert_close(found, read(silent, ids), rtol=0, atol=3e-5)
    for layer in cache.layers:
        assert layer.state is None
        assert "anchor_keys" in layer.tensors()


@pytest.mark.parametrize(
    ("sink_positions", "score"),
    [*(("absolute", score) for score in SCORES), ("bounded", "learned"), ("bounded", "window_attention")],
)
@pytest.mark.parametrize("memory", ["gated_delta_net", "linearized_attention"])
def test_padded_rows_read_as_alone(sink_positions: Any, score: str, memory: str) -> None:
    settings = {"sink_positions": sink_positions, "anchor_score": score}
    model = anchored(memory=memory, model={"max_position_embeddings": 40}, **settings)
    ids, mask = text(2, 80), torch.ones(2, 80, dtype=torch.long)
    mask[1, :23] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    full_row, padded_row = read(model, ids[:1]), read(model, ids[1:, 23:])
    for chunks in (None, 11, [60, *[1] * 20]):
        both = read(model, ids, chunks, attention_mask=mask, position_ids=positions)
        torch.testing.assert_close(both[:1], full_row, rtol=0, atol=3e-5)
        torch.testing.assert_close(both[1:, 23:], padded_row, rtol=0, atol=3e-5)


def test_bytes_stop_growing(tmp_path: Path) -> None:
    model = anchored()
    cache, sizes = ahn.HippocampalCache(model), set()
    for start in range(0, 200, 10):
        read(model, text(2, 200)[:, start : start + 10], [6, 1, 1, 1, 1], cache=cache)
        if start >= 30:
            sizes.add(cache.nbytes)
    assert len(sizes) == 1
    cache.save(tmp_path / "cache")
    assert ahn.cache.storage.describe_cache(tmp_path / "cache")["nbytes"] == cache.nbytes


def test_fork_and_saved_file_continue_bit_for_bit(tmp_path: Path) -> None:
    model = anchored()
    cache = ahn.HippocampalCache(model)
    read(model, text(2, 62), 20, cache=cache)
    cache.save(tmp_path / "cache")
    twin, loaded = cache.fork(), ahn.HippocampalCache.load(tmp_path / "cache", model)
    more = text(2, 40, seed=8)
    logits = [read(model, more, [20, 1, 19], cache=each) for each in (cache, twin, loaded)]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    assert cache.nbytes == twin.nbytes == loaded.nbytes


def test_rows_can_be_reordered_and_forgotten() -> None:
    model, ids = anchored(), text(2, 60)
    cache = ahn.HippocampalCache(model)
    read(model, ids, 20, cache=cache)
    cache.reorder_cache(torch.tensor([1, 1]))
    more = text(1, 20, seed=8).expand(2, -1)
    after = read(model, more, [7, 1, 12], cache=cache)
    expected = read(model, torch.cat((ids[1:], more[:1]), 1))[:, 60:]
    torch.testing.assert_close(after, expected.expand(2, -1, -1), rtol=0, atol=3e-5)
    cache.reset()
    torch.testing.assert_close(read(model, ids, 13, cache=cache), read(model, ids), rtol=0, atol=3e-5)


def test_generates_with_beams() -> None:
    model, ids = anchored(), text(2, 60)
    both = model.generate(ids, max_new_tokens=12, do_sample=False, num_beams=3)
    for row in range(2):
        alone = model.generate(ids[row : row + 1], max_new_tokens=12, do_sample=False, num_beams=3)
        assert torch.equal(both[row : row + 1, : alone.size(1)], alone)


def test_a_long_call_returns_all_that_a_short_one_does() -> None:
    model, ids = anchored(), text(2, 60)
    with torch.no_grad():
        output = model(ids, output_hidden_states=True, labels=ids)
        backbone = model.model(ids, return_dict=False)
    assert [each.shape[1] for each in output.hidden_states] == [60] * 4
    torch.testing.assert_close(backbone[0], output.hidden_states[-1], rtol=0, atol=3e-5)
    assert output[CACHE].get_seq_length() == 60
    assert torch.isfinite(output.loss)


@pytest.mark.parametrize("chosen", [None, (0, 1, 2), (2,)])
def test_scores_are_those_of_the_chosen_layers(chosen: tuple[int, ...] | None) -> None:
    """The choice against one made of the keys of these layers, spelled out."""
    model, ids = anchored(), text(1, 75)
    with ahn.mode(model, "ahn", anchor_layers=chosen):
        cache = ahn.HippocampalCache(model)
    keys: list[torch.Tensor] = []
    hooks = [
        layer.self_attn.k_proj.register_forward_hook(lambda module, args, output: keys.append(output))
        for layer in model.model.layers
    ]
    read(model, ids, [13] * 5 + [10], cache=cache)
    for hook in hooks:
        hook.remove()
    layers = torch.stack([torch.cat(keys[layer::3], 1) for layer in range(3)])[:, 0].unflatten(-1, (2, 8))
    unit = layers / layers.norm(dim=-1, keepdim=True)
    later = (torch.arange(75) + WINDOW // 4).clamp(max=74)
    mean = (unit.cumsum(1) / torch.arange(1, 76)[:, None, None])[:, later]
    scores = -torch.cosine_similarity(layers, mean, dim=-1)[list(chosen or (1, 2))].mean((0, 2))
    pooled = {j: float(scores[max(0, j - POOL) : j + POOL + 1].mean()) for j in range(SINKS, 75 - WINDOW)}
    best = sorted(pooled, key=lambda j: -pooled[j])[:ANCHORS]
    assert cache.scoreboard is not None
    assert sorted(cache.scoreboard.stored[f"tokens.{WINDOW}"][0].tolist()) == sorted(best)
    assert cache.anchor_tokens == [best]


def test_default_layers() -> None:
    assert SCORES["key_diff"].default_layers(range(30)) == [18, 20]
    assert SCORES["key_diff"].default_layers([1, 4, 7]) == [4, 7]
    assert SCORES["key_norm"].default_layers([1, 4, 7]) == [1, 4, 7]


def test_layers_that_cannot_vote_are_named() -> None:
    model = anchored()
    with pytest.raises(ConfigError, match=r"anchor_layers names \[3\], but the layers with a memory are \[0, 1, 2\]"):
        ahn.mode(model, "ahn", anchor_layers=(1, 3)).__enter__()
    with pytest.raises(ConfigError, match="anchor_layers must name at least one layer"):
        ahn.mode(model, "ahn", anchor_layers=()).__enter__()


def test_without_anchors_nothing_is_kept_for_them() -> None:
    cache = ahn.HippocampalCache(with_memory())
    assert cache.scoreboard is None
    assert cache.anchor_tokens == []
    with ahn.mode(model := anchored(), "ct_max"):
        assert ahn.HippocampalCache(model).scoreboard is None


def test_longest_call_leaves_room_for_the_neighbours() -> None:
    assert Scoreboard(4, 5, {16, 9}, frozenset(), SCORES["key_diff"]).longest_call == 9 - POOL - 2
    assert NEVER > 2**60


def test_a_score_that_is_not_registered() -> None:
    model, wanted = with_memory(anchors=9), set(range(20, 29))
    cache = ahn.HippocampalCache(model, anchor_score=Oracle(wanted))
    assert cache.settings.anchor_score == "oracle"
    read(model, text(1, 70)[:, :40], [29, 1, 1, 9], cache=cache)
    for each in (cache, cache.fork()):
        read(model, text(1, 70)[:, 40:], cache=each)
        assert set(each.anchor_tokens[0]) == wanted
    with pytest.raises(ConfigError, match="unknown anchor_score 'oracle'"):
        with_memory(anchors=4, anchor_score="oracle")


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"anchors": -1}, "at least 0"),
        ({"anchors": 2.5}, "whole number"),
        ({"anchors": 4, "anchor_score": "luck"}, "known are auto, key_diff"),
        ({"anchors": 4, "window": 3}, "at least 5 tokens"),
    ],
)
def test_bad_settings(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(ahn.AHNError, match=word):
        with_memory(**settings)
    plain = with_memory()
    with pytest.raises(ahn.AHNError, match=word), ahn.mode(plain, "ahn", **settings):
        pass


@pytest.mark.parametrize("score", SCORES)
def test_the_window_that_an_error_asks_for_is_long_enough(score: str) -> None:
    model = with_memory()
    with pytest.raises(ahn.AHNError) as refused, ahn.mode(model, "ahn", anchors=4, window=1, anchor_score=score):
        pass
    least = int(re.findall(r"at least (\d+) tokens", str(refused.value))[0])
    for window in range(1, least):
        with pytest.raises(ahn.AHNError, match=f"at least {least} tokens .* not {window};"):
            ahn.mode(model, "ahn", anchors=4, window=window, anchor_score=score).__enter__()
    for window in range(least, least + 9):
        with ahn.mode(model, "ahn", anchors=4, window=window, anchor_score=score):
            pass


def test_tokens_are_not_taken_back() -> None:
    model = anchored()
    cache = ahn.HippocampalCache(model)
    read(model, text(1, 12), cache=cache)
    with pytest.raises(ahn.AHNError, match="fork"):
        cache.crop(-2)
