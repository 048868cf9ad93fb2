"""Looking on while a model reads: each layer with a memory is handed over as it is read.

Legend of shapes: B batch, T tokens, E evicted tokens, D hidden size, N gates per head, H query heads, V value size.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from ahn.attachment import AttentionLayer, attachment_of
from ahn.attention.call import Call, LayerCall
from ahn.attention.function import attend_local, attention_function, recall, softmax_of
from ahn.attention.hooks import layer_call
from ahn.attention.masks import find_padding, mask_function
from ahn.backbone.survey import find_backbone, implementation
from ahn.cache.layer import HippocampalLayer
from ahn.config import RunSettings
from ahn.memories import Memory
from ahn.tokens import Tokens, VisibleKV

RECORDING = "ahn_recorded"


@dataclasses.dataclass(eq=False)
class RecordedLayer:
    """A layer with a memory in one call. What it would read with other settings is computed when it is asked for.

    Attributes:
        output: Output of its attention, `[B, T, H, V]`.
    """

    output: torch.Tensor
    _layer: LayerCall
    _query: torch.Tensor
    _key: torch.Tensor
    _value: torch.Tensor
    _arguments: dict[str, Any]

    @property
    def layer(self) -> AttentionLayer:
        """The layer."""
        return self._layer.layer

    @property
    def memory(self) -> Memory:
        """Its memory."""
        return self._layer.memory

    @property
    def hidden(self) -> torch.Tensor:
        """Input of the layer, `[B, T, D]`."""
        return self._layer.hidden

    @property
    def gates(self) -> torch.Tensor:
        """Gates of the new tokens, `[B, T, N, H]`."""
        return self.memory.gates(self._layer.hidden) if self._layer.gates is None else self._layer.gates

    @property
    def evicted_tokens(self) -> int:
        """Tokens that leave the window, E, where nothing was read before the call."""
        return self._view.evicted.length

    def read_window(self) -> torch.Tensor:
        """What sinks and window give, `[B, T, H, V]`, where nothing was read before the call."""
        arguments = dict(self._arguments)
        softmax = softmax_of(self._query, arguments.pop("scaling", None), arguments.pop("dropout", 0.0), arguments)
        return attend_local(self._layer, self._query, self._view, softmax)

    def recall(self) -> torch.Tensor:
        """What the memory reads for the last E tokens, `[B, E, H, V]` raw, where nothing was read before the call."""
        return recall(self._layer, self._store, self._query, self._view)

    @cached_property
    def _store(self) -> HippocampalLayer:
        return self._layer.call.open_layer(self.layer, self.memory)[0]

    @cached_property
    def _view(self) -> VisibleKV:
        new = Tokens(self._key, self._value, self._layer.record(self._key))
        return self._store.append(new, self._layer.call.padding)


Recorder = Callable[[RecordedLayer], None]
_RECORDER: ContextVar[Recorder | None] = ContextVar("ahn_recorder", default=None)


@contextlib.contextmanager
def record_layers(model: nn.Module, recorder: Recorder, student: RunSettings | None = None) -> Iterator[None]:
    """Hands every layer with a memory to a function while the model reads inside a `with` block.

    Args:
        model: A model with a memory attached.
        recorder: Is given each layer once its attention is computed.
        student: With these, for a model that reads in mode "full": how the layers that are handed over read the same
            hidden states. Their gates have gradients.
    """
    backbone, token = find_backbone(model), _RECORDER.set(recorder)
    handles = [] if student is None else _bring_students(model, backbone, student)
    try:
        with implementation(backbone, RECORDING):
            yield
    finally:
        _RECORDER.reset(token)
        for handle in handles:
            handle.remove()


def _bring_students(model: nn.Module, backbone: Any, settings: RunSettings) -> list[Any]:
    """Hooks that send a student's call to the layers while a model reads in mode "full"."""
    attachment = attachment_of(model)
    calls: list[Call] = []

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        padding = None if mask is None else find_padding(mask, mask.size(1), None, 0, has_cache=False)
        calls[:] = [Call(attachment, settings, padding)]

    def bring(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with torch.enable_grad():
            layer = layer_call(module, calls[0], args, kwargs)
        return args, {**kwargs, RECORDING: layer}

    served = [attention_layer.module for attention_layer in attachment.layers if attention_layer.memory is not None]
    return [
        backbone.register_forward_pre_hook(begin, with_kwargs=True),
        *(module.register_forward_pre_hook(bring, with_kwargs=True) for module in served),
    ]


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    ahn_recorded: LayerCall | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    output, weights = attention_function(module, query, key, value, attention_mask, **kwargs)
    recorder, layer = _RECORDER.get(), ahn_recorded or kwargs.get("ahn")
    if recorder is not None and layer is not None:
        recorder(RecordedLayer(output, layer, query, key, value, kwargs))
    return output, weights


AttentionInterface.register(RECORDING, _attend)
AttentionMaskInterface.register(RECORDING, mask_function)
