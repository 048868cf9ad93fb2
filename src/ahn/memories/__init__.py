"""The memories by name. A new one is one file and one line of `MEMORIES`.

Several names joined by `+` share the layers: `gated_delta_net+linearized_attention` is Gated DeltaNet in the lower half
of the layers and linearised attention in the upper half.

A memory is imported when one is built: who only asks for names need not wait for torch.
"""

from __future__ import annotations

import importlib
import reprlib
from typing import TYPE_CHECKING, Any

from ahn.errors import ConfigError

if TYPE_CHECKING:
    from ahn.memories._parts import Gating
    from ahn.memories.base import Memory, MemoryShape

__all__ = [
    "MEMORIES",
    "Gating",
    "Memory",
    "MemoryShape",
    "build_memory",
    "memory_class",
    "memory_kinds",
    "memory_names",
    "split_names",
]


MEMORIES: dict[str, str | type[Memory]] = {
    "gated_delta_net": "GatedDeltaNet",
    "delta_net": "DeltaNet",
    "mamba2": "Mamba2",
    "linearized_attention": "LinearizedAttention",
}
"""Each memory's class, or the name of its class in the module that is called like the memory."""


def memory_names() -> tuple[str, ...]:
    """Names that `AHNConfig(memory=...)` takes, alone or joined by `+`."""
    return tuple(MEMORIES)


def split_names(memory: str) -> list[str]:
    """The names in `AHNConfig(memory=...)`, from the lowest layers to the highest.

    Args:
        memory: One of `memory_names()`, or several joined by `+`.

    Raises:
        ConfigError: A name is unknown.
    """
    names = memory.split("+")
    for name in names:
        _find(name)
    return names


def memory_kinds(memory: str, layers: int) -> tuple[str, ...]:
    """The memory of each layer that has one, from the lowest to the highest; several share the layers evenly.

    Args:
        memory: As for `split_names`.
        layers: How many layers have a memory.

    Raises:
        ConfigError: A name is unknown, or there are more names than layers.
    """
    names = split_names(memory)
    if layers < len(names):
        few = f"{len(names)} memories, but only {layers} of the layers get one; name at most {layers}"
        raise ConfigError(f"{reprlib.repr(memory)} names {few}")
    return tuple(names[index * len(names) // layers] for index in range(layers))


def build_memory(name: str, shape: MemoryShape) -> Memory:
    """A freshly initialised memory.

    Args:
        name: One of `memory_names()`.
        shape: Sizes of the attention layer that it serves.

    Raises:
        ConfigError: The name is unknown.
    """
    return memory_class(name)(shape)


def memory_class(name: str) -> type[Memory]:
    """The class of a memory.

    Args:
        name: One of `memory_names()`.

    Raises:
        ConfigError: The name is unknown.
    """
    kind = _find(name)
    if isinstance(kind, str):
        kind = getattr(importlib.import_module(f"ahn.memories.{name}"), kind)
    found: type[Memory] = kind
    return found


def _find(name: str) -> str | type[Memory]:
    """What `MEMORIES` has for a name."""
    if name not in MEMORIES:
        raise ConfigError(f"unknown memory {reprlib.repr(name)}; known are {', '.join(MEMORIES)}")
    return MEMORIES[name]


def __getattr__(name: str) -> Any:
    if name in ("Gating", "Memory", "MemoryShape"):
        return getattr(importlib.import_module("ahn.memories.base"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
