"""The objective against its plain definition, over families, paddings and slices."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ahn
from ahn import ops
from ahn.checkpoint.content import memory_tensors
from ahn.distillation import Head, find_targets
from ahn.errors import ModelError
from ahn.training.losses import distillation_loss
from ahn.training.recording import recording
from tests.tiny import FAMILIES, text, with_memory

SPAN = {"window": 16, "sinks": 5}


def trainable(family: str, **settings: Any) -> Any:
    model = with_memory(family, **settings)
    for tensor in memory_tensors(model).values():
        tensor.requires_grad_(True)
    return model


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: tensor.grad for name, tensor in memory_tensors(model).items()}
    model.zero_grad()
    return found


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=2e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plain_definition(family: str) -> None:
    """With the logits of both models whole, as no training could afford."""
    model, ids = trainable(family), text(2, 60)
    span = {"window": 4, "sinks": 5} if family in ("gemma2", "gpt_oss") else SPAN
    total = sum(span.values())
    output = distillation_loss(model, {"input_ids": ids}, {"kl": 1, "ce": 1}, **span, slice_tokens=9)
    with torch.no_grad(), ahn.mode(model, "full"):
        teacher = model(ids, use_cache=False).logits[:, total:].log_softmax(-1)
    with ahn.mode(model, "ahn", **span):
        logits = model(ids, use_cache=False).logits[:, total:]
    kl = F.kl_div(logits.log_softmax(-1), teacher, log_target=True, reduction="sum")
    ce = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, total + 1 :].flatten(), reduction="sum")
    torch.testing.assert_close(output.sums["kl"], kl, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.sums["ce"], ce, rtol=1e-4, atol=1e-5)
    assert output.tokens == {"kl": 2 * (60 - total), "ce": 2 * (59 - total)}
    output.mean({"kl": 1, "ce": 2}).backward()
    ours = gradients(model)
    (kl / output.tokens["kl"] + 2 * ce / output.tokens["ce"]).backward()
    assert_close(ours, gradients(model))


def test_no_tensor_has_all_positions_and_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = trainable("llama"), []
    forward = model.lm_head.forward
    monkeypatch.setattr(
        model.lm_head, "forward", lambda hidden: rows.append(hidden.shape[:-1].numel()) or forward(hidden)
    )
    distillation_loss(model, {"input_ids": text(2, 75)}, {"kl": 1, "ce": 1}, **SPAN, slice_tokens=8).mean(
        {"kl": 1, "ce": 1}
    )
    assert sum(rows) == 2 * 2 * (75 - 21)
    assert max(rows) == 8


def test_window_and_memory_keep_nothing_for_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward pass of the student keeps less than a third of what it would keep by itself."""

    def kept(run: Any) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            alive.append(tensor)
            return tensor

        alive: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run()
        return sum(sizes.values())

    model, ids = trainable("llama"), text(1, 512)
    with ahn.mode(model, "ahn", window=64, sinks=0):
        own_backward = kept(lambda: model.model(ids, use_cache=False))
        with recording(model.model, recompute=True):
            lean = kept(lambda: model.model(ids, use_cache=False))
        monkeypatch.setattr("ahn.attention.softmax_training.can_attend", lambda *arguments: False)
        with ops.backend("chunked"):
            plain = kept(lambda: model.model(ids, use_cache=False))
    assert lean < plain / 3
    assert own_backward < plain / 2


def test_computing_again_changes_nothing() -> None:
    model, found = trainable("qwen3"), []
    for again in (False, True):
        loss = distillation_loss(model, {"input_ids": text(1, 64)}, {"kl": 1}, **SPAN, recompute_attention=again)
        loss.mean({"kl": 1}).backward()
        found.append(gradients(model))
    assert_close(found[1], found[0])


@pytest.mark.slow
def test_a_step_at_4096_tokens_fits_into_six_gibibytes() -> None:
    code = """
import resource, torch
import ahn
from ahn.models import load_model
from ahn.training.distiller import Distiller
model = load_model("smollm2-135m")
ahn.attach(model, ahn.AHNConfig(window=256, sinks=32))
distiller = Distiller(model)
distiller.activation_checkpointing_enable()
torch.stack(list(distiller(torch.randint(3, 49000, (1, 4096)), [(256, 32)]).values())).sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 6


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_are_each_row_alone(side: str) -> None:
    model, weights = trainable("qwen3"), {"kl": 1, "ce": 1, "attention": 1}
    rows = [text(1, length, seed=length) for length in (75, 50)]
    before, after = (25, 0) if side == "left" else (0, 25)
    ids = torch.cat([rows[0], F.pad(rows[1], (before, after), value=0)])
    mask = torch.cat([torch.ones_like(rows[0]), F.pad(torch.ones_like(rows[1]), (before, after))])
    together = distillation_loss(model, {"input_ids": ids, "attention_mask": mask}, weights, **SPAN)
    alone = [distillation_loss(model, {"input_ids": row}, weights, **SPAN) for row in rows]
    for name in weights:
        assert together.tokens[name] == sum(each.tokens[name] for each in alone)
        expected = sum(each.sums[name] for each in alone)
        torch.testing.assert_close(together.sums[name], expected, rtol=1e-4, atol=1e-5)


def test_a_silent_memory_and_a_large_window_lose_nothing() -> None:
    model = trainable("llama")
    output = distillation_loss(
        model, {"input_ids": text(1, 40)}, {"kl": 1, "ce": 1, "attention": 1}, window=40, sinks=0
    )
    assert output.tokens == {"kl": 0, "ce": 0, "attention": 0}
    assert float(output.mean({"kl": 1, "ce": 1, "attention": 1}).detach()) == 0


def test_half_precision_sums_in_float32() -> None:
    model = trainable("llama").to(torch.bfloat16)
    output = distillation_loss(model, {"input_ids": text(1, 60)}, {"kl": 1}, **SPAN)
    assert output.sums["kl"].dtype == torch.float32
    output.mean({"kl": 1}).backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


class TestHead:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_it_is_the_model_s_own(self, family: str) -> None:
        Head(with_memory(family, window=4, sinks=5)).check()

    def test_a_model_whose_logits_hang_on_more_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = with_memory("llama")
        forward = model.forward

        def by_length(input_ids: Any = None, **kwargs: Any) -> Any:
            output = forward(input_ids=input_ids, **kwargs)
            output.logits = output.logits * (1 if input_ids is None else 2)
            return output

        monkeypatch.setattr(model, "forward", by_length)
        with pytest.raises(ModelError, match="last hidden state"):
            Head(model).check()

    def test_the_layers_are_back_in_their_place(self) -> None:
        model = with_memory("llama")
        expected = model(text()).logits
        Head(model).check()
        assert "forward" not in vars(model.model)
        assert torch.equal(model(text()).logits, expected)


class TestTargets:
    IDS = torch.arange(12)[None]

    def test_labels_leave_positions_out(self) -> None:
        labels = torch.where((self.IDS < 4) | (self.IDS == 7), -100, self.IDS)
        targets = find_targets({"input_ids": self.IDS, "labels": labels}, 4, 1)
        assert targets.kl.tolist() == [5, 6, 8, 9, 10, 11]
        assert list(zip(targets.ce.tolist(), targets.ce_labels.tolist())) == [(5, 6), (7, 8), (8, 9), (9, 10), (10, 11)]
        assert targets.attention.tolist() == [5, 6, 7, 8, 9, 10, 11]

    def test_the_published_pairs(self) -> None:
        labels = torch.where(self.IDS == 7, -100, self.IDS)
        targets = find_targets({"input_ids": self.IDS, "labels": labels}, 4, 1, "published")
        assert list(zip(targets.ce.tolist(), targets.ce_labels.tolist()))[:3] == [(5, 6), (6, 8), (8, 9)]

    def test_rows_do_not_run_into_each_other(self) -> None:
        targets = find_targets({"input_ids": self.IDS.repeat(2, 1)}, 4, 1)
        assert 11 not in targets.ce.tolist()
        assert targets.ce.tolist()[6:8] == [17, 18]
