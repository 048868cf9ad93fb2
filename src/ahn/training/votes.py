"""Votes on anchors while the teacher reads, and how many anchors each sequence is trained with.

Legend of shapes: B rows, T tokens.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ahn.attachment import attachment_of
from ahn.config import check_anchors
from ahn.errors import ConfigError
from ahn.scores import find_score
from ahn.training.draws import Span

SCORE = "learned"
"""The score of a training with anchors: it looks at what a layer reads, which the teacher's pass has too."""


@contextmanager
def noting_votes(model: nn.Module, votes: list[torch.Tensor]) -> Iterator[None]:
    """Notes how the layers vote on the tokens that are read inside a `with` block, in any mode.

    Args:
        model: A model with a memory attached and weights for votes by the score "learned".
        votes: Is given the votes of each layer that has weights, `[B, T]` float32, in the order of the layers.

    Raises:
        ConfigError: No layer has weights for the score.
    """
    voters = [(site.module, site.votes_by(SCORE)) for site in attachment_of(model).sites]
    handles = [
        module.register_forward_pre_hook(_noting(gate, votes), with_kwargs=True)
        for module, gate in voters
        if gate is not None
    ]
    if not handles:
        raise ConfigError("a training with anchors needs weights for votes on them; load some with ahn.load_anchors")
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _noting(gate: nn.Module, votes: list[torch.Tensor]) -> Callable[..., None]:
    @torch.no_grad()
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        with torch.autocast(hidden.device.type, enabled=False):
            votes.append(gate(hidden))

    return hook


@dataclasses.dataclass(frozen=True)
class AnchorDraw:
    """The rule by which the number of anchors of each training sequence is drawn.

    Attributes:
        counts: Candidates; a number that stands twice is drawn twice as often.
        seed: What the draws depend on.

    Raises:
        ConfigError: A candidate is out of range, or there is none.
    """

    counts: tuple[int, ...] = (0,)
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.counts:
            raise ConfigError("there must be at least one number of anchors to draw; 0 is without any")
        for count in self.counts:
            check_anchors(count, SCORE)

    def draw(self, span: Span, *place: int) -> int:
        """The number of anchors of a sequence; 0 where its window is too short for votes.

        Args:
            span: Its window and sinks.
            *place: Where it stands in the training, as for `SpanDraw.draw`.
        """
        count = random.Random("/".join(map(str, ("anchors", self.seed, *place)))).choice(self.counts)
        return count if span.window > find_score(SCORE).span(span.window) else 0
