"""The linear maps of the base model while a single token is decoded, and while a memory is trained under autocast.

Reading their weights is most of the time that a token takes on a CPU. In products of a matrix and a vector torch reads
them at half the speed of memory. So while a memory is attached, decoding runs them through the kernels of `ahn.native`.
In every other call, and in mode "full", they are the base model's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ahn import native

_decodes: ContextVar[bool] = ContextVar("ahn_decoding", default=False)


class CastWeights:
    """Frozen weights in the dtype that autocast multiplies in, each cast once.

    Autocast casts a frozen weight anew in every call, and each call holds its copy until its gradients are computed: a
    text in ten chunks holds ten copies of the whole base.
    """

    def __init__(self) -> None:
        self._casts: dict[int, tuple[torch.Tensor, int, torch.Tensor]] = {}  # a weight, its version then, its cast
        self._input: tuple[torch.Tensor, int, torch.Tensor] | None = None  # a tensor, its version then, its cast

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Lets linear maps with frozen weights multiply by the casts inside a `with` block."""
        token = _casts.set(self)
        try:
            yield
        finally:
            _casts.reset(token)
            self._input = None

    def note_input(self, x: torch.Tensor, cast: torch.Tensor) -> None:
        """Keeps what several maps will read, until the next one comes.

        Args:
            x: The tensor.
            cast: The same in the dtype of autocast.
        """
        self._input = None if x.is_inference() else (x, x._version, cast)  # inference tensors have no versions

    def cast_input(self, x: torch.Tensor) -> torch.Tensor:
        """What was noted as the cast of a tensor, where it was that tensor and is unchanged; itself otherwise."""
        source, version, cast = self._input or (None, 0, x)
        return cast if source is x and version == x._version else x

    def cast(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight as autocast would cast it; itself where it would not, or where the weight learns."""
        device = weight.device.type
        if weight.requires_grad or not torch.is_autocast_enabled(device):
            return weight
        dtype = torch.get_autocast_dtype(device)
        source, version, cast = self._casts.get(id(weight), (None, 0, weight))
        if source is not weight or version != weight._version or cast.dtype != dtype:
            cast = weight.detach().to(dtype)
            self._casts[id(weight)] = weight, weight._version, cast
        return cast


_casts: ContextVar[CastWeights | None] = ContextVar("ahn_cast_weights", default=None)


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
        if is_ours(module):
            del module.forward


def is_ours(module: nn.Module) -> bool:
    """Whether the forward that a module has of its own is that of `speed_up`."""
    forward: Any = vars(module).get("forward")
    return isinstance(forward, partial) and forward.func is _forward


def _forward(linear: nn.Linear, input: torch.Tensor) -> torch.Tensor:  # the name that nn.Linear gives it
    size = linear.in_features
    if not torch.compiler.is_compiling() and _decodes.get() and native.can_multiply(input.numel() // size, size):
        bias = [] if linear.bias is None else [linear.bias]
        if native.ready(input, linear.weight, *bias) and linear.weight.is_contiguous():
            return native.linear(input, linear.weight, linear.bias)
    casts = _casts.get()
    if casts is None:
        return functional.linear(input, linear.weight, linear.bias)
    return functional.linear(casts.cast_input(input), casts.cast(linear.weight), linear.bias)
