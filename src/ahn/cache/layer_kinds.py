"""What the layers of a cache are: ours where a layer has a memory, those of transformers elsewhere."""

from __future__ import annotations

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ahn.anchors.policy import Policy
from ahn.attachment import AttentionLayer
from ahn.cache.compressive import state_slots
from ahn.cache.layer import HippocampalLayer, stored_dtype
from ahn.config import RunSettings
from ahn.memories import Memory

AnyLayer = HippocampalLayer | DynamicLayer


def new_layer(
    layer: AttentionLayer,
    settings: RunSettings,
    policy: Policy | None = None,
    kind: type[HippocampalLayer] = HippocampalLayer,
) -> AnyLayer:
    """An empty layer of a cache: ours, of this kind, for a layer with a memory, the base model's own for another."""
    if layer.memory is not None:
        scores = policy is not None and layer.index in policy.layers
        names = policy.score.state_names if policy and scores else ()
        return new_memory_layer(layer, layer.memory, settings, names, kind)
    if layer.sliding_window is not None:
        return DynamicSlidingWindowLayer(layer.sliding_window)
    return DynamicLayer()


def new_memory_layer(
    layer: AttentionLayer,
    memory: Memory,
    settings: RunSettings,
    score_names: tuple[str, ...] = (),
    kind: type[HippocampalLayer] = HippocampalLayer,
) -> HippocampalLayer:
    """An empty layer of a cache for a layer with a memory, see `HippocampalLayer`."""
    number_bytes = (stored_dtype(settings) or layer.dtype).itemsize
    return kind(settings, layer.sliding_window, state_slots(memory, number_bytes), score_names)


def layer_tensors(layer: AnyLayer) -> dict[str, torch.Tensor]:
    """Every tensor that a layer of the cache holds, by name."""
    if isinstance(layer, HippocampalLayer):
        return layer.tensors()
    if layer.keys is None or layer.values is None:
        return {}
    return {"keys": layer.keys, "values": layer.values}


def set_layer_tensors(layer: AnyLayer, tensors: dict[str, torch.Tensor], seen: int) -> None:
    """Puts tensors that `layer_tensors` gave into an empty layer."""
    if isinstance(layer, HippocampalLayer):
        layer.set_tensors(tensors, seen)
    elif tensors:
        layer.lazy_initialization(tensors["keys"], tensors["values"])
        layer.keys, layer.values = tensors["keys"], tensors["values"]
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = seen
