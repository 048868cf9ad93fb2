"""How memories start: the rates at which fresh ones forget."""

from __future__ import annotations

import torch
from torch import nn

from ahn.attachment import attachment_of


@torch.no_grad()
def set_initial_decay(model: nn.Module, low: float, high: float, seed: int) -> bool:
    """Draws the decay rates of the attached memories, exp(A_log), uniformly from a range.

    The published range, 0 to 16, makes most heads forget within a few tokens; a short training does not get them out
    of it, and starts better from slow rates.

    Args:
        model: A model with a memory attached.
        low: Lowest rate; a little above 0 at least, for its logarithm is what is learned.
        high: Highest rate.
        seed: What the draw depends on.

    Returns:
        Whether the memory has such rates.
    """
    generator = torch.Generator().manual_seed(seed)
    found = False
    for site in attachment_of(model).sites:
        rates = getattr(site.memory, "A_log", None)
        if isinstance(rates, torch.Tensor):
            drawn = torch.empty(rates.shape).uniform_(low, high, generator=generator)
            rates.copy_(drawn.clamp(min=1e-4).log())
            found = True
    return found
