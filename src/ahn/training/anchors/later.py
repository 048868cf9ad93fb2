"""What the model itself looks back at: how much questions attend to each token beyond the window, in full attention.

Legend of shapes: T tokens, Q of them in questions, D hidden size, H query heads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import nn

from ahn.training.anchors.watching import Sight, watch

_LEAST = 1e-6  # of a token that nothing looks at


@dataclasses.dataclass(eq=False)
class Observation:
    """What one reading showed.

    Attributes:
        needed_T: Log of how much questions need each token, the mean over layers, `[T]`.
        hidden: What the wanted layers read, `[T, D]`, by layer.
    """

    needed_T: torch.Tensor
    hidden: dict[int, torch.Tensor]


def observe(model: nn.Module, ids: torch.Tensor, asked: int, window: int, layers: Sequence[int]) -> Observation:
    """Reads a text with full attention and looks at what the questions at its end need of it beyond the window.

    A token i is needed as much as the largest share that it has in the residual stream of a token of a question or its
    answer: `max over heads and j >= i + window of a_ji |W_O v_i| / |h_j|`; layers are averaged before the logarithm.
    What the text itself looks at does not count: it looks at its first tokens, whatever these say.

    Args:
        model: A model with a memory attached.
        ids: Token ids, `[T]`.
        asked: Place of the first token of the questions; what comes behind it are questions and answers.
        window: Tokens behind each query that do not count, for the window holds them.
        layers: Layers whose inputs are wanted.
    """
    hidden: dict[int, torch.Tensor] = {}
    needed: list[torch.Tensor] = []

    def look(sight: Sight) -> None:
        if sight.site.index in layers:
            hidden[sight.site.index] = sight.hidden_TD.cpu()
        needed.append(_needed(sight, asked, window))

    watch(model, ids, look)
    mean_T = torch.stack(needed).mean(0)
    return Observation(mean_T.clamp(min=_LEAST).log().cpu(), hidden)


def _needed(sight: Sight, asked: int, window: int) -> torch.Tensor:
    """What the questions look at in a layer, `[T]`."""
    moved_HT = sight.moved()
    tokens = torch.arange(moved_HT.size(1), device=moved_HT.device)
    near = tokens[asked:, None] - tokens < window
    most_T = torch.zeros_like(moved_HT[0])
    for head in range(moved_HT.size(0)):
        weights_QT = sight.scores(head, asked).softmax(-1).masked_fill(near, 0.0)
        share_T = (weights_QT / sight.length_T[asked:, None]).amax(0) * moved_HT[head]
        most_T = torch.maximum(most_T, share_T)
    return most_T
