"""The engine: transformers' own Trainer, taught to train memories, to save no more than those, and to go on exactly."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import TrainOutput, get_last_checkpoint, rotate_checkpoints

from ahn.attachment import attachment_of
from ahn.errors import CheckpointError, ConfigError
from ahn.training.averaging import WeightAverage
from ahn.training.batches import collate
from ahn.training.distiller import Distiller, Stage
from ahn.training.optimizer import HeadScaledAdamW, RelativeAdamW
from ahn.training.sampling import AnchorDraw, Span, SpanDraw, subsampled
from ahn.training.saving import load_adapter, save_adapter, staged

_STATE = "trainer_state.json"


class AHNTrainer(Trainer):
    """Trains the memories of a model by self-distillation.

    All that a Trainer does is as usual: logging, accumulation, mixed precision, schedules, DDP through torchrun, FSDP2
    and DeepSpeed through accelerate. What differs: losses are divided by the number of positions that count in the
    whole step, over accumulation and processes; checkpoints hold the adapter, never the base; a checkpoint is whole or
    not there, so that a run killed at any moment goes on from the last one as if it had never stopped.

    Args:
        model: A model with a memory attached, or a `Distiller`.
        args: As for `Trainer`.
        weights: Losses and their weights, as for `distillation_loss`.
        stage: "distill" or "transfer".
        draw: How sinks and window of each sequence are drawn.
        evaluation_span: Window and sinks of evaluations; those of the memory's config if left out.
        loss_share: Share of the labelled tokens of each training sequence that the losses on distributions look at,
            drawn anew in every step.
        slice_tokens: As for `distillation_loss`, if the model is no `Distiller`.
        scale_lr: Learning rate of the length of each head's read-out, by `HeadScaledAdamW`; 0 for what `args` name.
        relative: Whether the learning rate of `args` is a share of each parameter's size, see `RelativeAdamW`.
        anchors: How the number of anchors of each sequence is drawn. Those of the current settings if left out, and in
            evaluations.
        average: Part of the steps over which weights are averaged beside the training, see `WeightAverage`; 0 for none.
        **others: As for `Trainer`; datasets give `input_ids` and, optionally, `labels` and `attention_mask`.

    Raises:
        ConfigError: A setting does not fit the model, or one process would drive several GPUs.
        ModelError: The model cannot be distilled.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        weights: Mapping[str, float] | None = None,
        stage: Stage = "distill",
        draw: SpanDraw | None = None,
        evaluation_span: Span | None = None,
        loss_share: float = 1.0,
        slice_tokens: int | None = None,
        scale_lr: float = 0.0,
        relative: bool = False,
        anchors: AnchorDraw | None = None,
        average: float = 0.0,
        **others: Any,
    ) -> None:
        distiller = model if isinstance(model, Distiller) else Distiller(model, weights, stage, slice_tokens)
        _check_process(args)
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False  # every memory takes part in every step
        self.distiller = distiller
        self.draw = (draw or SpanDraw(seed=args.seed)).fitting(distiller.model)
        config = attachment_of(distiller.model).config
        self.evaluation_span = evaluation_span or Span(config.window, config.sinks)
        self.loss_share = loss_share
        self.anchors = anchors
        self.average = WeightAverage(distiller.model, average) if average else None
        self._staging: Path | None = None
        self._sums = torch.zeros(len(distiller.weights), dtype=torch.float64)
        self._counts = torch.zeros(len(distiller.weights), dtype=torch.float64)
        others.setdefault("data_collator", collate)
        super().__init__(model=distiller, args=args, **_own_optimizer(args, scale_lr, relative), **others)
        if self.average is not None:
            self.add_callback(_Averaging(self.average))
        self.model_accepts_loss_kwargs = True  # transformers before 5.23: losses are divided by us

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As `Trainer.train`; a checkpoint that has all the steps already is loaded and nothing more is done."""
        if resume_from_checkpoint is True:
            latest = get_last_checkpoint(self.args.output_dir)
            if latest is None:
                raise CheckpointError(f"{self.args.output_dir}: there is no checkpoint to resume from. Start anew.")
            resume_from_checkpoint = latest
        if resume_from_checkpoint:
            state = TrainerState.load_from_json(str(Path(str(resume_from_checkpoint)) / _STATE))
            if state.global_step >= self.args.max_steps > 0:
                self.state = state
                self._load_from_checkpoint(str(resume_from_checkpoint))
                return TrainOutput(state.global_step, 0.0, {})
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor]:
        """The batches of one step with a span for each row, and the positions that each loss counts in all of them.

        A sequence is drawn by its number within the step, however the step is divided over batches and processes.
        """
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        processes, process = self.accelerator.num_processes, self.accelerator.process_index
        totals = dict.fromkeys(self.distiller.weights, 0)
        for batch_number, batch in enumerate(samples):
            lengths = _lengths(batch)
            first = (batch_number * processes + process) * self.args.per_device_train_batch_size
            spans = [self.draw.draw(each, self.state.global_step, first + row) for row, each in enumerate(lengths)]
            batch["spans"] = [tuple(span) for span in spans]
            if self.anchors is not None:
                step = self.state.global_step
                batch["anchors"] = [self.anchors.draw(span, step, first + row) for row, span in enumerate(spans)]
            batch["labels"] = subsampled(
                batch["labels"], self.loss_share, self.draw.seed, self.state.global_step, first
            )
            for name, count in self.distiller.count(batch, spans).items():
                totals[name] += count
        counts = torch.tensor(list(totals.values()), device=device)
        if processes > 1:
            counts = self.accelerator.reduce(counts, "sum")
        self._counts += counts.cpu()
        return samples, counts

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The weighted loss of a batch as its share of the step's mean, or its own mean outside of training."""
        training = isinstance(num_items_in_batch, torch.Tensor)
        sums = model(**inputs)
        if training:
            counts = dict(zip(self.distiller.weights, num_items_in_batch.unbind()))  # type: ignore[union-attr]
            self._sums += torch.stack([sums[name].detach() for name in self.distiller.weights]).cpu()
        else:
            counts = self.distiller.count(inputs, inputs["spans"])
        loss = sum(weight * sums[name] / max(1, counts[name]) for name, weight in self.distiller.weights.items())
        if training:
            loss = loss * self.accelerator.num_processes  # engines average gradients over processes
        return (loss, sums) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Loss of a held-out batch at the span of evaluations."""
        inputs = self._prepare_inputs(inputs)
        inputs["spans"] = [tuple(self.evaluation_span)] * inputs["input_ids"].size(0)
        with torch.no_grad():
            return self.compute_loss(model, inputs).detach(), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer.log`, with each loss by itself where there are several."""
        if "loss" in logs:
            sums = self._sums.to(self.args.device, torch.float32)
            if self.accelerator.num_processes > 1:
                sums = self.accelerator.reduce(sums, "sum")
            means = sums.cpu() / self._counts.clamp(min=1)
            if len(means) > 1:
                logs |= {f"loss_{name}": float(mean) for name, mean in zip(self.distiller.weights, means)}
            self._sums.zero_()
            self._counts.zero_()
        super().log(logs, start_time)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Weights of linear maps decay; norms, biases and decay rates do not."""
        return [name for name, parameter in model.named_parameters() if parameter.dim() > 1]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the adapter: on every process if the model is sharded, never the base model."""
        folder = output_dir or str(self.args.output_dir)
        save_adapter(self.distiller.model, folder, write=self.args.should_save)
        if self.average is not None and self._staging is not None:
            self.average.save(folder, write=self.args.should_save)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes a checkpoint beside its place and moves it there whole."""
        folder, name = Path(self._get_output_dir(trial)), f"checkpoint-{self.state.global_step}"
        with staged(folder, name, self.args.should_save) as staging:
            self.accelerator.wait_for_everyone()
            self._staging = staging
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            self._settle_best(staging, folder, name)
            self.accelerator.wait_for_everyone()
        if self.args.should_save:
            rotate_checkpoints(str(folder), self.args.save_total_limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    def _settle_best(self, staging: Path, folder: Path, name: str) -> None:
        """Names the best checkpoint by its final place."""
        if self.state.best_model_checkpoint == str(staging / name):
            self.state.best_model_checkpoint = str(folder / name)
            if self.args.should_save:
                self.state.save_to_json(str(staging / name / _STATE))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As `Trainer` does, but under FSDP without gathering the whole base model."""
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        from accelerate.utils import save_fsdp_optimizer

        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save and self.lr_scheduler is not None:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, "scheduler.pt"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_adapter(self.distiller.model, resume_from_checkpoint)
        if self.average is not None:
            self.average.load(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.state.best_model_checkpoint is not None:
            load_adapter(self.distiller.model, self.state.best_model_checkpoint)


class _Averaging(TrainerCallback):
    """Tells the average that a step was taken."""

    def __init__(self, average: WeightAverage) -> None:
        self.average = average

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.average.update(state.global_step)


def _check_process(args: TrainingArguments) -> None:
    """Checks that this process drives one device."""
    if args.n_gpu > 1:
        raise ConfigError(
            f"one process sees {args.n_gpu} GPUs; start one process for each with "
            f"`torchrun --nproc-per-node {args.n_gpu}`, or show it one only with CUDA_VISIBLE_DEVICES=0"
        )


def _own_optimizer(args: TrainingArguments, scale_lr: float, relative: bool) -> dict[str, Any]:
    """Our own AdamW as an argument of a `Trainer`; nothing where its usual one serves."""
    values = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    if scale_lr:
        values["scale_ratio"] = scale_lr / args.learning_rate
    kind = HeadScaledAdamW if scale_lr else RelativeAdamW
    return {"optimizer_cls_and_kwargs": (kind, values)} if scale_lr or relative else {}


def _lengths(batch: Mapping[str, torch.Tensor]) -> list[int]:
    """Real tokens of each row."""
    if (mask := batch.get("attention_mask")) is not None:
        return [int(length) for length in mask.sum(1)]
    return [batch["input_ids"].size(1)] * batch["input_ids"].size(0)
