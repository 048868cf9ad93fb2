"""The targets of the score `learned`: how much of each token is read beyond the window, in full attention.

One is what questions at the end of a text read, the other what the text itself reads again. What a few questions attend
to is a noisy target: they ask for some facts, and another text of the same form would ask for others. Where queries of
many example questions are known (`asked`), what these attend to counts as much.

Legend of shapes: T tokens, Q of them in questions, D hidden size, H query heads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ahn.anchors.queries import AnchorQueries
from ahn.anchors.selection import score_of_layers
from ahn.attachment import attachment_of
from ahn.training.anchors.capture import LayerAttention, watch

_BLOCK = 128  # queries at once, so that their weights stay in a processor's cache
_LEAST, _LEAST_SQUARE = 1e-6, 1e-12  # of a token that nothing looks at


@dataclasses.dataclass(eq=False)
class Observation:
    """What was recorded while one text was read.

    Attributes:
        needed_T: Log of how much questions need each token, averaged over layers, `[T]`.
        reread_T: Log of how much later tokens of the text read of each token, added up over the upper half of the
            layers, `[T]`.
        hidden: Inputs of the wanted layers, `[T, D]`, by layer.
        asked_T: What each token scores by `asked`, `[T]`; `None` without queries.
    """

    needed_T: torch.Tensor
    reread_T: torch.Tensor
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
    """Reads a text with full attention and records what is read of each token beyond the window.

    The need of questions for a token i is its largest share in the residual stream of any token j of a question or its
    answer: `max over heads and j >= i + window of a_ji |W_O v_i| / |h_j|`. Layers are averaged before the logarithm.

    What the text reads of it is `mean over j >= i + window of (a_ji |W_O v_i|)^2`, added up over heads. Squares count
    what few queries look at, which a memory of fixed size tells worst, and not what all look at a little. Far tokens
    are read in the upper half of the layers, and only these are added up.

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
    reread: list[torch.Tensor] = []
    served = [layer.index for layer in attachment_of(model).layers if layer.memory is not None]
    upper = served[len(served) // 2 :]
    scores: list[torch.Tensor] = []

    def look(layer: LayerAttention) -> None:
        if layer.layer.index in layers:
            hidden[layer.layer.index] = layer.hidden_TD.cpu()
        moved_HT = layer.moved()
        needed.append(_needed(layer, moved_HT, asked, window))
        if layer.layer.index in upper:
            reread.append(_reread(layer, moved_HT, asked, window))
        if queries and layer.layer.index in queries:
            scores.append(queries[layer.layer.index](layer.unrotated(layer.key_GTK)[None].cpu()))

    watch(model, ids, look)
    mean_T = torch.stack(needed).mean(0)
    asked_T = score_of_layers(scores)[0, :, 0] if scores else None
    sum_T = torch.stack(reread).sum(0)
    return Observation(_log(mean_T, _LEAST), _log(sum_T, _LEAST_SQUARE), hidden, asked_T)


def _log(values_T: torch.Tensor, least: float) -> torch.Tensor:
    return values_T.clamp(min=least).log().cpu()


def _needed(layer: LayerAttention, moved_HT: torch.Tensor, asked: int, window: int) -> torch.Tensor:
    """How much the questions need each token in one layer, `[T]`."""
    tokens = torch.arange(moved_HT.size(1), device=moved_HT.device)
    near = tokens[asked:, None] - tokens < window
    most_T = torch.zeros_like(moved_HT[0])
    for head in range(moved_HT.size(0)):
        weights_QT = layer.scores(slice(head, head + 1), asked)[0].softmax(-1).masked_fill(near, 0.0)
        share_T = (weights_QT / layer.length_T[asked:, None]).amax(0) * moved_HT[head]
        most_T = torch.maximum(most_T, share_T)
    return most_T


def _reread(layer: LayerAttention, moved_HT: torch.Tensor, stop: int, window: int) -> torch.Tensor:
    """How much the tokens before `stop` read of each token beyond the window in one layer, a mean of squares, `[T]`."""
    squares_HT = torch.zeros_like(moved_HT)
    for first in range(window, stop, _BLOCK):
        last = min(first + _BLOCK, stop)
        weights_HQJ = layer.scores(slice(None), first, last).softmax(-1)[..., : last - window]
        squares_HT[:, : last - window] += weights_HQJ.tril(first - window).square().sum(1)
    queries_T = stop - window - torch.arange(moved_HT.size(1), device=moved_HT.device)
    return (squares_HT * moved_HT.square()).sum(0) / queries_T.clamp(min=1)
