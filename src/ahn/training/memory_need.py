"""How much memory a training takes per process, from the base model's config alone: nothing is loaded.

The base model is built on torch's meta device, where tensors have shapes and no values. What a step keeps is counted
from these shapes; an allocator's gaps and libraries' workspaces are not.
"""

from __future__ import annotations

import dataclasses

import torch

from ahn.attachment import AttentionLayer
from ahn.cost import SHAPES, Base, read_base
from ahn.errors import ConfigError
from ahn.training.settings import TrainSettings

_FLOAT = 4  # bytes of a number in float32
_LOGITS = 32 * 2**20  # bytes of a slice of logits, see `ahn.distillation.vocabulary`
_OF_LOGITS = 4  # slices at the same time: teacher, student, their difference, its gradient
_OF_ADAM = 4  # weights, gradients, and two averages of AdamW
_RECURRENCE = 6  # tensors of a layer's heads in float32: query, key, value, output, gated output, their gradient
_SOFTMAX = 5  # in the base's dtype: query, output, gradients of both, and keys with values
_PERCEPTRON = 4  # of a layer's wide side: gate, up, their product, its gradient
_OF_HIDDEN = 6  # of a layer's narrow side: input, norms, residuals, gradients


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
        ConfigError: There is no anchors-free or layer-wise count for these settings, or they do not fit the model.
        ModelError: There is no base model of this name, or it cannot be given a memory.
    """
    if settings.recomputed != "layers":
        raise ConfigError("the need of memory is counted for checkpointing: layers; set it, or train a step to see")
    base = read_base(_name(settings.model), settings.memory_config(), _dtype(settings))
    served = [layer for layer in base.attachment.layers if layer.memory is not None]
    memories = sum(_parameters(base, settings.memory, layer) for layer in served)
    tokens, size = settings.batch * settings.length, base.dtype.itemsize
    hidden = base.layers[0][0].shape.hidden_size
    layers = len(base.attachment.layers)
    parts = {
        "base model": base.parameters * size,
        "memories, gradients, AdamW": memories * _FLOAT * _OF_ADAM,
        "input of every layer": layers * tokens * hidden * size,
        "one layer, computed again": max(_layer_bytes(base, layer, tokens, size) for layer in base.attachment.layers),
        "last hidden states": 3 * tokens * hidden * size,  # teacher, student, gradient
        "logits": _OF_LOGITS * max(_LOGITS, _FLOAT * (settings.slice_tokens or 16) * _vocabulary(base)),
    }
    return MemoryNeed(parts, tokens, tokens * settings.accumulation)


def _layer_bytes(base: Base, layer: AttentionLayer, tokens: int, size: int) -> int:
    """What a layer holds while its part of the backward pass runs."""
    shape = layer.shape
    heads = shape.query_heads * shape.value_size
    wide = (base.other_weights // max(1, len(base.attachment.layers))) // (3 * shape.hidden_size)
    recurrence = _RECURRENCE * heads * _FLOAT if layer.memory is not None else 0
    return tokens * (recurrence + size * (_SOFTMAX * heads + _PERCEPTRON * wide + _OF_HIDDEN * shape.hidden_size))


def _parameters(base: Base, memory: str, layer: AttentionLayer) -> int:
    return sum(parameter.numel() for parameter in base.memories[memory, layer.shape].parameters())


def _vocabulary(base: Base) -> int:
    return base.vocabulary_weights // base.layers[0][0].shape.hidden_size


def _dtype(settings: TrainSettings) -> str:
    half = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return ("bfloat16" if half else "float32") if settings.dtype == "auto" else settings.dtype


def _name(model: str) -> str:
    """The model's name, or that of its sizes where the library knows them, so that no config need be fetched."""
    bare = model.rsplit("/", 1)[-1].lower().removesuffix("-instruct")
    return bare if bare in SHAPES else model
