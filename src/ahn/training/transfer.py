"""The first stage: each layer's memory learns by itself what its window misses, from one pass of the teacher.

Nothing is propagated back through the base model, and each layer's loss and gradients are taken while the pass is in
that layer, so that neither time nor memory is much above those of reading the text once.

Legend of shapes: B rows, T tokens, E evicted tokens, H query heads, V value size.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

import ahn
from ahn.attachment import Attachment, attachment_of
from ahn.attention.call import Plan, find_padding, mask_function
from ahn.attention.function import LayerCall, attention_function
from ahn.attention.hooks import before_layer
from ahn.backbone import compat
from ahn.backbone.survey import find_backbone, implementation
from ahn.distillation import find_targets
from ahn.tokens import Tokens, View
from ahn.training.losses import LossOutput

TRANSFER = "ahn_transfer"
L = TypeVar("L", bound="Lesson")


@dataclasses.dataclass(eq=False)
class Lesson:
    """What one pass of the teacher is for, layer by layer.

    Attributes:
        plan: The student's call: its window, sinks and padding.
        counted: Positions that count, `[B, T]`.
    """

    plan: Plan
    counted: torch.Tensor

    def missing(self, call: LayerCall, module: nn.Module, inputs: dict[str, Any], full_BTHV: torch.Tensor) -> Missing:
        """What sinks and window of a layer miss, at the positions that the memory speaks at."""
        query, key, value = inputs["query"], inputs["key"], inputs["value"]
        with torch.no_grad():
            silent = dataclasses.replace(call, gates=None)
            local, _ = attention_function(module, **inputs, attention_mask=self.plan, ahn=silent)
        view = call.store.exact.view(Tokens(key, value, call.record(key)), self.plan.padding)
        before = query.size(2) - view.evicted.length
        counted_BE11 = self.counted[:, before:, None, None]
        return Missing(view, before, (full_BTHV - local)[:, before:].float() * counted_BE11, counted_BE11)

    def learn(self, call: LayerCall, module: nn.Module, inputs: dict[str, Any], full_BTHV: torch.Tensor) -> None:
        """What a layer does with it."""
        raise NotImplementedError


class Missing(NamedTuple):
    """What sinks and window of a layer miss of full attention.

    Attributes:
        view: Where the evicted tokens are.
        before: Positions before the first at which the memory speaks.
        output_BEHV: Output of full attention minus that of sinks and window, `[B, E, H, V]` float32, zero at positions
            that do not count.
        counted_BE11: Whether a position counts.
    """

    view: View
    before: int
    output_BEHV: torch.Tensor
    counted_BE11: torch.Tensor


@dataclasses.dataclass(eq=False)
class _Regression(Lesson):
    """The loss and its gradients.

    Attributes:
        losses: For each layer the unexplained share of what its window misses.
        gradients: Gradients of the memories' parameters, by parameter.
    """

    losses: list[torch.Tensor] = dataclasses.field(default_factory=list)
    gradients: dict[nn.Parameter, torch.Tensor] = dataclasses.field(default_factory=dict)

    def learn(self, call: LayerCall, module: nn.Module, inputs: dict[str, Any], full_BTHV: torch.Tensor) -> None:
        """Loss and gradients of one layer."""
        with torch.enable_grad():
            missing = self.missing(call, module, inputs, full_BTHV)
            if not missing.view.evicted.length:
                return
            query = inputs["query"]
            read_BEHV = call.read_memory(query, missing.view, query.size(2)).float()
            wrong = (read_BEHV * missing.counted_BE11 - missing.output_BEHV).square().sum()
            share = wrong / missing.output_BEHV.square().sum().clamp(min=1e-12)
            parameters = [each for each in call.memory.parameters() if each.requires_grad]
            found = torch.autograd.grad(share, parameters, allow_unused=True) if torch.is_tensor(share) else ()
        self.losses.append(share.detach())
        self.gradients.update((p, g) for p, g in zip(parameters, found) if g is not None)


def transfer_loss(model: nn.Module, batch: Mapping[str, torch.Tensor], window: int, sinks: int) -> LossOutput:
    """How much of what the window misses the memories leave unexplained, with gradients already taken.

    The target of a layer is the output of full attention minus that of sinks and window, from the teacher's own hidden
    states, queries, keys and values. The loss is the squared error over the target's squared length, averaged over
    layers: 1 for a silent memory, 0 for one that replaces full attention.

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
    model: nn.Module, batch: Mapping[str, torch.Tensor], window: int, sinks: int, lesson: type[L]
) -> tuple[L, int]:
    """Lets the teacher read a batch and every layer with a memory learn from it.

    Args:
        model: A model with a memory attached.
        batch: As for `find_targets`; labels are not looked at.
        window: Tokens of the student's window.
        sinks: The student's sinks.
        lesson: What the layers do.

    Returns:
        The lesson, and the number of positions that count.
    """
    attachment, backbone = attachment_of(model), find_backbone(model)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask") if batch.get(name) is not None}
    targets = find_targets(batch, window, sinks).attention
    counted = torch.zeros(batch["input_ids"].numel(), dtype=torch.bool, device=targets.device)
    counted[targets] = True
    with ahn.mode(model, "ahn", window=window, sinks=sinks):
        mask, new = inputs.get("attention_mask"), batch["input_ids"].size(1)
        padding = None if mask is None else find_padding(mask, new, None, 0, kept=False)
        plan = Plan(attachment, attachment.settings, padding)
    taken = lesson(plan, counted.view_as(batch["input_ids"]))
    with torch.no_grad(), ahn.mode(model, "full"), _taught(attachment, backbone, taken):
        backbone(**inputs, use_cache=False)
    return taken, targets.numel()


@contextlib.contextmanager
def _taught(attachment: Attachment, backbone: Any, lesson: Lesson) -> Iterator[None]:
    """Lets every layer with a memory learn as the teacher's pass reaches it."""
    handles = [
        site.module.register_forward_pre_hook(_bring(lesson), with_kwargs=True)
        for site in attachment.sites
        if site.memory is not None
    ]
    try:
        with implementation(backbone, TRANSFER):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _bring(lesson: Lesson) -> Callable[..., Any]:
    """A hook that sends the student's view of the layer along to the attention function."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        student = {**compat.with_cache(module, kwargs, None), "attention_mask": lesson.plan}
        with torch.enable_grad():
            call = before_layer(module, args, student)[1]["ahn"]
        return args, {**kwargs, TRANSFER: (lesson, call)}

    return hook


def _attend_and_learn(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    ahn_transfer: tuple[Lesson, LayerCall] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    full, weights = attention_function(module, query, key, value, attention_mask, **kwargs)
    if ahn_transfer is not None:
        lesson, call = ahn_transfer
        lesson.learn(call, module, {"query": query, "key": key, "value": value, **kwargs}, full)
    return full, weights


class _Ready(torch.autograd.Function):
    """A loss whose gradients are known already; its backward hands them out."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, gradients: list[torch.Tensor], *parameters: nn.Parameter) -> torch.Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, None, *(outputs[0] * gradient for gradient in ctx.gradients)


AttentionInterface.register(TRANSFER, _attend_and_learn)
AttentionMaskInterface.register(TRANSFER, mask_function)
