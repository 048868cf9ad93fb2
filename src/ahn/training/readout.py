"""A closed-form start: the output projections that best explain what the window misses, with the gates unchanged.

Legend of shapes: B rows, T tokens, E positions where the memory has an output, H query heads, V value size.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping

import torch
from torch import nn

from ahn.attachment import attachment_of
from ahn.attention.recording import RecordedLayer
from ahn.memories import Memory
from ahn.training.sampling import SpanDraw
from ahn.training.transfer import Adding, add_up

_RIDGE = 0.03  # of the mean square of what is read


class _Moments(Adding):
    """Second moments of what the heads of a layer read, and of that and what their window misses, `[H, V, V]` each."""

    def count(self, layer: RecordedLayer) -> tuple[torch.Tensor, ...]:
        """Moments of one layer."""
        missing = self.missing(layer)
        gated_BEHV = layer.memory.gated(layer.recall(), layer.hidden[:, missing.before :], missing.local)
        weighted_BEHV = gated_BEHV * missing.weight_BE11
        return (
            torch.einsum("behv,behw->hvw", weighted_BEHV, gated_BEHV).double(),
            torch.einsum("behv,behw->hvw", weighted_BEHV, missing.output_BEHV).double(),
        )


@torch.no_grad()
def solve_readout(
    model: nn.Module,
    batches: Iterable[Mapping[str, torch.Tensor]],
    draw: SpanDraw,
    scale: float,
    upper_scale: float | None = None,
    only: Container[Memory] | None = None,
) -> None:
    """Sets the output projections of the attached memories to a ridge regression on what the window misses.

    Each head gets `W = (R^T P R + c I)^-1 R^T P M`. R is what the head reads after its gated norm. M is the output of
    full attention minus that of sinks and window. Both come from one pass of the teacher over a few texts. P has the
    weights of positions, as in `ahn.training.transfer`. The regression explains each layer separately. All layers
    together would overshoot, so a share of it is the better start.

    Args:
        model: A model with a memory attached; its gates should be open (`set_initial_gate`).
        batches: Texts, as for `find_targets`.
        draw: Window and sinks of each.
        scale: Share of the solution that is taken.
        upper_scale: Share in the upper half of the layers, where far tokens are read; `scale` if left out.
        only: The memories that are meant; all if left out.
    """
    layers = attachment_of(model).layers
    moments = add_up(model, batches, draw, _Moments, attachment_of(model).memories if only is None else only)
    for number, layer in enumerate(layers):
        share = scale if upper_scale is None or 2 * number < len(layers) else upper_scale
        if layer.memory is not None and layer.memory in moments:
            layer.memory.o_proj.copy_(share * _ridge(*moments[layer.memory]))


def _ridge(read_HVV: torch.Tensor, both_HVV: torch.Tensor) -> torch.Tensor:
    """Solution for every head, `[H, V, V]` float64, from its moments."""
    mean_H = read_HVV.diagonal(dim1=-2, dim2=-1).mean(-1)
    eye_VV = torch.eye(read_HVV.size(-1), dtype=read_HVV.dtype, device=read_HVV.device)
    ridge_HVV = _RIDGE * mean_H.clamp(min=1e-12)[:, None, None] * eye_VV
    solution_HVV: torch.Tensor = torch.linalg.solve(read_HVV + ridge_HVV, both_HVV)
    return solution_HVV
