"""The engine: one gradient however a step is divided, small checkpoints, and going on exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ahn.attachment import attachment_of
from ahn.checkpoint.content import memory_tensors
from ahn.errors import CheckpointError, ConfigError
from ahn.training.batches import PieceStream
from ahn.training.distiller import Distiller
from ahn.training.sampling import Span, SpanDraw
from ahn.training.trainer import AHNTrainer
from tests.tiny import tiny, with_memory
from tests.training.common import arguments, gradients_of_a_step, pieces, trainer_for


def weights(trainer: AHNTrainer) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in memory_tensors(trainer.distiller.model).items()}


def assert_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


@pytest.mark.parametrize(("batch", "accumulation"), [(4, 1), (2, 2)])
def test_a_step_is_the_same_however_it_is_divided(tmp_path: Path, batch: int, accumulation: int) -> None:
    """Sequences count different numbers of tokens, so a mean of means would differ."""
    _, one_by_one = gradients_of_a_step(tmp_path / "a", batch=1, accumulation=4)
    _, divided = gradients_of_a_step(tmp_path / "b", batch=batch, accumulation=accumulation)
    for name, gradient in one_by_one.items():
        torch.testing.assert_close(divided[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


def test_the_loss_that_is_logged_is_the_mean_over_tokens(tmp_path: Path) -> None:
    trainer, _ = gradients_of_a_step(tmp_path, batch=2, accumulation=2)
    line = trainer.state.log_history[0]
    model, sums, counts = with_memory("llama"), dict.fromkeys(("kl", "attention"), 0.0), {"kl": 0, "attention": 0}
    distiller = Distiller(model, trainer.distiller.weights)
    for number in range(4):
        batch = {name: tensor[None] for name, tensor in pieces()[number].items()}
        spans = [trainer.draw.draw(64, 0, number)]
        found, count = distiller(**batch, spans=spans), distiller.count(batch, spans)
        for name in sums:
            sums[name] += float(found[name].detach())
            counts[name] += count[name]
    assert line["loss_kl"] == pytest.approx(sums["kl"] / counts["kl"], rel=1e-4)
    assert line["loss_attention"] == pytest.approx(sums["attention"] / counts["attention"], rel=1e-4)
    assert line["loss"] == pytest.approx(line["loss_kl"] + 2 * line["loss_attention"], rel=1e-3)


@pytest.mark.parametrize("stage", ["distill", "transfer"])
def test_the_loss_falls(tmp_path: Path, stage: str) -> None:
    trainer = trainer_for(tmp_path, stage=stage, max_steps=16, per_device_train_batch_size=4, learning_rate=0.03)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert sum(losses[-3:]) < 0.85 * sum(losses[:3])


def test_a_checkpoint_holds_the_adapter_and_not_the_base(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, save_strategy="steps", save_steps=2, save_total_limit=1)
    trainer.train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4"]
    assert {path.name for path in (tmp_path / "checkpoint-4").iterdir()} == {
        "ahn.safetensors", "ahn_config.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json",
    }  # fmt: skip
    learned = sum(tensor.nbytes for tensor in memory_tensors(trainer.distiller.model).values())
    total = sum(path.stat().st_size for path in (tmp_path / "checkpoint-4").glob("*.safetensors"))
    assert learned <= total < learned + 8192


@pytest.mark.parametrize(("streaming", "scale_lr"), [(False, 0.0), (True, 0.0), (False, 0.1)])
def test_going_on_ends_with_the_same_weights(tmp_path: Path, streaming: bool, scale_lr: float) -> None:
    def data() -> Any:
        rows = pieces(6)
        make = lambda: (_piece(rows[number % 6]) for number in range(40))  # noqa: E731
        return PieceStream(make) if streaming else rows

    settings: dict[str, Any] = {
        "scale_lr": scale_lr,
        "max_steps": 6,
        "gradient_accumulation_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    whole = trainer_for(tmp_path / "whole", data=data(), **settings)
    whole.train()
    shorter = trainer_for(tmp_path / "parts", data=data(), **settings)
    shorter.add_callback(_stop_at(4))
    shorter.train()
    torch.manual_seed(99)  # what happened in between must not matter
    parts = trainer_for(tmp_path / "parts", data=data(), **settings)
    parts.train(resume_from_checkpoint=True)
    assert_equal(weights(parts), weights(whole))
    losses = [[line["loss"] for line in each.state.log_history if "loss" in line] for each in (whole, parts)]
    assert losses[0] == losses[1]


def test_a_finished_run_is_loaded_and_left_alone(tmp_path: Path) -> None:
    first = trainer_for(tmp_path, save_strategy="steps", save_steps=2)
    first.train()
    again = trainer_for(tmp_path)
    again.train(resume_from_checkpoint=True)
    assert_equal(weights(again), weights(first))
    assert again.state.global_step == 4


def test_there_must_be_something_to_resume_from(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint"):
        trainer_for(tmp_path).train(resume_from_checkpoint=True)


def test_the_base_and_every_config_stay_as_they_were(tmp_path: Path) -> None:
    model = with_memory("llama")
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items() if ".memory." not in name}
    before = json.dumps(model.config.to_dict(), sort_keys=True, default=str), attachment_of(model).config
    trainer_for(tmp_path, model).train()
    assert (json.dumps(model.config.to_dict(), sort_keys=True, default=str), attachment_of(model).config) == before
    for name, tensor in plain.items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert not model.training


def test_evaluation_uses_its_own_span(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path)
    trainer.evaluation_span = Span(16, 4)
    found = trainer.evaluate(pieces(1))["eval_loss"]
    batch = {name: tensor[None] for name, tensor in pieces(1)[0].items()}
    sums = trainer.distiller(**batch, spans=[Span(16, 4)])
    counts = trainer.distiller.count(batch, [Span(16, 4)])
    expected = sum(weight * sums[name].item() / counts[name] for name, weight in trainer.distiller.weights.items())
    assert found == pytest.approx(expected, rel=1e-4)


def test_matrices_decay_and_rates_do_not(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path)
    names = {
        name.split(".memory.")[1] for name in trainer.get_decay_parameter_names(trainer.model) if ".memory." in name
    }
    assert names == {"a_proj.weight", "b_proj.weight", "g_proj.weight", "o_proj"}


def test_checkpointed_activations_give_the_same_gradient(tmp_path: Path) -> None:
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        distiller = Distiller(with_memory("llama"), {"kl": 1.0, "attention": 1.0})
        if checkpointing:
            distiller.activation_checkpointing_enable()
            distiller.train()
            assert any(module.training for module in distiller.model.model.layers)
        batch = {name: tensor[None] for name, tensor in pieces()[1].items()}
        torch.stack(list(distiller(**batch, spans=[Span(16, 4)]).values())).sum().backward()
        return {name: tensor.grad for name, tensor in memory_tensors(distiller.model).items()}

    plain, checkpointed = gradients(False), gradients(True)
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def test_a_base_in_half_precision_trains_its_memories_in_float32(tmp_path: Path) -> None:
    model = with_memory("llama").to(torch.bfloat16)
    trainer = trainer_for(tmp_path, model)
    trainer.train()
    assert {tensor.dtype for tensor in memory_tensors(model).values()} == {torch.float32}
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    trainer.distiller.finish()
    assert model(pieces()[0]["input_ids"][None]).logits.isfinite().all()


class TestRefusals:
    def test_no_memory(self, tmp_path: Path) -> None:
        from ahn.errors import ModelError

        with pytest.raises(ModelError, match="no memory is attached"):
            AHNTrainer(tiny("llama"), arguments(tmp_path))

    def test_spans_that_do_not_fit_the_sequences(self, tmp_path: Path) -> None:
        trainer = AHNTrainer(
            with_memory("llama"), arguments(tmp_path), draw=SpanDraw(totals=(64, 128)), train_dataset=pieces()
        )
        with pytest.raises(ConfigError, match="leaves nothing"):
            trainer.train()

    @pytest.mark.parametrize("losses", [{"l2": 1.0}, {"kl": -1.0}, {"kl": 0.0}, {"kl": "1"}])
    def test_losses(self, losses: Any) -> None:
        with pytest.raises(ConfigError, match=r"loss|weight"):
            Distiller(with_memory("llama"), losses)

    def test_a_diverged_training_is_not_saved(self, tmp_path: Path) -> None:
        trainer = trainer_for(tmp_path)
        next(iter(memory_tensors(trainer.distiller.model).values())).data.fill_(float("nan"))
        with pytest.raises(CheckpointError, match="diverged"):
            trainer.save_model()


def _piece(item: dict[str, torch.Tensor]) -> Any:
    from ahn.training.batches import Piece

    return Piece(item["input_ids"].tolist(), item["labels"].tolist())


def _stop_at(step: int) -> Any:
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step >= step

    return Stop()
