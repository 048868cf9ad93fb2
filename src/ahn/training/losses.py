"""The objective: how far the student (window + memory) is from the teacher (full attention), token by token.

Both are the same model in two modes. Legend of shapes: B rows, T tokens, N positions that count, D hidden size,
V vocabulary, H query heads, W value size. No tensor of [T, V] exists, of neither model, forward or backward.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import ahn
from ahn.backbone.survey import recomputes_layers
from ahn.distillation import CePairs, Head, find_targets, vocabulary_losses
from ahn.errors import ConfigError
from ahn.ops import at_least_float32
from ahn.training.recording import recording
from ahn.training.sampling import ANCHOR_SCORE
from ahn.training.teacher import TeacherCache

LOSSES = ("kl", "ce", "attention")
"""kl: divergence of the student's next-token distribution from the teacher's, nats per token. ce: the student's
negative log-likelihood of the text, nats per token. attention: mean squared difference of the attention outputs."""


@dataclasses.dataclass(frozen=True)
class LossOutput:
    """Losses of a batch, not yet divided by anything, so that they can be added up over batches and processes.

    Attributes:
        sums: Sum of each loss over its positions, float32 scalars, with gradients.
        tokens: Number of positions of each loss.
    """

    sums: dict[str, torch.Tensor]
    tokens: dict[str, int]

    def mean(self, weights: Mapping[str, float]) -> torch.Tensor:
        """The weighted sum of the mean losses, a scalar."""
        return self.over(weights, self.tokens)

    def over(self, weights: Mapping[str, float], tokens: Mapping[str, float]) -> torch.Tensor:
        """The weighted sum of the losses, each divided by a number of positions of one's own choice."""
        parts = [weights[name] / max(1, tokens[name]) * loss for name, loss in self.sums.items()]
        return torch.stack(parts).sum()


def check_weights(weights: Mapping[str, float]) -> dict[str, float]:
    """Names and weights of the losses that take part.

    Raises:
        ConfigError: A name is unknown, a weight is negative or not finite, or none is positive.
    """
    for name, weight in weights.items():
        if name not in LOSSES:
            raise ConfigError(f"unknown loss {name!r}; known are {', '.join(LOSSES)}")
        if not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
            raise ConfigError(f"the weight of the loss {name} must be a number of at least 0, not {weight!r}")
    positive = {name: float(weight) for name, weight in weights.items() if weight > 0}
    if not positive:
        raise ConfigError("no loss has a positive weight; the usual one is kl=1")
    return positive


def distillation_loss(
    model: nn.Module,
    batch: Mapping[str, torch.Tensor],
    weights: Mapping[str, float],
    window: int,
    sinks: int,
    *,
    slice_tokens: int | None = None,
    normalised_attention: bool = True,
    ce_pairs: CePairs = "next",
    recompute_attention: bool = True,
    teacher: TeacherCache | None = None,
    anchors: int | None = None,
) -> LossOutput:
    """Losses of the student against the teacher at the positions beyond sinks and window.

    Args:
        model: A model with a memory attached; only its memories should require gradients.
        batch: As for `find_targets`.
        weights: The losses wanted, a subset of `LOSSES`, with their weights; only the names matter here.
        window: Tokens of the student's window, the current one included.
        sinks: The student's sinks.
        slice_tokens: Positions whose logits exist at the same time; as many as make 16 MiB if left out.
        normalised_attention: Whether the attention loss compares directions (each output divided by its length).
        ce_pairs: As for `find_targets`.
        recompute_attention: Whether to compute window and memory again in the backward pass instead of keeping what
            they need, unless whole layers are computed again anyway.
        teacher: Where the teacher's hidden states are kept from one reading of a text to the next; not for the loss
            "attention", which needs more of the teacher.
        anchors: Anchors that the student reads beside sinks and window, chosen by the score "learned"; those of the
            current settings if left out. A text is then read in chunks, and gradients flow through all of them.

    Returns:
        Sums over the positions, and their number.

    Raises:
        ConfigError: A loss is unknown, a number is out of range, or the model has no weights to choose anchors by.

    Source: arXiv 2510.07318, section 3.3.
    """
    wanted = check_weights(weights)
    targets = find_targets(batch, window, sinks, ce_pairs)
    backbone = Head(model).backbone
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask") if batch.get(name) is not None}
    seen_teacher: dict[int, torch.Tensor] | None = {} if "attention" in wanted else None
    seen_student: dict[int, torch.Tensor] | None = {} if "attention" in wanted else None
    hidden_teacher = None
    if wanted.keys() & {"kl", "attention"}:
        hidden_teacher = _teacher_states(model, backbone, inputs, seen_teacher, teacher).flatten(0, 1)
    score = ANCHOR_SCORE if anchors else None
    student = ahn.mode(model, "ahn", window=window, sinks=sinks, anchors=anchors, anchor_score=score)
    recompute = recompute_attention and not recomputes_layers(backbone)
    with student, recording(backbone, seen_student, recompute):
        hidden_student = backbone(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)
    sums: dict[str, torch.Tensor] = {}
    if wanted.keys() & {"kl", "ce"}:
        sums |= vocabulary_losses(model, hidden_student, hidden_teacher, targets, tuple(wanted), slice_tokens)
    if seen_teacher is not None and seen_student is not None:
        sums["attention"] = attention_loss(seen_teacher, seen_student, targets.attention, normalised_attention)
    return LossOutput(sums, targets.counts(sums))


@torch.no_grad()
def _teacher_states(
    model: nn.Module,
    backbone: Any,
    inputs: Mapping[str, torch.Tensor],
    outputs: dict[int, torch.Tensor] | None,
    cache: TeacherCache | None,
) -> torch.Tensor:
    """The teacher's last hidden states, `[B, T, D]`: read anew, or kept from before."""

    def read() -> torch.Tensor:
        with ahn.mode(model, "full"), recording(backbone, outputs):
            states: torch.Tensor = backbone(**inputs, use_cache=False).last_hidden_state
        return states

    if cache is None or outputs is not None:
        return read()
    return cache.states(inputs["input_ids"], inputs.get("attention_mask"), read)


def attention_loss(
    teacher: Mapping[int, torch.Tensor],
    student: Mapping[int, torch.Tensor],
    positions: torch.Tensor,
    normalised: bool = True,
) -> torch.Tensor:
    """Sum over positions of the squared difference of attention outputs, averaged over layers and elements.

    Args:
        teacher: The teacher's output of each layer before its output projection, `[B, T, H, W]`.
        student: The student's.
        positions: The positions that count.
        normalised: Whether each output is divided by its length first.
    """
    losses = []
    for index, output in student.items():
        ours, theirs = (at_least_float32(each.flatten(2).flatten(0, 1)[positions]) for each in (output, teacher[index]))
        if normalised:
            ours, theirs = F.normalize(ours, dim=-1), F.normalize(theirs, dim=-1)
        losses.append((ours - theirs).square().mean(-1).sum())
    return torch.stack(losses).mean()
