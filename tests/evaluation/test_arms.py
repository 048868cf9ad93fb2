"""The arms: what each reads, scores and answers."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch.nn import functional

import ahn
from ahn.errors import ConfigError
from ahn.evaluation.arms import ARMS, arm_reader
from ahn.evaluation.controls import Random
from ahn.generation import read
from tests.tiny import text, with_memory

SINKS, WINDOW = 5, 16


@pytest.fixture(scope="module")
def model() -> Any:
    return with_memory()


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm != "tail"])
def test_scores_are_those_of_reading(model: Any, arm: Any) -> None:
    ids = text(1, 90)[0]
    reader = arm_reader(model, arm)
    for piece in ids.split(37):
        reader.prefill(piece)
    with ahn.mode(model, arm):
        expected = read(model, ids)
    torch.testing.assert_close(reader.nll, expected.nll, rtol=0, atol=1e-4)
    torch.testing.assert_close(reader.logits, expected.logits, rtol=0, atol=1e-4)
    assert reader.tokens == 90
    assert reader.seconds > 0
    assert reader.cache_bytes > 0


@pytest.mark.parametrize("pieces", [90, 37, 1])
def test_with_the_memory_of_another_text(model: Any, pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a reading whose memories are given what the other text evicts, as one of the other text noted it."""
    ids, other = text(2, 90)
    real, written = ahn.memories.Memory.scan, []

    def note(memory: Any, q: Any, k: Any, v: Any, gates: Any, state: Any) -> Any:
        written.append((k, v, gates))
        return real(memory, q, k, v, gates, state)

    def replace(memory: Any, q: Any, k: Any, v: Any, gates: Any, state: Any) -> Any:
        return real(memory, q, *written.pop(0), state)

    with ahn.mode(model, "ahn"):
        monkeypatch.setattr(ahn.memories.Memory, "scan", note)
        read(model, other)
        monkeypatch.setattr(ahn.memories.Memory, "scan", replace)
        expected = read(model, ids)
    monkeypatch.undo()
    assert not written
    reader = arm_reader(model, "ahn", other_T=other)
    for piece in ids.split(pieces):
        reader.prefill(piece)
    torch.testing.assert_close(reader.nll, expected.nll, rtol=0, atol=1e-4)
    with ahn.mode(model, "ahn"):
        assert (read(model, ids).nll - expected.nll).abs().max() > 0.1


def test_the_other_text_goes_on_in_forks_and_begins_again(model: Any) -> None:
    ids, other = text(2, 90)
    straight, forked = (arm_reader(model, "ahn", other_T=other[:50]) for _ in range(2))
    straight.prefill(ids)
    repeated = arm_reader(model, "ahn", other_T=torch.cat((other[:50], other[:50])))
    repeated.prefill(ids)
    torch.testing.assert_close(straight.nll, repeated.nll, rtol=0, atol=1e-5)
    forked.prefill(ids[:60])
    fork = forked.fork()
    fork.prefill(ids[60:])
    torch.testing.assert_close(fork.nll, straight.nll[-30:], rtol=0, atol=1e-4)
    assert straight.progress.cache_bytes == straight.cache_bytes
    assert len(list(straight.generate(3))) == 3


@pytest.mark.parametrize("arm", ["ahn", "ahn+4"])
def test_a_text_as_its_own_other(model: Any, arm: str) -> None:
    """Anchors are chosen for each text by itself, so that nothing differs."""
    ids = text(1, 90)[0]
    readers = arm_reader(model, arm), arm_reader(model, arm, other_T=ids)
    for reader in readers:
        reader.prefill(ids)
    torch.testing.assert_close(readers[1].nll, readers[0].nll, rtol=0, atol=1e-4)
    assert readers[1].cache_bytes == readers[0].cache_bytes


@pytest.mark.parametrize("arm", ["window", "anchors+4", "full", "tail"])
def test_no_memory_to_hold_another_text(model: Any, arm: str) -> None:
    with pytest.raises(ConfigError, match="has no memory that could hold another text; use ahn or"):
        arm_reader(model, arm, other_T=text(1, 90)[0])


@torch.no_grad()
def test_tail_knows_nothing_but_sinks_and_window(model: Any) -> None:
    """Every score against the base model on the ids that it may see, in steps of an eighth of a window."""
    ids, step = text(1, 90)[0], WINDOW // 8
    reader = arm_reader(model, "tail")
    for piece in ids.split(7):
        reader.prefill(piece)
    nll = []
    with ahn.mode(model, "full"):
        for token in range(1, 90):
            candidates = []
            for seen in range(WINDOW - step, WINDOW + 1):
                given = torch.cat((ids[: min(SINKS, token)], ids[max(SINKS, token - seen) : token]))
                candidates.append(functional.cross_entropy(model(given[None]).logits[0, -1], ids[token]))
            nll.append(torch.stack(candidates))
    near = (torch.stack(nll) - reader.nll[:, None]).abs().amin(1)
    assert near.max() < 1e-4
    assert reader.tokens == 90


def test_tail_keeps_one_cache(model: Any) -> None:
    """However long the text, the inputs that it gave up leave nothing but their scores."""
    reader = arm_reader(model, "tail")
    first = weakref.ref(reader.cache)
    reader.prefill(text(1, 90)[0])
    gc.collect()
    assert first() is None
    assert reader.nll.numel() == 89


@torch.no_grad()
def test_tail_answers_from_the_whole_window(model: Any) -> None:
    ids, more = text(1, 90)[0], text(1, 30, seed=8)[0]
    reader = arm_reader(model, "tail", score=False)
    reader.prefill(ids)
    twin = reader.fork()
    twin.prefill(more)
    given = torch.cat((ids[:SINKS], ids[-WINDOW:], more))
    with ahn.mode(model, "full"):
        logits = model(given[None]).logits[0]
    expected = functional.cross_entropy(logits[-31:-1], more, reduction="none")
    torch.testing.assert_close(twin.nll, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("arm", ARMS)
def test_forks_and_answers(model: Any, arm: str) -> None:
    ids, more = text(1, 70)[0], text(1, 9, seed=8)[0]
    reader = arm_reader(model, arm, score=False)
    reader.prefill(ids)
    first, second = reader.fork(), reader.fork()
    first.prefill(more)
    written = list(second.generate(8))
    assert list(reader.fork().generate(8)) == written
    assert list(reader.generate(8, stop=[written[3]])) == written[: written.index(written[3])]
    again = arm_reader(model, arm, score=False)
    again.prefill(ids)
    twin = again.fork()
    twin.prefill(more)
    torch.testing.assert_close(twin.nll, first.nll, rtol=0, atol=1e-4)
    assert first.nll.numel() == 9


def test_arms_with_numbers(model: Any) -> None:
    ids = text(1, 90)[0]
    cases = {
        "window+9": ("window", {"window": WINDOW + 9}),
        "ahn+4": ("ahn", {"anchors": 4}),
        "ahn+4:value_norm": ("ahn", {"anchors": 4, "anchor_score": "value_norm"}),
        "ahn+4:recent": ("ahn", {"anchors": 4, "anchor_score": "recent"}),
        "ahn+4:random": ("ahn", {"anchors": 4}),
    }
    for arm, (mode, settings) in cases.items():
        reader = arm_reader(model, arm)
        reader.prefill(ids)
        with ahn.mode(model, mode, **settings):  # type: ignore[arg-type]
            control = ahn.HippocampalCache(model, anchor_score=Random()) if arm.endswith("random") else None
            torch.testing.assert_close(reader.nll, read(model, ids, cache=control).nll, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["none", "", "full+3", "ahn+0", "window+4:recent", "ahn+", "ahn+4:", "ahn+4:luck"])
def test_unknown_arms(model: Any, name: str) -> None:
    with pytest.raises(ConfigError, match="known are"):
        arm_reader(model, name)
