"""What modules compute with, noted once and compared before every token: a token of a small model is short."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ahn.backbone import compat
from ahn.quantization import QuantizedLinear


class ModuleState:
    """All that the result of modules depends on: themselves, their tensors, factors and forwards, and their hooks.

    Args:
        layer: The module that holds them.
        parts: Modules, each with its parent and its name there.
        others: Modules of which the tensors and factors count only.
    """

    def __init__(
        self, layer: nn.Module, parts: Sequence[tuple[nn.Module, str, nn.Module]], others: Sequence[nn.Module]
    ) -> None:
        children = [child for *_, child in parts]
        held = [*children, *others]
        tensors = {id(tensor): (own, name, tensor) for child in held for own, name, tensor in _tensors(child)}
        self._tensors = _Entries([(own, name) for own, name, _ in tensors.values()])
        self._addresses = [tensor.data_ptr() for *_, tensor in tensors.values()]
        modules = [(parent._modules, name) for parent, name, _ in parts]
        self._settings = _Entries([*modules, *(entry for child in held for entry in _settings(child))])
        self._originals = self._settings.contents()
        self._classes = list({type(each) for each in (layer, *children)})
        self._forwards = [each.forward for each in self._classes]
        self._hooks = [(child._forward_pre_hooks, child._forward_hooks, child) for child in children]
        self._hook_lists = [hooks for pre_hooks, post_hooks, _ in self._hooks for hooks in (pre_hooks, post_hooks)]

    def is_same(self) -> bool:
        """Whether no module was replaced, computes otherwise or was given other tensors since."""
        if self._settings.contents() != self._originals or [each.forward for each in self._classes] != self._forwards:
            return False
        try:
            return list(map(torch.Tensor.data_ptr, self._tensors.contents())) == self._addresses
        except TypeError:  # of a tensor that is there no more
            return False

    def is_free(self) -> bool:
        """Whether no hook of others is on a module."""
        if not any(self._hook_lists):
            return True
        for pre_hooks, post_hooks, module in self._hooks:
            if pre_hooks and not all(map(compat.is_hook_of_ours, pre_hooks.values())):
                return False
            if post_hooks and not compat.only_captures(module):
                return False
        return True


class _Entries:
    """Places in dictionaries, which are looked at together: this happens in every layer for every token.

    Args:
        entries: Each dictionary with a name in it.
    """

    def __init__(self, entries: list[tuple[dict[str, Any], str]]) -> None:
        self._holders, self._names = [holder for holder, _ in entries], [name for _, name in entries]

    def contents(self) -> list[Any]:
        """What they hold, `None` where that is nothing."""
        return list(map(dict.get, self._holders, self._names))


def _settings(module: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """Where a module holds what its result depends on beside its tensors: a forward, missing weights, factors."""
    yield vars(module), "forward"
    yield from ((module._parameters, name) for name, each in module._parameters.items() if each is None)
    yield from ((vars(module), name) for name, each in vars(module).items() if isinstance(each, float))


def _tensors(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, torch.Tensor]]:
    """The tensors that a module holds, with where it holds them; one of a stored weight, whose parts move together."""
    yield from ((module._parameters, name, each) for name, each in module._parameters.items() if each is not None)
    if isinstance(module, QuantizedLinear):
        name, tensor = next(module.stored.named_buffers())
        yield module.stored._buffers, name, tensor
