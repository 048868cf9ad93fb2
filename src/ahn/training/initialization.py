"""Initial weights of memories: decay rates, output gates, and what is copied from another kind of memory."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

import ahn
from ahn.attachment import attachment_of
from ahn.backbone import compat
from ahn.backbone.survey import find_backbone
from ahn.checkpoint.loading import read
from ahn.errors import CheckpointError
from ahn.memories import Memory, memory_class


class Copied(NamedTuple):
    """What was copied from another adapter.

    Attributes:
        parameters: Names of the parameters, without their layers.
        memories: The memories that took some.
    """

    parameters: list[str]
    memories: set[Memory]


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
    memories = attachment_of(model).memories
    log_rates = [memory.get_parameter(memory.log_rate) for memory in memories if memory.log_rate is not None]
    for log_rate in log_rates:
        drawn = torch.empty(log_rate.shape).uniform_(low, high, generator=generator)
        log_rate.copy_(drawn.clamp(min=1e-4).log())
    return bool(log_rates)


@torch.no_grad()
def set_initial_gate(
    model: nn.Module, opening: float, sequences: Iterable[torch.Tensor], only: Container[Memory] | None = None
) -> None:
    """Opens the output gates of the attached memories: for an average token each gate is `silu(opening)`.

    Published gates start near zero and with either sign, and the output projection starts at zero. Each is multiplied
    by the other, so both hardly move at first. Open gates let the projection learn from the first step on.

    Args:
        model: A model with a memory attached.
        opening: What the gate projection gives for the mean of what its layer reads.
        sequences: A few texts to take that mean from, `[T]` each.
        only: The memories that are meant; all if left out.
    """
    means = _mean_inputs(model, sequences)
    for layer in attachment_of(model).layers:
        if layer.memory is None or (only is not None and layer.memory not in only):
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
def copy_common(model: nn.Module, adapter: str) -> Copied:
    """Copies the weights that another kind of memory has in common with the attached one, layer by layer.

    A trained memory is a good start for another kind: the read-out, the output gate and the write strength are the same
    maps in all kinds but `linearized_attention`.

    Args:
        model: A model with a memory attached.
        adapter: As for `ahn.load`.

    Raises:
        CheckpointError: There is no such adapter, or it has nothing in common with the memory.
    """
    content = read(adapter)
    stored, theirs = content.tensors(), content.kinds
    taken: set[str] = set()
    memories: set[Memory] = set()
    for layer in attachment_of(model).layers:
        if layer.memory is None or layer.index not in theirs:
            continue
        if memory_class(theirs[layer.index]).normalizes is not layer.memory.normalizes:
            continue  # gates and projections of one name mean other things
        for name, tensor in layer.memory.state_dict(keep_vars=True).items():
            found = stored.get(f"layers.{layer.index}.{name}")
            if found is not None and found.shape == tensor.shape:
                tensor.copy_(found)
                taken.add(name)
                memories.add(layer.memory)
    if not taken:
        raise CheckpointError(f"{adapter}: it has no weights in common with the memory to train. Start without it.")
    return Copied(sorted(taken), memories)
