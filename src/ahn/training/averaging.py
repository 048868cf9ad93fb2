"""Averaged weights: the mean over the last part of a training, which is better than any single step of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from ahn.checkpoint.content import memory_tensors
from ahn.training.saving import load_adapter, save_adapter

FOLDER = "averaged"
"""Name of the folder of a checkpoint that holds them, an adapter like any other."""


class WeightAverage:
    """The mean of the weights over about the last part of all steps so far, however many these will be.

    After step n it moves towards the weights by the share `min(1, 1 / (part n))`.

    Args:
        model: A model with a memory attached.
        part: The part of the steps, above 0 and at most 1, where 1 is the mean of all steps.
    """

    def __init__(self, model: nn.Module, part: float) -> None:
        self.model = model
        self.part = part
        self.weights = _copied(model)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after a step, the first of which is step 1."""
        share = min(1.0, 1.0 / (self.part * step))
        for name, tensor in memory_tensors(self.model).items():
            self.weights[name].lerp_(tensor.detach(), share)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Gives the model the averaged weights inside a `with` block."""
        trained = _copied(self.model)
        _copy(self.weights, self.model)
        try:
            yield
        finally:
            _copy(trained, self.model)

    def settle(self) -> None:
        """Gives the model the averaged weights for good."""
        _copy(self.weights, self.model)

    def save(self, folder: str | os.PathLike[str], write: bool = True) -> None:
        """Writes the averaged weights into a folder of a checkpoint."""
        with self.in_place():
            save_adapter(self.model, Path(folder) / FOLDER, write)

    def load(self, folder: str | os.PathLike[str]) -> None:
        """Goes on from what `save` wrote."""
        with self.in_place():
            load_adapter(self.model, Path(folder) / FOLDER)
            self.weights = _copied(self.model)


def _copied(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in memory_tensors(model).items()}


@torch.no_grad()
def _copy(weights: dict[str, torch.Tensor], model: nn.Module) -> None:
    for name, tensor in memory_tensors(model).items():
        tensor.copy_(weights[name])
