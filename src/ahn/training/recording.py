"""A wrapper around a model's attention function, to record the output of each layer and to save memory.

The model runs under another name of the same function, in either mode and with gradients, whatever its family.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from ahn.attention.function import attention_function
from ahn.attention.masks import mask_function
from ahn.backbone.survey import implementation

RECORDING = "ahn_recording"


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """What the wrapped function should do in a run."""

    outputs: dict[int, torch.Tensor] | None
    recompute: bool


_WANTED: ContextVar[_Wanted | None] = ContextVar("ahn_recording", default=None)


@contextlib.contextmanager
def recording(
    backbone: nn.Module, outputs: dict[int, torch.Tensor] | None = None, recompute: bool = False
) -> Iterator[None]:
    """Records the attention outputs of a call, or recomputes them in the backward pass instead of keeping activations.

    Args:
        backbone: The stack of layers of a model with a memory attached.
        outputs: Receives the attention outputs, `[B, T, H, V]`, by layer index; those of a call in chunks are joined.
        recompute: Whether to compute window and memory again in the backward pass. They keep more activations than the
            rest of a layer, and take little of its time.
    """
    token = _WANTED.set(_Wanted(outputs, recompute))
    try:
        with implementation(backbone, RECORDING):
            yield
    finally:
        _WANTED.reset(token)


def _recorded(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    wanted = _WANTED.get() or _Wanted(None, False)
    if wanted.recompute and torch.is_grad_enabled() and kwargs.get("ahn") is not None:
        again: Any = checkpoint(
            attention_function, module, query, key, value, mask, use_reentrant=False, preserve_rng_state=False, **kwargs
        )
        output, weights = again
    else:
        output, weights = attention_function(module, query, key, value, mask, **kwargs)
    if wanted.outputs is not None:
        index = int(module.layer_idx)  # type: ignore[arg-type]
        earlier = [wanted.outputs[index]] if index in wanted.outputs else []
        wanted.outputs[index] = torch.cat([*earlier, output], dim=1) if earlier else output
    return output, weights


AttentionInterface.register(RECORDING, _recorded)
AttentionMaskInterface.register(RECORDING, mask_function)
