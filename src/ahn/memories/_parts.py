"""Small parts of the contract of a memory. Legend of shapes: B batch, T tokens, N gates per head, H query heads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from ahn.ops import at_least_float32


class Gating(NamedTuple):
    """What the gates of tokens do to the state, in numbers that people can read.

    Attributes:
        write_BTH: How strongly each token is written, `[B, T, H]`, at least 0.
        decay_BTH: Factor on the state at each token, `[B, T, H]`, in (0, 1]; `None` where nothing decays.
    """

    write_BTH: torch.Tensor
    decay_BTH: torch.Tensor | None


def stacked(gates: Iterable[torch.Tensor | None], shape: tuple[int, ...]) -> torch.Tensor:
    """Gates of one token each, `[..., H]` by `shape`, side by side: `[..., N, H]`, at least in float32."""
    return torch.stack([at_least_float32(gate).expand(shape) for gate in gates if gate is not None], dim=-2)


def are_plain(modules: Mapping[str, nn.Module | None], names: Sequence[str]) -> bool:
    """Whether modules are linear maps of torch and no more: no hooks, and nothing in the place of a forward.

    Args:
        modules: Modules by name.
        names: The names of those that are meant.
    """
    # A loop and no generator: this runs for every layer of every token.
    for name in names:
        module = modules.get(name)
        if type(module) is not nn.Linear:
            return False
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
            return False
    return True
