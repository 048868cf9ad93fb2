"""Anchor scores that need weights: which layers score, and weights that come and go."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ahn
from ahn.anchors.pooling import LONG_POOL, POOL
from ahn.anchors.queries import AnchorQueries
from ahn.attachment import attachment_of
from ahn.errors import CheckpointError
from ahn.surgery import set_score_weights
from tests.tiny import give_score_weights, read, text, with_memory

SINKS, WINDOW, ANCHORS = 5, 16, 6


def learned(layers: tuple[int, ...] = (0, 2), family: str = "llama", **settings: Any) -> Any:
    model = with_memory(family, **{"anchors": ANCHORS, "anchor_score": "learned", **settings})
    give_score_weights(model, layers)
    return model


def scores_of(scores_T: torch.Tensor, kernel: int, after: int, slope: float) -> dict[int, float]:
    """Means over neighbours, of which tokens a quarter of a window before and some behind are lent some."""
    means = [float(scores_T[max(0, j - kernel) : j + kernel + 1].mean()) for j in range(75)]
    return {
        j: max(means[k] - slope * abs(k - j) for k in range(max(0, j - after), j + WINDOW // 4 + 1))
        for j in range(SINKS, 75 - WINDOW)
    }


def spans_first(scores_TR: torch.Tensor, firm: float) -> dict[int, float]:
    """What firm means lend, and the other score's means over three tokens of all that none lends to, ranked behind."""
    means, near = (
        [float(scores_TR[max(0, j - kernel) : j + kernel + 1, of].mean()) for j in range(75)]
        for of, kernel in ((0, POOL), (1, 1))
    )
    reached = {j: means[max(0, j - 4) : j + WINDOW // 4 + 1] for j in range(SINKS, 75 - WINDOW)}
    return {j: max((mean for mean in own if mean >= firm), default=near[j] - 100) for j, own in reached.items()}


def best_tokens(scores: dict[int, float]) -> list[int]:
    return sorted(scores, key=lambda j: -scores[j])[:ANCHORS]


@pytest.mark.parametrize("scale", [1, 40])
def test_the_layers_with_a_gate_vote(scale: float) -> None:
    """The choice against one made of what both layers read, spelled out: with and without spans."""
    model, ids = learned(), text(1, 75)
    cache = ahn.HippocampalCache(model)
    seen: dict[int, list[torch.Tensor]] = {0: [], 2: []}
    for layer, inputs in seen.items():
        norm = model.model.layers[layer].input_layernorm
        norm.register_forward_hook(lambda module, args, output, inputs=inputs: inputs.append(output))
    gates: list[Any] = [attachment_of(model).layer(layer).score_weights("learned") for layer in seen]
    for gate in gates:
        gate.outer.weight.data[0] *= scale
    read(model, ids, [13] * 5 + [10], cache=cache)
    with torch.no_grad():
        votes = [gate(torch.cat(parts, 1))[0] for gate, parts in zip(gates, seen.values())]
    scores = spans_first(torch.stack(votes).mean(0), firm=0.95)
    assert {score > -50 for score in scores.values()} == ({False} if scale == 1 else {False, True})
    assert scale != 1 or cache.anchor_tokens == [best_tokens(scores)]
    (chosen,) = cache.anchor_tokens
    assert len(set(chosen)) == ANCHORS
    best = [scores[j] for j in best_tokens(scores)]  # those of one span are equal but for rounding
    assert [scores[j] for j in chosen] == pytest.approx(best, abs=1e-4)


def test_asked_takes_the_best_kind_of_the_mean_over_layers_of_the_most_that_a_query_would_look() -> None:
    """The choice against one made of the keys of both layers, spelled out.

    One layer scores by the kind of long facts alone.
    """
    model, ids = with_memory(anchors=ANCHORS, anchor_score="asked"), text(1, 75)
    give_score_weights(model, (0, 2))
    cache = ahn.HippocampalCache(model)
    seen: dict[int, list[torch.Tensor]] = {0: [], 2: []}
    for layer, keys in seen.items():
        project = model.model.layers[layer].self_attn.k_proj
        project.register_forward_hook(lambda module, args, output, keys=keys: keys.append(output))
    read(model, ids, [13] * 5 + [10], cache=cache)
    shares: tuple[dict[int, list[float]], ...] = ({}, {})
    for layer, parts in seen.items():
        weights = attachment_of(model).layer(layer).score_weights("asked")
        assert isinstance(weights, AnchorQueries)
        for token, key in enumerate(torch.cat(parts, 1)[0].unflatten(-1, (-1, 8)).double()):
            looks: tuple[list[float], ...] = ([], [])
            for row, (asking, offsets) in enumerate(zip(weights.queries.double(), weights.offsets)):
                head = row % len(key)  # give_score_weights
                looks[int(weights.kinds[row].argmax())].append(float(asking @ key[head] + offsets[head]))
            for kind, look in enumerate(looks):
                if look:
                    shares[kind].setdefault(token, []).append(max(look))
    assert [len(each[0]) for each in shares] == [2, 1]
    means = torch.tensor([[sum(each[token]) / len(each[token]) for token in range(75)] for each in shares])
    near, far = scores_of(means.amax(0), POOL, 4, 0.02), scores_of(means[0], LONG_POOL, 11, 0.02)
    scores = {token: max(near[token], far[token] + 0.8) for token in near}
    assert 0 < sum(near[token] > far[token] + 0.8 for token in near) < len(near)
    assert sorted(cache.anchor_tokens[0]) == sorted(best_tokens(scores))  # of equal ones either may come first


def test_a_kind_that_no_voting_layer_asks_for_is_left_out() -> None:
    model = with_memory(anchors=ANCHORS, anchor_score="asked", anchor_layers=(2,))
    give_score_weights(model, (0, 2))
    cache = ahn.HippocampalCache(model)
    read(model, text(2, 75), cache=cache)
    assert cache.scoreboard is not None
    assert torch.isfinite(cache.scoreboard.stored["votes"]).all()
    assert all(len(tokens) == ANCHORS for tokens in cache.anchor_tokens)


def test_layers_must_vote_by_the_same_kinds(tmp_path: Path) -> None:
    model = with_memory(anchors=ANCHORS, anchor_score="asked")
    give_score_weights(model, (0, 2))
    set_score_weights(attachment_of(model).layer(2), {"asked": AnchorQueries([4], 2, 8)})
    ahn.save_anchors(model, tmp_path / "weights")
    with pytest.raises(CheckpointError, match=r"its layers score different kinds of facts. Make it anew"):
        ahn.load_anchors(model, tmp_path / "weights")


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_saved_weights_read_alike(tmp_path: Path, dtype: Any) -> None:
    model, ids = learned(), text(1, 75)
    ahn.save_anchors(model, tmp_path / "weights", dtype)
    assert sorted(file.name for file in (tmp_path / "weights").iterdir()) == [
        "anchors.safetensors",
        "anchors_config.json",
    ]
    other = with_memory(anchors=ANCHORS, anchor_score="learned")
    give_score_weights(other, (0, 1))  # they are replaced
    ahn.load_anchors(other, tmp_path / "weights")
    assert attachment_of(other).layer(1).score_weights("learned") is None
    if dtype is None:
        assert torch.equal(read(other, ids), read(model, ids))
    else:
        ours, theirs = (attachment_of(each).layer(2).score_weights("learned") for each in (model, other))
        assert ours is not None
        assert theirs is not None
        assert torch.equal(theirs.inner.weight, ours.inner.weight.bfloat16().float())


def test_weights_go_with_the_memory() -> None:
    model = learned()
    assert any("anchor_votes" in name for name in model.state_dict())
    assert not any(p.requires_grad for name, p in model.named_parameters() if "anchor_votes" in name)
    ahn.detach(model)
    assert not any("anchor_votes" in name for name in model.state_dict())


def test_a_copied_model_has_weights_of_its_own() -> None:
    model, ids = learned(), text(1, 75)
    copied, expected = copy.deepcopy(model), read(model, ids)
    give_score_weights(model, ())
    gate = attachment_of(model).layer(0).score_weights("learned")
    assert gate is not None
    gate.inner.weight.data.neg_()
    assert torch.equal(read(copied, ids), expected)


def write_weights(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Other tensors in a folder of saved weights, with their checksum."""
    file, about = folder / "anchors.safetensors", folder / "anchors_config.json"
    save_file(tensors, file)
    config = json.loads(about.read_text())
    config["weights"]["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    about.write_text(json.dumps(config))


class TestErrors:
    def test_no_weights(self, tmp_path: Path) -> None:
        model = with_memory(anchors=ANCHORS, anchor_score="learned")
        with pytest.raises(ahn.AHNError, match=r"no weights on this model; load some with ahn\.load_anchors"):
            read(model, text(1, 75))
        with ahn.mode(model, "ahn", anchor_score="value_norm"):
            read(model, text(1, 75))
        with pytest.raises(ahn.AHNError, match="no weights of anchor scores to save"):
            ahn.save_anchors(model, tmp_path)

    def test_no_such_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ahn.AHNError, match="there is no such folder"):
            ahn.load_anchors(with_memory(), tmp_path / "nothing")
        (tmp_path / "empty").mkdir()
        with pytest.raises(ahn.AHNError, match=r"holds no anchors_config\.json"):
            ahn.load_anchors(with_memory(), tmp_path / "empty")

    def test_weights_of_the_other_kind_are_told(self, tmp_path: Path) -> None:
        """Those in a folder and those that ship."""
        model = learned()
        ahn.save(model, tmp_path / "memory")
        ahn.save_anchors(model, tmp_path / "weights")
        for name in (tmp_path / "memory", "smollm2-135m/delta_net"):
            with pytest.raises(CheckpointError, match=rf"{name}: .* weights of a memory\. Load them with ahn\.load\.$"):
                ahn.load_anchors(model, name)
        for name in (tmp_path / "weights", "smollm2-135m/anchors"):
            with pytest.raises(
                CheckpointError, match=rf"{name}: .* weights of anchor scores\. .* ahn\.load_anchors\.$"
            ):
                ahn.load(model, name)

    def test_another_base(self, tmp_path: Path) -> None:
        ahn.save_anchors(learned(), tmp_path / "weights")
        with pytest.raises(ahn.AHNError, match="its anchor scores were made for"):
            ahn.load_anchors(with_memory("qwen3"), tmp_path / "weights")

    def test_a_layer_without_memory(self, tmp_path: Path) -> None:
        ahn.save_anchors(learned(), tmp_path / "weights")
        model = with_memory(layers=(0, 1))
        with pytest.raises(ahn.AHNError, match="it scores tokens in layer 2, which has no memory"):
            ahn.load_anchors(model, tmp_path / "weights")
        assert attachment_of(model).layer(0).score_weights("learned") is None

    def test_a_folder_that_is_damaged(self, tmp_path: Path) -> None:
        ahn.save_anchors(learned(), tmp_path / "weights")
        file = tmp_path / "weights" / "anchors.safetensors"
        file.write_bytes(file.read_bytes()[:-4] + b"abcd")
        with pytest.raises(ahn.AHNError, match="checksums differ"):
            ahn.load_anchors(with_memory(), tmp_path / "weights")

    @pytest.mark.parametrize("claim", ["counts", "width"])
    def test_a_file_that_claims_more_than_it_holds(self, tmp_path: Path, claim: str) -> None:
        """Queries of a kind and units of a network: no memory is taken for counts that a file only claims."""
        ahn.save_anchors(learned(), tmp_path)
        tensors = load_file(tmp_path / "anchors.safetensors")
        if claim == "counts":
            tensors["layers.0.kinds"][0] = 1e30
        else:
            tensors["layers.0.inner.bias"] = torch.zeros(1 << 24)
            tensors["layers.0.inner.weight"] = torch.zeros(4, 1)
        write_weights(tmp_path, tensors)
        with pytest.raises(ahn.AHNError, match=r"its weights of (asked|learned) cannot be used"):
            ahn.load_anchors(with_memory(), tmp_path)

    def test_queries_that_are_not_in_the_order_of_their_kinds(self, tmp_path: Path) -> None:
        ahn.save_anchors(learned(), tmp_path)
        tensors = load_file(tmp_path / "anchors.safetensors")
        for name in ("queries", "kinds", "offsets"):
            tensors[f"layers.0.{name}"] = tensors[f"layers.0.{name}"].flip(0).contiguous()
        write_weights(tmp_path, tensors)
        with pytest.raises(CheckpointError, match=r"the queries of the first kind first\). .*make it anew"):
            ahn.load_anchors(with_memory(), tmp_path)


def test_auto_takes_what_the_model_has_weights_for() -> None:
    model = with_memory(anchors=ANCHORS)
    attachment = attachment_of(model)
    assert attachment.settings.anchor_score == "auto"
    assert ahn.HippocampalCache(model).settings.anchor_score == "key_diff"
    give_score_weights(model, (0, 2))
    assert ahn.HippocampalCache(model).settings.anchor_score == "learned"
    del attachment.layer(0).anchor_weights["learned"]  # type: ignore[union-attr]
    with ahn.mode(model, "ahn", anchor_layers=[0]):
        assert ahn.HippocampalCache(model).settings.anchor_score == "asked"
    with ahn.mode(model, "ahn", anchor_layers=[1]):
        assert ahn.HippocampalCache(model).settings.anchor_score == "key_diff"
        with ahn.mode(model, "ahn", anchor_score="value_norm"), ahn.mode(model, "ahn", anchor_score="auto"):
            assert ahn.HippocampalCache(model).settings.anchor_score == "key_diff"


def test_auto_is_decided_when_a_text_begins(tmp_path: Path) -> None:
    model, ids = with_memory(anchors=ANCHORS), text(1, 90)
    begun = ahn.HippocampalCache(model)
    read(model, ids[:, :50], [50], cache=begun)
    begun.save(tmp_path / "cache")
    with ahn.mode(model, "ahn", anchor_score="key_diff"):
        wanted = read(model, ids, [50, 40])
    give_score_weights(model)
    with ahn.mode(model, "ahn", anchor_score="learned"):
        other = read(model, ids, [50, 40])
    again = ahn.HippocampalCache.load(tmp_path / "cache", model)
    assert torch.equal(read(model, ids[:, 50:], [40], cache=again), wanted[:, 50:])
    assert torch.equal(read(model, ids, [50, 40]), other)
    assert not torch.equal(wanted, other)
