"""Looking on while a model reads: each layer with a memory is handed over as it is read.

Legend of shapes: B batch, T tokens, E evicted tokens, D hidden size, N gates per head, H query heads, V value size.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from ahn.attachment import AttentionLayer, attachment_of
from ahn.attention.call import Call, LayerCall, Softmax
from ahn.attention.function import attend_local, attention_function, recall, softmax_of
from ahn.attention.hooks import layer_call
from ahn.attention.masks import find_padding, mask_function
from ahn.attention.softmax import Reading, explicit_weights
from ahn.backbone.survey import find_backbone, implementation
from ahn.cache.layer import HippocampalLayer
from ahn.config import RunSettings
from ahn.memories import Gating, Memory
from ahn.tokens import Attended, Tokens, VisibleKV

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
    def writing(self) -> Gating:
        """What the new tokens do to the state when they leave the window."""
        return self.memory.writing(self.projected[1].transpose(1, 2), self.gates)

    @property
    def evicted_tokens(self) -> int:
        """Tokens that leave the window, E, where nothing was read before the call."""
        return self._view.evicted.length

    def read_window(self) -> Attended:
        """What sinks and window give, where nothing was read before the call."""
        return attend_local(self._layer, self._query, self._view, self._softmax)

    def recall(self) -> torch.Tensor:
        """What the memory reads for the last E tokens, `[B, E, H, V]` raw, where nothing was read before the call."""
        return recall(self._layer, self._store, self._query, self._view)

    @property
    def projected(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values of the tokens, `[B, H or G, T, K or V]`, as the memory is given them."""
        query, key, rotary = self._query, self._key, self._layer.rotary
        if rotary and rotary.unrotates:
            query, key = (rotary.rotation.unrotate(each, rotary.tables) for each in (query, key))
        return query, key, self._value

    def evicted_share(self, rows: torch.Tensor) -> torch.Tensor:
        """How much of full attention's weights lies on tokens that have left the window, `[B, H, N]` float32.

        Nothing was read before the call, which has no padding.

        Args:
            rows: Positions of the queries, `[N]` int64.
        """
        settings, tokens = self._layer.call.settings, torch.arange(self._key.size(2), device=rows.device)
        window = self._view.window
        hidden = self._query.new_zeros(rows.numel(), tokens.numel()).masked_fill_(tokens > rows[:, None], -torch.inf)
        reading = Reading(self._query[:, :, rows], None, self._key, self._value, hidden, slice(0, 0))
        weights = explicit_weights(reading, self._softmax).view(*reading.query.shape[:3], -1)
        evicted = (tokens >= settings.sinks) & (tokens <= rows[:, None] - window)
        return (weights * evicted).sum(-1)

    @property
    def _softmax(self) -> Softmax:
        arguments = dict(self._arguments)
        return softmax_of(self._query, arguments.pop("scaling", None), arguments.pop("dropout", 0.0), arguments)

    @functools.cached_property
    def _store(self) -> HippocampalLayer:
        return self._layer.call.open_layer(self.layer, self.memory)[0]

    @functools.cached_property
    def _view(self) -> VisibleKV:
        new = Tokens(self._key, self._value, self._layer.record(self._key))
        return self._store.append(new, self._layer.call.padding)


Receive = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]], None]
"""Is given the output, queries, keys, values and other arguments of a layer's attention."""
MakeReceiver = Callable[[tuple[Any, ...], dict[str, Any]], Receive | None]
"""Makes what receives a layer's attention in a call, from the arguments of the layer."""


@contextlib.contextmanager
def hand_over(backbone: nn.Module, receivers: Mapping[nn.Module, MakeReceiver]) -> Iterator[None]:
    """Hands over what attention layers compute while the model reads inside a `with` block, in any mode.

    Args:
        backbone: The stack of layers of a model with a memory attached.
        receivers: What receives it, by the layer's module.
    """

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, RECORDING: receivers[module](args, kwargs)}

    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in receivers]
    try:
        with implementation(backbone, RECORDING):
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def record_layers(
    model: nn.Module, recorder: Callable[[RecordedLayer], None], student: RunSettings | None = None
) -> Iterator[None]:
    """Hands every layer with a memory to a function while the model reads inside a `with` block.

    Args:
        model: A model with a memory attached.
        recorder: Is given each layer once its attention is computed.
        student: With these, for a model that reads in mode "full": how the layers that are handed over read the same
            hidden states. Their gates have gradients.
    """
    backbone, attachment = find_backbone(model), attachment_of(model)
    calls: list[Call] = []

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        padding = None if mask is None else find_padding(mask, mask.size(1), None, 0, has_cache=False)
        calls[:] = [] if student is None else [Call(attachment, student, padding)]

    def receiver(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Receive | None:
        layer: LayerCall | None = kwargs.get("ahn")
        if calls:
            with torch.enable_grad():
                layer = layer_call(module, calls[0], args, kwargs)
        return None if layer is None else lambda output, *rest: recorder(RecordedLayer(output, layer, *rest))

    served = [layer.module for layer in attachment.layers if layer.memory is not None]
    handle = backbone.register_forward_pre_hook(begin, with_kwargs=True)
    try:
        with hand_over(backbone, {module: functools.partial(receiver, module) for module in served}):
            yield
    finally:
        handle.remove()


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    ahn_recorded: Receive | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    output, weights = attention_function(module, query, key, value, attention_mask, **kwargs)
    if ahn_recorded is not None:
        ahn_recorded(output, query, key, value, kwargs)
    return output, weights


AttentionInterface.register(RECORDING, _attend)
AttentionMaskInterface.register(RECORDING, mask_function)
