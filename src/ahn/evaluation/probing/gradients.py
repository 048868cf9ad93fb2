"""Which evicted tokens the student still lacks: the gradient of the distillation loss on their embeddings.

Legend of shapes: T tokens, D hidden size.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from torch import nn

import ahn
from ahn.attachment import attachment_of
from ahn.distillation import IGNORED, Head, Targets, find_targets, vocabulary_losses
from ahn.errors import ModelError, ShapeError
from ahn.evaluation.errors import EvaluationError

Positions = Literal["all", "last"]
"""Where the loss counts: at all positions beyond sinks and window, or at those of the last window alone."""


@dataclasses.dataclass(frozen=True, eq=False)
class TokenGradients:
    """How much the distillation loss of one text depends on each of its tokens.

    Attributes:
        norms: Length of the gradient of `loss` with respect to each token's embedding, `[T]` float32 on the CPU. Its
            unit is nats per token and unit of the embedding; a float64 model gives float64. Sinks and window are
            included.
        loss: Mean divergence KL(teacher || student) over the positions that count, nats per token.
        positions: Number of these positions.
        window: Tokens of the student's window.
        sinks: The student's sinks.
    """

    norms: torch.Tensor
    loss: float
    positions: int
    window: int
    sinks: int

    @property
    def evicted(self) -> range:
        """The tokens that have left the window when the text ends."""
        return range(self.sinks, self.norms.numel() - self.window)


def token_gradients(
    model: nn.Module,
    input_ids: torch.Tensor,
    *,
    window: int | None = None,
    sinks: int | None = None,
    positions: Positions = "all",
) -> TokenGradients:
    """Gradient of the distillation loss with respect to the embedding of every token of a text.

    The paper (figure 5) colours each evicted token by the gradient of the self-distillation loss with respect to its
    embedding. A small gradient means that the memory has kept what the loss needs of this token, and a large one that
    it has not. Here the loss is the one that memories are trained with: the mean of KL(teacher || student) over
    positions beyond sinks and window. The teacher's distributions are constant, so that the gradient is taken through
    the student alone. A token's value is the Euclidean length of its gradient.

    The gradient takes every way through the student, not only that through the memory. A token also acts on its own
    position, and on those that read it while it was in the window, if they count. With positions="last", which is not
    the paper's, only the last window counts. A token more than a window before it then acts through the memory alone,
    or through tokens that had read it.

    Args:
        model: A model with a memory attached, in evaluation mode.
        input_ids: Token ids of one text, `[T]` or `[1, T]`, more than sinks + window.
        window: Tokens of the student's window; as attached if left out.
        sinks: The student's sinks; as attached if left out.
        positions: Where the loss counts, beyond sinks and window: "all", or "last" for the last window's positions.

    Raises:
        ModelError: No memory is attached, the model's head cannot be run alone, or the gradient is not finite.
        ShapeError: There is more than one row, or no token.
        EvaluationError: Nothing is evicted, or the text is longer than the teacher can read.

    Source: arXiv 2510.07318, figure 5; the loss is that of its section 3.3.
    """
    settings = attachment_of(model).settings
    window = settings.window if window is None else window
    sinks = settings.sinks if sinks is None else sinks
    ids = check_text(model, input_ids, window, sinks)[None]
    head = Head(model)
    head.check()
    embeddings: torch.Tensor = _embed(model, ids).requires_grad_()
    with torch.no_grad(), ahn.mode(model, "full"):
        teacher = head.backbone(input_ids=ids, use_cache=False).last_hidden_state[0]
    targets = _targets(ids, window, sinks, positions)
    with torch.enable_grad(), ahn.mode(model, "ahn", window=window, sinks=sinks):
        student = head.backbone(inputs_embeds=embeddings, use_cache=False).last_hidden_state[0]
        loss = vocabulary_losses(model, student, teacher, targets, ("kl",))["kl"] / targets.kl.numel()
        (gradient,) = torch.autograd.grad(loss, embeddings)
    norms = torch.linalg.vector_norm(gradient[0], dim=-1, dtype=loss.dtype).cpu()
    if not bool(norms.isfinite().all()):
        dtype = str(gradient.dtype).removeprefix("torch.")
        raise ModelError(f"the gradient is not finite in {dtype}; load the model in float32, or check the adapter")
    return TokenGradients(norms, float(loss.detach()), targets.kl.numel(), window, sinks)


def check_text(model: nn.Module, input_ids: torch.Tensor, window: int, sinks: int) -> torch.Tensor:
    """Makes sure that teacher and student can read a text and that something of it is evicted.

    Args:
        model: A model with a memory attached.
        input_ids: `[T]` or `[1, T]`.
        window: Tokens of the window.
        sinks: Number of sinks.

    Returns:
        The tokens on the model's device, `[T]`.

    Raises:
        ShapeError: There is more than one row, or no token.
        EvaluationError: The text is too short or too long.
    """
    ids = input_ids[0] if input_ids.dim() == 2 and input_ids.size(0) == 1 else input_ids
    if ids.dim() != 1 or ids.numel() == 0:
        raise ShapeError(f"input_ids must be the tokens of one text, [T] or [1, T], not {list(input_ids.shape)}")
    length, exact, most = ids.numel(), sinks + window, attachment_of(model).trained_context
    if length <= exact:
        raise EvaluationError(
            f"the text has {length:,} tokens, and sinks + window keep {exact:,} exactly, so that nothing is evicted; "
            "give a longer text or a smaller window"
        )
    if length > most:
        raise EvaluationError(
            f"the text has {length:,} tokens, but the teacher reads it with full attention and was trained on texts "
            f"of up to {most:,}; give a shorter text"
        )
    weights: Any = _input_embeddings(model).weight
    return ids.to(weights.device)


def _targets(ids: torch.Tensor, window: int, sinks: int, positions: Positions) -> Targets:
    labels = ids.clone()
    if positions == "last":
        labels[:, :-window] = IGNORED
    return find_targets({"input_ids": ids, "labels": labels}, window, sinks)


@torch.no_grad()
def _embed(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """What the stack of layers is given of these tokens, `[1, T, D]`."""
    embedded: torch.Tensor = _input_embeddings(model)(ids)
    return embedded.clone()


def _input_embeddings(model: Any) -> Any:
    return model.get_input_embeddings()
