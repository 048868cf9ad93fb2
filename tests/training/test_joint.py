"""Memory and anchors trained together: what the student reads, and the draw of the number of anchors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ahn.checkpoint.content import memory_tensors
from ahn.errors import ConfigError
from ahn.training.losses import distillation_loss
from ahn.training.sampling import AnchorDraw, Span
from tests.tiny import give_score_weights, text, with_memory
from tests.training.common import trainer_for

SPAN = {"window": 32, "sinks": 5}
ANCHORS = 7


def joint(family: str = "llama", memory: str = "gated_delta_net", **settings: Any) -> Any:
    model = with_memory(family, memory, **settings)
    give_score_weights(model, (0, 1, 2))
    return model


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt_oss"])
def test_gradients_are_those_of_one_explicit_softmax(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without the attention that has a backward pass of its own."""
    model, ids = joint(family), text(1, 90)
    span = {"window": 6, "sinks": 5} if family in ("gemma2", "gpt_oss") else SPAN
    found = []
    for blocks in (True, False):
        if not blocks:
            monkeypatch.setattr("ahn.attention.softmax_training.can_attend", lambda *arguments: False)
        for tensor in memory_tensors(model).values():
            tensor.requires_grad_(True)
        loss = distillation_loss(model, {"input_ids": ids}, {"kl": 1.0}, **span, anchors=ANCHORS).sums["kl"]
        loss.backward()
        found.append((loss.detach(), {name: tensor.grad for name, tensor in memory_tensors(model).items()}))
        model.zero_grad()
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-6)
    for name, gradient in found[1][1].items():
        torch.testing.assert_close(found[0][1][name], gradient, rtol=2e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("anchors", [0, ANCHORS])
def test_gradient_along_a_direction(anchors: int, recompute: bool) -> None:
    """The slope of the loss, against the difference of two losses; norms of the base model round to float32."""
    model, ids = joint().double(), text(1, 90)
    tensors = memory_tensors(model)
    for tensor in tensors.values():
        tensor.requires_grad_(True)

    def loss() -> torch.Tensor:
        return distillation_loss(
            model, {"input_ids": ids}, {"kl": 1.0}, **SPAN, anchors=anchors, recompute_attention=recompute
        ).sums["kl"]

    loss().backward()
    generator = torch.Generator().manual_seed(5)
    step = {name: torch.randn(tensor.shape, generator=generator).double() for name, tensor in tensors.items()}
    slope = sum(float((tensor.grad * step[name]).sum()) for name, tensor in tensors.items())
    ends = []
    for sign in (1e-4, -1e-4):
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.add_(step[name], alpha=sign)
            ends.append(float(loss()))
            for name, tensor in tensors.items():
                tensor.add_(step[name], alpha=-sign)
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-4, rel=1e-2)


def test_without_anchors_the_loss_is_what_it_was() -> None:
    given = {"input_ids": text(2, 90)}
    without, plain, with_some = (
        distillation_loss(model, given, {"kl": 1}, **SPAN, anchors=anchors).sums["kl"]
        for model, anchors in ((joint(), 0), (with_memory(), 0), (joint(), ANCHORS))
    )
    assert torch.equal(without, plain)
    assert not torch.equal(without, with_some)


def test_anchors_of_the_models_own_settings() -> None:
    """The head that is run on slices of hidden states reads no layer, and so must not look for anchors either."""
    given = {"input_ids": text(2, 90)}
    own, named = (
        distillation_loss(model, given, {"kl": 1}, **SPAN, anchors=anchors).sums["kl"]
        for model, anchors in ((joint(anchors=ANCHORS, anchor_score="learned"), None), (joint(), ANCHORS))
    )
    assert torch.equal(own, named)


def test_padded_rows_count_as_alone() -> None:
    """Rows that are padded on the right, as batches of a training are."""
    model, ids, mask = joint(), text(2, 90), torch.ones(2, 90, dtype=torch.long)
    mask[1, 70:] = 0
    given = {"input_ids": ids, "attention_mask": mask}
    together = distillation_loss(model, given, {"kl": 1}, **SPAN, anchors=ANCHORS).sums["kl"]
    alone = [
        distillation_loss(model, {"input_ids": row[None]}, {"kl": 1}, **SPAN, anchors=ANCHORS).sums["kl"]
        for row in (ids[0], ids[1, :70])
    ]
    torch.testing.assert_close(together, sum(alone), rtol=1e-4, atol=1e-5)


def test_anchors_need_weights_to_be_chosen_by() -> None:
    with pytest.raises(ConfigError, match="load_anchors"):
        distillation_loss(with_memory(), {"input_ids": text(1, 90)}, {"kl": 1}, **SPAN, anchors=ANCHORS)


def test_the_draw_of_anchors() -> None:
    draw = AnchorDraw((0, 0, 64), seed=1)
    drawn = [draw.draw(Span(256, 32), 0, place) for place in range(300)]
    assert drawn == [draw.draw(Span(256, 32), 0, place) for place in range(300)]
    assert set(drawn) == {0, 64}
    assert 60 < drawn.count(64) < 140
    assert {draw.draw(Span(4, 4), 0, place) for place in range(30)} == {0}
    for counts in ((), (-1,)):
        with pytest.raises(ConfigError):
            AnchorDraw(counts)


def test_a_training_with_anchors_goes_on_bit_for_bit(tmp_path: Path) -> None:
    weights = []
    for parts in ((4,), (2, 4)):
        for steps in parts:
            out = tmp_path / str(len(parts))
            changes = {"max_steps": steps, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
            trainer = trainer_for(out, joint(), anchors=AnchorDraw((0, 3)), average=0.5, **changes)
            trainer.train(resume_from_checkpoint=steps == 4 and len(parts) == 2)
        weights.append((memory_tensors(trainer.distiller.model), trainer.average.weights))
    for one, other in zip(*weights, strict=True):
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
