"""The first stage: each layer's memory learns by itself what its window misses, from one pass of the teacher.

Nothing is propagated back through the base model. Each layer's loss and gradients are taken while the pass is in that
layer. So neither time nor memory is much above those of reading the text once.

A position counts by one over the tokens up to it, so that each doubling of a text counts alike. Otherwise the end of a
long text would decide alone.

Legend of shapes: B rows, T tokens, E evicted tokens, H query heads, V value size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

import ahn
from ahn.attachment import attachment_of
from ahn.attention.recording import RecordedLayer, record_layers
from ahn.backbone.survey import find_backbone
from ahn.distillation import find_targets
from ahn.memories import Memory
from ahn.tokens import Attended
from ahn.training.losses import LossOutput
from ahn.training.sampling import SpanDraw

L = TypeVar("L", bound="Lesson")


@dataclasses.dataclass(eq=False)
class Lesson:
    """What one pass of the teacher is for, layer by layer.

    Attributes:
        weights: How much each position counts, `[B, T]` float32; 0 where it does not.
    """

    weights: torch.Tensor

    def missing(self, layer: RecordedLayer) -> Missing:
        """What sinks and window of a layer miss, at the positions that the memory speaks at."""
        before = self.weights.size(1) - layer.evicted_tokens
        with torch.no_grad():
            local = layer.read_window().of_last(layer.evicted_tokens)
            output_BEHV = (layer.output[:, before:] - local.output).float()
        return Missing(before, local, output_BEHV, self.weights[:, before:, None, None])

    def learn(self, layer: RecordedLayer) -> None:
        """What a layer does with it."""
        raise NotImplementedError


class Missing(NamedTuple):
    """What sinks and window of a layer miss of full attention.

    Attributes:
        before: Positions before the first at which the memory speaks.
        local: What sinks and window give from there on.
        output_BEHV: Output of full attention minus that of sinks and window, `[B, E, H, V]` float32.
        weight_BE11: How much a position counts.
    """

    before: int
    local: Attended
    output_BEHV: torch.Tensor
    weight_BE11: torch.Tensor

    def square(self, x_BEHV: torch.Tensor) -> torch.Tensor:
        """Weighted sum of squares over all positions."""
        return (x_BEHV.square() * self.weight_BE11).sum()


@dataclasses.dataclass(eq=False)
class _Regression(Lesson):
    """The loss and its gradients.

    Attributes:
        losses: For each layer the unexplained share of what its window misses.
        gradients: Gradients of the memories' parameters, by parameter.
    """

    losses: list[torch.Tensor] = dataclasses.field(default_factory=list)
    gradients: dict[nn.Parameter, torch.Tensor] = dataclasses.field(default_factory=dict)

    def learn(self, layer: RecordedLayer) -> None:
        """Loss and gradients of one layer; nothing where its memory does not learn."""
        parameters = [each for each in layer.memory.parameters() if each.requires_grad]
        if not parameters:
            return
        with torch.enable_grad():
            missing = self.missing(layer)
            if not layer.evicted_tokens:
                return
            read_BEHV = layer.memory.project_out(
                layer.recall(), layer.hidden[:, missing.before :], missing.local
            ).float()
            wrong = missing.square(read_BEHV - missing.output_BEHV)
            share = wrong / missing.square(missing.output_BEHV).clamp(min=1e-12)
            slopes = torch.autograd.grad(share, parameters, allow_unused=True) if torch.is_tensor(share) else ()
        self.losses.append(share.detach())
        self.gradients.update((p, g) for p, g in zip(parameters, slopes) if g is not None)


@dataclasses.dataclass(eq=False)
class Adding(Lesson):
    """Adds up something of every layer.

    Attributes:
        only: The memories whose layers are meant.
        totals: By memory, one tensor for each thing that is added up.
    """

    only: Container[Memory]
    totals: dict[Memory, tuple[torch.Tensor, ...]] = dataclasses.field(default_factory=dict)

    def learn(self, layer: RecordedLayer) -> None:
        """What one layer adds; nothing where no token leaves its window."""
        if layer.evicted_tokens and layer.memory in self.only:
            self.totals[layer.memory] = self.count(layer)

    def count(self, layer: RecordedLayer) -> tuple[torch.Tensor, ...]:
        """What a layer adds."""
        raise NotImplementedError


def add_up(
    model: nn.Module,
    batches: Iterable[Mapping[str, torch.Tensor]],
    draw: SpanDraw,
    lesson: type[Adding],
    only: Container[Memory],
) -> dict[Memory, tuple[torch.Tensor, ...]]:
    """What the layers add up over several texts, by memory.

    Args:
        model: A model with a memory attached.
        batches: Texts, as for `find_targets`.
        draw: Window and sinks of each.
        lesson: What is added up.
        only: The memories whose layers are meant.
    """
    totals: dict[Memory, tuple[torch.Tensor, ...]] = {}
    draw = draw.fitting(model)
    for number, batch in enumerate(batches):
        span = draw.draw(batch["input_ids"].size(1), number)
        taken, _ = teach(model, batch, span.window, span.sinks, partial(lesson, only=only))
        for memory, new in taken.totals.items():
            totals[memory] = tuple(map(torch.add, totals[memory], new)) if memory in totals else new
    return totals


def transfer_loss(model: nn.Module, batch: Mapping[str, torch.Tensor], window: int, sinks: int) -> LossOutput:
    """How much of what the window misses the memories leave unexplained, with gradients already taken.

    The target of a layer is the output of full attention minus that of sinks and window, from the teacher's own hidden
    states, queries, keys and values. The loss is the squared error over the target's squared length, both weighted by
    position, averaged over layers: 1 for a silent memory, 0 for one that replaces full attention.

    Args:
        model: A model with a memory attached.
        batch: As for `find_targets`; labels are not looked at.
        window: Tokens of the window, the current one included.
        sinks: Number of sinks.

    Returns:
        One loss, "transfer". Its gradient reaches the memories' parameters only.

    Raises:
        ConfigError: Window and sinks are out of range.
    """
    lesson, count = teach(model, batch, window, sinks, _Regression)
    share = torch.stack(lesson.losses).mean() if lesson.losses else torch.zeros((), device=batch["input_ids"].device)
    gradients = {p: g / len(lesson.losses) for p, g in lesson.gradients.items()}
    ready: torch.Tensor = _Ready.apply(share * count, [g * count for g in gradients.values()], *gradients)
    return LossOutput({"transfer": ready}, {"transfer": count})


def teach(
    model: nn.Module, batch: Mapping[str, torch.Tensor], window: int, sinks: int, lesson: Callable[[torch.Tensor], L]
) -> tuple[L, int]:
    """Lets the teacher read a batch and every layer with a memory learn from it.

    Args:
        model: A model with a memory attached.
        batch: As for `find_targets`; labels are not looked at.
        window: Tokens of the student's window.
        sinks: The student's sinks.
        lesson: Makes what the layers do from the weights of positions.

    Returns:
        The lesson, and the number of positions that count.
    """
    attachment, backbone = attachment_of(model), find_backbone(model)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask") if batch.get(name) is not None}
    targets = find_targets(batch, window, sinks).attention
    tokens_BT = inputs.get("attention_mask", torch.ones_like(batch["input_ids"])).cumsum(1)
    weights = torch.zeros(tokens_BT.numel(), device=targets.device)
    weights[targets] = 1 / tokens_BT.flatten()[targets].float()
    with ahn.mode(model, "ahn", window=window, sinks=sinks):
        student = attachment.settings
    taken = lesson(weights.view_as(tokens_BT))
    with torch.no_grad(), ahn.mode(model, "full"), record_layers(model, taken.learn, student):
        backbone(**inputs, use_cache=False)
    return taken, targets.numel()


class _Ready(torch.autograd.Function):
    """A loss whose gradients are known already; its backward hands them out."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, gradients: list[torch.Tensor], *parameters: nn.Parameter) -> torch.Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, None, *(outputs[0] * gradient for gradient in ctx.gradients)
