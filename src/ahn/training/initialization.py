"""Initial weights of memories: decay rates, output gates, and what is copied from another kind of memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

import ahn
from ahn.attachment import attachment_of
from ahn.backbone import compat
from ahn.backbone.survey import find_backbone
from ahn.checkpoint.content import memory_tensors
from ahn.checkpoint.loading import read
from ahn.errors import CheckpointError
from ahn.memories import memory_class


@torch.no_grad()
def set_initial_decay(model: nn.Module, low: float, high: float, seed: int) -> bool:
    """Draws the decay rates of the attached memories, exp of the parameter `log_rate`, uniformly from a range.

    The published range, 0 to 16, makes most heads forget within a few tokens. A short training does not change that, so
    it starts better from slow rates.

    Args:
        model: A model with a memory attached.
        low: Lowest rate; above 0, because its logarithm is learned.
        high: Highest rate.
        seed: What the draw depends on.

    Returns:
        Whether the memory has such rates.
    """
    generator = torch.Generator().manual_seed(seed)
    memories = [layer.memory for layer in attachment_of(model).layers if layer.memory is not None]
    log_rates = [memory.get_parameter(memory.log_rate) for memory in memories if memory.log_rate is not None]
    for log_rate in log_rates:
        drawn = torch.empty(log_rate.shape).uniform_(low, high, generator=generator)
        log_rate.copy_(drawn.clamp(min=1e-4).log())
    return bool(log_rates)


@torch.no_grad()
def set_initial_gate(model: nn.Module, opening: float, sequences: Iterable[torch.Tensor]) -> None:
    """Opens the output gates of the attached memories: for an average token each gate is `silu(opening)`.

    Published gates start near zero and with either sign, and the output projection starts at zero. Each is multiplied
    by the other, so both hardly move at first. Open gates let the projection learn from the first step on.

    Args:
        model: A model with a memory attached.
        opening: What the gate projection gives for the mean of what its layer reads.
        sequences: A few texts to take that mean from, `[T]` each.
    """
    means = _mean_inputs(model, sequences)
    for layer in attachment_of(model).layers:
        if layer.memory is None:
            continue
        gate = layer.memory.g_proj
        mean_D = means[layer.index].to(gate.weight)
        gate.weight.copy_((opening / mean_D.square().sum().clamp(min=1e-12) * mean_D).expand_as(gate.weight))
        if gate.bias is not None:
            gate.bias.zero_()


def _mean_inputs(model: nn.Module, sequences: Iterable[torch.Tensor]) -> dict[int, torch.Tensor]:
    """Mean input of each layer with a memory, `[D]` float32, by layer index."""
    layers = [layer for layer in attachment_of(model).layers if layer.memory is not None]
    sums: dict[int, torch.Tensor] = {}
    tokens = 0

    def note(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            sums[index] = sums.get(index, 0) + hidden.flatten(0, -2).float().sum(0)

        return hook

    handles = [layer.module.register_forward_pre_hook(note(layer.index), with_kwargs=True) for layer in layers]
    try:
        with ahn.mode(model, "full"):
            for ids in sequences:
                tokens += ids.numel()
                find_backbone(model)(input_ids=ids[None].to(compat.input_device(find_backbone(model))), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {index: total / tokens for index, total in sums.items()}


@torch.no_grad()
def copy_common(model: nn.Module, adapter: str) -> list[str]:
    """Copies the weights that another kind of memory has in common with the attached one.

    A trained memory is a good start for another kind: the read-out, the output gate and the write strength are the same
    maps in all kinds but `linearized_attention`.

    Args:
        model: A model with a memory attached.
        adapter: As for `ahn.load`.

    Returns:
        Names of the copied parameters, without their layers.

    Raises:
        CheckpointError: There is no such adapter, or it has nothing in common with the memory.
    """
    content, ours = read(adapter), memory_tensors(model)
    kinds = (memory_class(config.memory) for config in (content.config, attachment_of(model).config))
    alike = len({kind.normalizes for kind in kinds}) == 1  # else gates and projections of one name mean other things
    stored = content.tensors() if alike else {}
    taken = [key for key, tensor in ours.items() if key in stored and stored[key].shape == tensor.shape]
    if not taken:
        raise CheckpointError(f"{adapter}: it has no weights in common with the memory to train. Start without it.")
    for key in taken:
        ours[key].copy_(stored[key])
    return sorted({key.split(".", 2)[2] for key in taken})
