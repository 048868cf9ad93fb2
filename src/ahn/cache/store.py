"""What the stores behind the window have in common."""

from __future__ import annotations

from collections.abc import Callable

import torch


class Store:
    """What a store behind the window holds, by name.

    Args:
        *names: Names of its tensors.

    Attributes:
        held: Its tensors; none before something was stored.
    """

    def __init__(self, *names: str) -> None:
        self.names = names
        self.stored: dict[str, torch.Tensor] = {}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor held, by name."""
        return dict(self.stored)

    def set_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Takes over tensors that `tensors` gave, among others."""
        self.stored = {name: tensors[name] for name in self.names if name in tensors}

    def map_tensors(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replaces every tensor by the function's result on it."""
        self.stored = {name: function(tensor) for name, tensor in self.stored.items()}

    def reset(self) -> None:
        """Forgets everything."""
        self.stored = {}
