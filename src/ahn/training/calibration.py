"""A closed-form start for linearised attention: its mean queries, and how much of the softmax evicted tokens take.

Legend of shapes: B rows, T tokens, E positions where the memory has an output, N sampled ones, H query heads,
G key/value heads, K key size, V value size, F features of a share.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import cast

import torch
from torch import nn

from ahn.attachment import attachment_of
from ahn.attention.recording import RecordedLayer
from ahn.memories import Memory
from ahn.memories.linearized_attention import LinearizedAttention
from ahn.training.sampling import SpanDraw
from ahn.training.transfer import Adding, add_up

_EVERY = 4  # of the positions whose shares are looked at
_RIDGE = 1e-4  # of the mean square of a feature
_LEAST_WEIGHT = 0.002  # of a share that is next to 0 or 1, where the largest is 0.25
_LARGEST_LOGIT = 8.0


class _Sums(Adding):
    """Sums of queries `[H, K]` and of keys `[G, K]` by the roots of their positions' weights, and of these roots, `[]`.

    By the weights themselves the mean query would be that of the first few hundred tokens; rotation turns later ones
    away from it.
    """

    def count(self, layer: RecordedLayer) -> tuple[torch.Tensor, ...]:
        """The sums of a layer."""
        weights_BE = self.weights[:, -layer.evicted_tokens :].double().sqrt()
        beyond = (x[:, :, -layer.evicted_tokens :].double() for x in layer.projected[:2])
        return *(torch.einsum("be,bhek->hk", weights_BE, x) for x in beyond), weights_BE.sum()


class _Shares(Adding):
    """Normal equations of a weighted regression of the shares' logits, `[H, F, F]` and `[H, F, 1]`."""

    def count(self, layer: RecordedLayer) -> tuple[torch.Tensor, ...]:
        """The equations of a layer."""
        evicted, query = layer.evicted_tokens, layer.projected[0]
        picked = torch.arange(0, evicted, _EVERY, device=query.device)
        rows = picked + query.size(2) - evicted
        share_BHN = layer.evicted_share(rows).double().clamp(max=1)
        logit_BHN = torch.logit(share_BHN).clamp(-_LARGEST_LOGIT, _LARGEST_LOGIT)
        weight_BHN = (share_BHN * (1 - share_BHN) + _LEAST_WEIGHT) * self.weights[:, None, rows].double()
        memory = cast("LinearizedAttention", layer.memory)
        log_sum_BEH = cast("torch.Tensor", layer.read_window().of_last(evicted).log_sum)
        features_BHEF = _features(memory, query[:, :, -evicted:], layer.recall(), log_sum_BEH)
        features_BHNF = features_BHEF[:, :, picked].double()
        weighted_BHNF = features_BHNF * weight_BHN[..., None]
        both_HFF = torch.einsum("bhnf,bhng->hfg", weighted_BHNF, features_BHNF)
        return both_HFF, torch.einsum("bhnf,bhn->hf", weighted_BHNF, logit_BHN)[..., None]


def _features(
    memory: LinearizedAttention, query_BHEK: torch.Tensor, read_BEHV: torch.Tensor, log_sum_BEH: torch.Tensor
) -> torch.Tensor:
    """What a share is computed from, `[B, H, E, K + 4]`: query, size, match, weight of the exact tokens, and one."""
    scaled_BHEK = memory.scaled_queries(query_BHEK.transpose(1, 2)).transpose(1, 2)
    scores_BHE1, weights_BHE1 = read_BEHV[..., -3:-1].transpose(1, 2).split(1, dim=-1)
    exact_BHE1 = log_sum_BEH.transpose(1, 2)[..., None]
    numbers = weights_BHE1.log(), scores_BHE1 / weights_BHE1, -exact_BHE1, torch.ones_like(weights_BHE1)
    return torch.cat((scaled_BHEK, *numbers), dim=-1)


def calibrated(memories: Iterable[Memory]) -> list[LinearizedAttention]:
    """Those of some memories that `calibrate` sets."""
    return [memory for memory in memories if isinstance(memory, LinearizedAttention)]


@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Iterable[Mapping[str, torch.Tensor]],
    draw: SpanDraw,
    only: Container[Memory] | None = None,
) -> None:
    """Sets the mean queries and the shares of linearised attention to what the teacher does on a few texts.

    Two passes of the teacher: the first takes the mean queries and keys beyond the window. The second fits the logit of
    each head's share by weighted least squares. Positions count as in `ahn.training.transfer`; in the first, by
    the root of that. `g_proj` keeps a bias alone.

    Args:
        model: A model with a memory attached. Other kinds of memory stay as they are.
        batches: Texts, as for `find_targets`, without padding.
        draw: Window and sinks of each.
        only: The memories that are meant; all if left out.
    """
    meant = attachment_of(model).memories
    memories = set(calibrated(meant if only is None else [memory for memory in meant if memory in only]))
    if not memories:
        return
    batches = list(batches)
    sums = add_up(model, batches, draw, _Sums, memories)
    for memory in memories & sums.keys():
        queries, keys, weights = sums[memory]
        memory.mean_query.copy_(queries / weights)
        heads = (memory.mean_query.unflatten(0, (keys.size(0), -1)) * (keys / weights)[:, None]).sum(-1)
        memory.get_parameter("offset").copy_(heads.flatten() * memory.shape.key_size**-0.5)
    equations = add_up(model, batches, draw, _Shares, memories)
    for memory in memories & equations.keys():
        both, target = equations[memory]
        ridge = torch.diag_embed(_RIDGE * both.diagonal(dim1=-2, dim2=-1).clamp(min=1e-12))
        solved = torch.linalg.solve(both + ridge, target).squeeze(-1)
        memory.share_key.copy_(solved[:, :-4])
        memory.size_weight.copy_(solved[:, -4])
        memory.match_weight.copy_(solved[:, -3])
        memory.exact_weight.copy_(solved[:, -2])
        memory.g_proj.weight.zero_()
        memory.g_proj.bias.copy_(solved[:, -1])
