"""Teacher and student as one module, the way engines want it: a batch goes in, sums of losses come out.

Everything happens inside one `forward`, so that the wrappers of DDP, FSDP2 and DeepSpeed see each step begin and end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ahn.attachment import attachment_of
from ahn.backbone.frozen import FrozenParts
from ahn.backbone.linear import CastWeights
from ahn.distillation import Head, find_targets
from ahn.errors import ConfigError
from ahn.memories import Memory, memory_class
from ahn.training.losses import LossOutput, check_weights, distillation_loss
from ahn.training.sampling import Span
from ahn.training.teacher import TeacherCache
from ahn.training.transfer import transfer_loss

Stage = Literal["transfer", "distill"]


class Distiller(nn.Module):
    """A model that teaches its own memories. Its base weights are frozen, and there is one copy of them.

    The base stays in evaluation mode, so that teacher and student differ by the memory alone. Memories of a base in
    half precision are trained in float32 under autocast.

    Args:
        model: A model with a memory attached.
        weights: Losses and their weights, as for `distillation_loss`; not looked at by "transfer".
        stage: "distill" trains end to end, "transfer" each layer on its own.
        slice_tokens: As for `distillation_loss`.
        recompute_attention: As for `distillation_loss`.
        teacher: As for `distillation_loss`.
        precision: What the base multiplies in while it trains; its own dtype if left out.
        trained: Names of the memories that learn; all if left out.

    Raises:
        ModelError: No memory is attached, or the model's head cannot be run in slices.
        ConfigError: A loss or the stage is unknown.
    """

    main_input_name = "input_ids"

    def __init__(
        self,
        model: nn.Module,
        weights: Mapping[str, float] | None = None,
        stage: Stage = "distill",
        slice_tokens: int | None = None,
        recompute_attention: bool = True,
        teacher: TeacherCache | None = None,
        precision: torch.dtype | None = None,
        trained: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        if stage not in ("transfer", "distill"):
            raise ConfigError(f"stage must be transfer or distill, not {stage!r}")
        self.stage = stage
        self.weights = {"transfer": 1.0} if stage == "transfer" else check_weights(weights or {"kl": 1.0})
        self.slice_tokens = slice_tokens
        self.recompute_attention = recompute_attention
        self.teacher = teacher
        self.model = model
        self._no_split_modules = getattr(model, "_no_split_modules", None)  # where FSDP cuts
        model.requires_grad_(False)
        self._half = _half_precision(model)
        self._autocast = self._half or (precision if precision != torch.float32 else None)
        self._casts = CastWeights()
        self._frozen = FrozenParts(model, self._casts)
        kinds = None if trained is None else {memory_class(name) for name in trained}
        for memory in self.memories():
            if self._half:
                memory.float()
            memory.requires_grad_(kinds is None or type(memory) in kinds)
        if stage == "distill":
            Head(model).check()
        self.train()

    def memories(self) -> list[Memory]:
        """The memories, in the order of their layers."""
        return attachment_of(self.model).memories

    def forward(
        self,
        input_ids: torch.Tensor,
        spans: Sequence[Span],
        labels: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        anchors: Sequence[int] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Sums of the losses over their positions, by name.

        Args:
            input_ids: `[B, T]`.
            spans: Window and sinks of each row. Rows with the same span are read together.
            labels: `[B, T]`, -100 where a token does not count.
            attention_mask: `[B, T]`, 0 at padding.
            anchors: Anchors of each row in the stage "distill"; those of the model's settings if left out.
        """
        tensors = {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}
        batch = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        sums: dict[str, torch.Tensor] = {}
        for (span, count, *_), rows in self._groups(spans, anchors).items():
            part = {name: tensor[rows] for name, tensor in batch.items()}
            with self._precision(input_ids.device.type):
                output = self._loss(part, span, count)
            for name, loss in output.sums.items():
                sums[name] = sums[name] + loss if name in sums else loss
        return sums

    def count(self, batch: Mapping[str, torch.Tensor], spans: Sequence[Span]) -> dict[str, int]:
        """Number of positions that each loss will count in a batch."""
        totals = dict.fromkeys(self.weights, 0)
        tensors = {name: batch[name] for name in ("input_ids", "labels", "attention_mask") if name in batch}
        for row, span in enumerate(spans):
            targets = find_targets({name: tensor[row : row + 1] for name, tensor in tensors.items()}, *span)
            names = {"transfer": "attention"}
            for name in totals:
                totals[name] += getattr(targets, names.get(name, name)).numel()
        return totals

    def train(self, mode: bool = True) -> Distiller:
        """Sets the mode of the memories; the base stays in evaluation mode, without dropout.

        Layers whose activations are checkpointed are told that they train, because they look at nothing else.
        """
        super().train(False)
        self.training = mode
        for memory in self.memories():
            memory.train(mode)
        for module in self.model.modules():
            if getattr(module, "gradient_checkpointing", False) is True:
                module.training = mode
        return self

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Recomputes the layers' activations in the backward pass instead of keeping them."""
        model: Any = self.model
        if hasattr(model, "activation_checkpointing_enable"):
            model.activation_checkpointing_enable(*args, **kwargs)
        else:  # transformers before 5.23
            options = kwargs.pop("activation_checkpointing_kwargs", None)
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        self.train(self.training)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None, **kwargs: Any) -> None:
        """The same under its older name."""
        self.activation_checkpointing_enable(activation_checkpointing_kwargs=gradient_checkpointing_kwargs, **kwargs)

    def finish(self) -> None:
        """Gives the memories the dtype of the base, so that the model can be used outside of a training."""
        if self._half:
            for memory in self.memories():
                memory.to(self._half)

    def _loss(self, batch: Mapping[str, torch.Tensor], span: Span, anchors: int | None) -> LossOutput:
        if self.stage == "distill":
            if anchors and self.is_sharded():  # processes would make different numbers of passes
                raise ConfigError("anchors are not trained with in a sharded model (FSDP2); use DDP or one process")
            if self.teacher is not None and self.is_sharded():  # processes that find a text would not wait for others
                raise ConfigError("teacher_cache does not serve a sharded model (FSDP2); leave it out")
            return distillation_loss(
                self.model,
                batch,
                self.weights,
                *span,
                slice_tokens=self.slice_tokens,
                recompute_attention=self.recompute_attention,
                teacher=self.teacher,
                anchors=anchors,
            )
        if self.is_sharded():
            raise ConfigError("the stage transfer does not run sharded (FSDP2); run it with DDP or in one process")
        return transfer_loss(self.model, batch, *span)

    def _groups(self, spans: Sequence[Span], anchors: Sequence[int] | None) -> dict[tuple[Any, ...], list[int]]:
        """Rows that are read together. A sharded model reads row by row: all processes must make as many passes."""
        sharded = self.is_sharded()
        groups: dict[tuple[Any, ...], list[int]] = {}
        for row, span in enumerate(spans):
            alike = Span(*span), None if anchors is None else anchors[row]
            groups.setdefault((*alike, row) if sharded else alike, []).append(row)
        return groups

    def is_sharded(self) -> bool:
        """Whether the weights are spread over processes (FSDP2)."""
        return any(isinstance(parameter, DTensor) for memory in self.memories() for parameter in memory.parameters())

    def _precision(self, device: str) -> ExitStack:
        """Autocast where the base multiplies in half precision."""
        stack = ExitStack()
        if self._autocast:
            stack.enter_context(torch.autocast(device, dtype=self._autocast))
        if not self._half and not self.is_sharded():
            stack.enter_context(self._casts.in_use())
            stack.enter_context(self._frozen.in_use())
        return stack


def _half_precision(model: Any) -> torch.dtype | None:
    """The dtype of a base in half precision, or `None`."""
    dtype: torch.dtype = model.get_input_embeddings().weight.dtype
    return dtype if dtype in (torch.bfloat16, torch.float16) else None
