"""How much memory a training takes per process, from the base model's config alone: nothing is loaded.

The base model is built on torch's meta device, where tensors have shapes and no values. What a step keeps is counted
from these shapes; an allocator's gaps and libraries' workspaces are not. How many tensors of a kind live at the peak
was found by tracking all tensors of steps of small models. A test holds the count to that.
"""

from __future__ import annotations

import dataclasses

import torch

from ahn.attachment import AttentionLayer
from ahn.cost import SHAPES, Base, read_base
from ahn.cost.counting import parameters
from ahn.errors import ConfigError
from ahn.training.settings import TrainSettings

_FLOAT = 4  # bytes of a number in float32
_SLICE = 32 * 2**20  # bytes of a slice of logits, see `ahn.distillation.vocabulary`
_FEWEST = 16  # positions of a slice
_OF_LOGITS = 6  # slices at the same time
_OF_ADAM = 4  # weights, gradients, and two averages of AdamW
_KEPT = 2  # hidden states of a layer that wait for the backward pass
_OF_HIDDEN = 9  # tensors of a layer that is computed again: as wide as hidden states,
_OF_HEADS = 9  # as wide as all heads, in float32,
_OF_PERCEPTRON = 7  # and as wide as the perceptron, after those of the heads are gone


@dataclasses.dataclass(frozen=True)
class MemoryNeed:
    """What a process of a training holds, in bytes.

    Attributes:
        parts: Bytes of each part, by what it is.
        tokens: Tokens of a batch.
        step_tokens: Tokens of a step of one process.
    """

    parts: dict[str, int]
    tokens: int
    step_tokens: int

    @property
    def total(self) -> int:
        """All together."""
        return sum(self.parts.values())


def memory_need(settings: TrainSettings) -> MemoryNeed:
    """What a step of the stage distill holds at its peak, in each process.

    Args:
        settings: Settings of the training.

    Raises:
        ConfigError: Layers are not computed again, for which alone this is counted; or the settings do not fit the
            model.
        ModelError: There is no base model of this name, or it cannot be given a memory.
    """
    if settings.recomputed != "layers":
        raise ConfigError("the need of memory is counted for checkpointing: layers; set it, or train a step to see")
    base = read_base(_name(settings.model), settings.memory_config(), _dtype(settings))
    layers = base.attachment.layers
    memories = sum(map(parameters, base.attachment.memories))
    tokens, size = settings.batch * settings.length, base.dtype.itemsize
    hidden = layers[0].shape.hidden_size
    positions = settings.slice_tokens or max(_FEWEST, _SLICE // (_FLOAT * base.vocabulary_weights // hidden))
    parts = {
        "base model": base.parameters * size,
        "memories, gradients, AdamW": memories * _FLOAT * _OF_ADAM,
        "hidden states of all layers": _KEPT * len(layers) * tokens * hidden * size,
        "one layer, computed again": tokens * max(_token_bytes(base, layer, size) for layer in layers),
        "logits": _OF_LOGITS * _FLOAT * min(positions, tokens) * (base.vocabulary_weights // hidden),
    }
    return MemoryNeed(parts, tokens, tokens * settings.accumulation)


def _token_bytes(base: Base, layer: AttentionLayer, size: int) -> int:
    """What a layer holds of a token while its part of the backward pass runs: of attention or of its perceptron."""
    hidden = layer.shape.hidden_size
    heads = layer.shape.query_heads * layer.shape.value_size
    perceptron = base.other_weights // len(base.attachment.layers) // (3 * hidden)
    return _OF_HIDDEN * hidden * size + max(_OF_HEADS * heads * _FLOAT, _OF_PERCEPTRON * perceptron * size)


def _dtype(settings: TrainSettings) -> str:
    half = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return ("bfloat16" if half else "float32") if settings.dtype == "auto" else settings.dtype


def _name(model: str) -> str:
    """The model's name, or that of its sizes where the library knows them, so that no config need be fetched."""
    bare = model.rsplit("/", 1)[-1].lower().removesuffix("-instruct")
    return bare if bare in SHAPES else model
