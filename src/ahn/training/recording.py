"""Seeing what each attention layer puts out, in either mode and with gradients, without knowing the family.

The model runs under another name of the same attention function, which notes each output before the output projection.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from ahn.attention import attention_function
from ahn.plan import mask_function
from ahn.probe import implementation

RECORDING = "ahn_recording"
_OUTPUTS: ContextVar[dict[int, torch.Tensor] | None] = ContextVar("ahn_outputs", default=None)


@contextlib.contextmanager
def recording(backbone: nn.Module, outputs: dict[int, torch.Tensor], wanted: bool = True) -> Iterator[None]:
    """Notes the attention outputs of a call, `[B, T, H, V]`, by layer index.

    Args:
        backbone: The stack of layers of a model with a memory attached.
        outputs: Where to put them.
        wanted: Whether to note anything at all.
    """
    if not wanted:
        yield
        return
    token = _OUTPUTS.set(outputs)
    try:
        with implementation(backbone, RECORDING):
            yield
    finally:
        _OUTPUTS.reset(token)


def _noted(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    output, weights = attention_function(module, *args, **kwargs)
    if (outputs := _OUTPUTS.get()) is not None:
        outputs[int(module.layer_idx)] = output  # type: ignore[arg-type]
    return output, weights


AttentionInterface.register(RECORDING, _noted)
AttentionMaskInterface.register(RECORDING, mask_function)
