"""The linear maps of the base model while a single token is decoded with a bounded memory.

Reading their weights is most of the time that a token takes on a CPU. In products of a matrix and a vector torch reads
them at half the speed of memory. So while a memory is attached, decoding runs them through the kernels of `ahn.native`.
In every other call, and in mode "full", they are the base model's.
"""

from __future__ import annotations

from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ahn import native

_decodes: ContextVar[bool] = ContextVar("ahn_decoding", default=False)


def note_call(decodes: bool) -> None:
    """Says whether the call that begins in this thread decodes; its head, which runs when the layers are through, asks.

    Args:
        decodes: Whether it reads one token into a bounded memory.
    """
    _decodes.set(decodes)


def speed_up(model: nn.Module) -> None:
    """Makes plain linear maps look for a kernel first. Those that something else has changed stay as they are."""
    for module in model.modules():
        if type(module) is nn.Linear and "forward" not in vars(module):
            module.forward = partial(_forward, module)  # type: ignore[method-assign]


def restore(model: nn.Module) -> None:
    """Takes back what `speed_up` did."""
    for module in model.modules():
        forward: Any = vars(module).get("forward")
        if isinstance(forward, partial) and forward.func is _forward:
            del module.forward


def _forward(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    size = linear.in_features
    if not torch.compiler.is_compiling() and _decodes.get() and native.can_multiply(x.numel() // size, size):
        bias = [] if linear.bias is None else [linear.bias]
        if native.ready(x, linear.weight, *bias) and linear.weight.is_contiguous():
            return native.linear(x, linear.weight, linear.bias)
    return functional.linear(x, linear.weight, linear.bias)
