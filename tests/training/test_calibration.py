"""The closed-form start of linearised attention: what the teacher's own softmax says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ahn
from ahn.attachment import attachment_of
from ahn.attention.recording import RecordedLayer, record_layers
from ahn.checkpoint.content import memory_tensors
from ahn.memories.linearized_attention import LinearizedAttention
from ahn.tokens import Attended
from ahn.training.calibration import calibrate
from ahn.training.sampling import Span, SpanDraw
from ahn.training.transfer import transfer_loss
from tests.tiny import text, tiny

SPAN = Span(16, 4)
LENGTH = 96
BEYOND = slice(SPAN.sinks + SPAN.window, LENGTH)


def fresh(family: str = "llama", memory: str = "linearized_attention", positions: Any = "rope") -> Any:
    model: Any = tiny(family)
    torch.manual_seed(0)
    config = ahn.AHNConfig(memory=memory, window=SPAN.window, sinks=SPAN.sinks, memory_positions=positions)
    ahn.attach(model, config)
    return model


def batches() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": text(1, LENGTH, seed)} for seed in range(6)]


@torch.no_grad()
def recorded(model: Any, ids: torch.Tensor) -> dict[int, RecordedLayer]:
    """What each layer of the teacher reads."""
    found: dict[int, RecordedLayer] = {}
    with ahn.mode(model, "ahn"):
        student = attachment_of(model).settings
    with (
        ahn.mode(model, "full"),
        record_layers(model, lambda layer: found.update({layer.layer.index: layer}), student),
    ):
        model(ids, use_cache=False)
    return found


def memories(model: Any) -> list[LinearizedAttention]:
    found = [layer.memory for layer in attachment_of(model).layers]
    assert all(isinstance(each, LinearizedAttention) for each in found)
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
@torch.no_grad()
def test_the_share_of_evicted_tokens(family: str) -> None:
    """Against the softmax spelled out, soft caps included."""
    model = fresh(family)
    for layer in recorded(model, text(1, LENGTH)).values():
        query, key, _ = (x.double() for x in layer.projected)
        module = layer.layer.module
        repeats = query.size(1) // key.size(1)
        scores = query @ key.repeat_interleave(repeats, 1).mT * float(module.scaling)
        if cap := getattr(module, "attn_logit_softcapping", None):
            scores = cap * torch.tanh(scores / cap)
        token, seen = torch.arange(LENGTH), torch.arange(LENGTH)[:, None]
        weights = scores.masked_fill(token > seen, -torch.inf).softmax(-1)
        evicted = (token >= SPAN.sinks) & (seen - token >= SPAN.window)
        expected = (weights * evicted).sum(-1)[..., BEYOND]
        share = layer.evicted_share(torch.arange(LENGTH)[BEYOND])
        torch.testing.assert_close(share.double(), expected, rtol=1e-5, atol=1e-6)
        assert bool((share > 0).all())


def unrotated(model: Any, layer: RecordedLayer, positions: str) -> torch.Tensor:
    """Queries of a layer, from its hidden states where the memory is to see them without rotation."""
    if positions == "rope":
        return layer.projected[0]
    projected: torch.Tensor = layer.layer.module.q_proj(layer.hidden)  # type: ignore[operator]
    return projected.unflatten(-1, (4, 8)).transpose(1, 2)


@pytest.mark.parametrize("positions", ["rope", "none"])
@torch.no_grad()
def test_mean_queries(positions: str) -> None:
    """The n-th token counts by 1 / sqrt(n)."""
    model, texts = fresh(positions=positions), batches()
    weights = 1 / torch.arange(1, LENGTH + 1)[BEYOND].float().sqrt()
    calibrate(model, texts, SpanDraw(fixed=SPAN))
    layers = [recorded(model, batch["input_ids"]) for batch in texts]
    for index, memory in enumerate(memories(model)):
        queries = torch.cat([unrotated(model, each[index], positions)[:, :, BEYOND] for each in layers])
        expected = (queries.mean(0) * weights[:, None]).sum(1) / weights.sum()
        torch.testing.assert_close(memory.mean_query, expected, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_shares_are_foreseen_in_other_texts() -> None:
    """Better than the mean share of each head, by far."""
    model = fresh()
    calibrate(model, batches(), SpanDraw(fixed=SPAN))
    for index, layer in recorded(model, text(1, LENGTH, 99)).items():
        memory, share = memories(model)[index], layer.evicted_share(torch.arange(LENGTH)[BEYOND])
        read, zero = layer.recall(), torch.zeros(1, LENGTH, 4, 8)[:, BEYOND]
        read[..., :8], read[..., 8:16] = read[..., -2:-1], 0  # so that `far` is 1, and the share itself is mixed in
        log_sum = layer.read_window().of_last(read.size(1)).log_sum
        foreseen = memory.gated(read, layer.hidden[:, BEYOND], Attended(zero, log_sum))[..., 0].transpose(1, 2)
        wrong = (foreseen - share).square().mean((0, 2))
        assert bool((wrong < 0.3 * share.var(2).mean(0)).all())


def test_it_explains_what_the_window_misses() -> None:
    """With the identity as output projection and no training, on texts that it has not seen."""
    model = fresh()
    calibrate(model, batches(), SpanDraw(fixed=SPAN))
    with torch.no_grad():
        for memory in memories(model):
            memory.o_proj.copy_(torch.eye(8).expand(4, 8, 8))
    loss = transfer_loss(model, {"input_ids": text(1, LENGTH, 99)}, *SPAN).mean({"transfer": 1})
    assert float(loss.detach()) < 0.3


def test_of_some_memories_alone() -> None:
    model = fresh()
    first, *others = memories(model)
    before = [{name: tensor.clone() for name, tensor in memory.named_parameters()} for memory in others]
    calibrate(model, batches(), SpanDraw(fixed=SPAN), [first])
    assert bool(first.mean_query.detach().any())
    for memory, old in zip(others, before, strict=True):
        assert all(torch.equal(tensor, old[name]) for name, tensor in memory.named_parameters())


def test_other_memories_stay_as_they_are() -> None:
    model = fresh(memory="gated_delta_net")
    before = {name: tensor.clone() for name, tensor in memory_tensors(model).items()}
    texts = iter(batches())
    calibrate(model, texts, SpanDraw(fixed=SPAN))
    assert all(torch.equal(tensor, before[name]) for name, tensor in memory_tensors(model).items())
    assert len(list(texts)) == len(batches())  # none was read
