"""What several tests of the training share: data, a trainer of one step, and a folder with a tiny base model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from ahn.checkpoint.content import memory_tensors
from ahn.training.batches import Piece, Pieces
from ahn.training.sampling import SpanDraw
from ahn.training.trainer import AHNTrainer
from tests.tiny import byte_tokenizer, text, tiny, with_memory


def pieces(count: int = 4, length: int = 64) -> Pieces:
    """Sequences of which each counts another number of tokens."""
    made = []
    for number in range(count):
        ids = text(1, length, seed=number)[0].tolist()
        ignored = 8 * number
        made.append(Piece(ids, [*ids[: length - ignored], *[-100] * ignored]))
    return Pieces(made)


def arguments(out: Path, **changes: Any) -> TrainingArguments:
    """Arguments of a quiet run of a few steps on the CPU."""
    values: dict[str, Any] = {
        "output_dir": str(out),
        "max_steps": 4,
        "per_device_train_batch_size": 1,
        "learning_rate": 1e-2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
    }
    return TrainingArguments(**{**values, **changes})


class Gradients(TrainerCallback):
    """Keeps the memories' gradients just before the optimizer uses them."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.kept: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.kept = {name: tensor.grad.clone() for name, tensor in memory_tensors(self.model).items()}


def trainer_for(
    out: Path,
    model: Any = None,
    data: Any = None,
    stage: Any = "distill",
    scale_lr: float = 0.0,
    anchors: Any = None,
    average: float = 0.0,
    **changes: Any,
) -> AHNTrainer:
    """A trainer of a tiny model that says nothing."""
    trainer = AHNTrainer(
        with_memory("llama") if model is None else model,
        arguments(out, **changes),
        weights={"kl": 1.0, "attention": 2.0},
        stage=stage,
        scale_lr=scale_lr,
        anchors=anchors,
        average=average,
        draw=SpanDraw(totals=(16, 24, 32), sinks=(0, 4, 8), seed=5),
        train_dataset=pieces() if data is None else data,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def gradients_of_a_step(
    out: Path, batch: int, accumulation: int, **changes: Any
) -> tuple[AHNTrainer, dict[str, torch.Tensor]]:
    """The gradients of one step over all four sequences, however it is divided."""
    trainer = trainer_for(
        out,
        max_steps=1,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        train_sampling_strategy="sequential",
        **changes,
    )
    watch = Gradients(trainer.distiller.model)
    trainer.add_callback(watch)
    trainer.train()
    return trainer, watch.kept


def write_base(folder: Path) -> None:
    """A tiny base model with a tokenizer of single bytes."""
    tiny("qwen3", vocab_size=259, head_dim=8).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
