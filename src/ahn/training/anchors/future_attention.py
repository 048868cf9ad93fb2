"""The target of the score `learned`: how much questions attend to each token beyond the window, in full attention.

What a few questions attend to is a noisy target: they ask for some facts, and another text of the same form would ask
for others. Where queries of many example questions are known (`asked`), what these attend to counts as much.

Legend of shapes: T tokens, Q of them in questions, D hidden size, H query heads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ahn.anchors.queries import AnchorQueries
from ahn.anchors.selection import score_of_layers
from ahn.training.anchors.capture import LayerAttention, watch

_LEAST = 1e-6  # of a token that nothing looks at


@dataclasses.dataclass(eq=False)
class Observation:
    """What was recorded while one text was read.

    Attributes:
        needed_T: Log of how much questions need each token, averaged over layers, `[T]`.
        hidden: Inputs of the wanted layers, `[T, D]`, by layer.
        asked_T: What each token scores by `asked`, `[T]`; `None` without queries.
    """

    needed_T: torch.Tensor
    hidden: dict[int, torch.Tensor]
    asked_T: torch.Tensor | None


def observe(
    model: nn.Module,
    ids: torch.Tensor,
    asked: int,
    window: int,
    layers: Sequence[int],
    queries: Mapping[int, AnchorQueries] | None = None,
) -> Observation:
    """Reads a text with full attention and records what the questions at its end need of it beyond the window.

    The need of a token i is its largest share in the residual stream of any token j of a question or its answer:
    `max over heads and j >= i + window of a_ji |W_O v_i| / |h_j|`. Layers are averaged before the logarithm. What the
    text itself attends to does not count, because it attends to its first tokens whatever these say.

    Args:
        model: A model with a memory attached.
        ids: Token ids, `[T]`.
        asked: Index of the first token of the questions; questions and answers follow it.
        window: Tokens before each query that do not count, because the window holds them.
        layers: Layers whose inputs are wanted.
        queries: Queries of example questions by layer, on the CPU; none if left out.
    """
    hidden: dict[int, torch.Tensor] = {}
    needed: list[torch.Tensor] = []
    scores: list[torch.Tensor] = []

    def look(layer: LayerAttention) -> None:
        if layer.layer.index in layers:
            hidden[layer.layer.index] = layer.hidden_TD.cpu()
        needed.append(_needed(layer, asked, window))
        if queries and layer.layer.index in queries:
            scores.append(queries[layer.layer.index](layer.unrotated(layer.key_GTK)[None].cpu()))

    watch(model, ids, look)
    mean_T = torch.stack(needed).mean(0)
    asked_T = score_of_layers(scores)[0, :, 0] if scores else None
    return Observation(mean_T.clamp(min=_LEAST).log().cpu(), hidden, asked_T)


def _needed(layer: LayerAttention, asked: int, window: int) -> torch.Tensor:
    """How much the questions need each token in one layer, `[T]`."""
    moved_HT = layer.moved()
    tokens = torch.arange(moved_HT.size(1), device=moved_HT.device)
    near = tokens[asked:, None] - tokens < window
    most_T = torch.zeros_like(moved_HT[0])
    for head in range(moved_HT.size(0)):
        weights_QT = layer.scores(head, asked).softmax(-1).masked_fill(near, 0.0)
        share_T = (weights_QT / layer.length_T[asked:, None]).amax(0) * moved_HT[head]
        most_T = torch.maximum(most_T, share_T)
    return most_T
