"""The memories by name. A new one is one file and one line of `MEMORIES`.

A memory is imported when one is built: who only asks for names need not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ahn.errors import ConfigError

if TYPE_CHECKING:
    from ahn.memories.base import Gating, Memory, MemoryShape

__all__ = ["MEMORIES", "Gating", "Memory", "MemoryShape", "build_memory", "memory_class", "memory_names"]


MEMORIES: dict[str, str | type[Memory]] = {
    "gated_delta_net": "GatedDeltaNet",
    "delta_net": "DeltaNet",
    "mamba2": "Mamba2",
    "linearized_attention": "LinearizedAttention",
}
"""Each memory's class, or the name of its class in the module that is called like the memory."""


def memory_names() -> tuple[str, ...]:
    """Names that `AHNConfig(memory=...)` takes."""
    return tuple(MEMORIES)


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
    if name not in MEMORIES:
        raise ConfigError(f"unknown memory {name!r}; known are {', '.join(MEMORIES)}")
    kind = MEMORIES[name]
    if isinstance(kind, str):
        kind = getattr(importlib.import_module(f"ahn.memories.{name}"), kind)
    found: type[Memory] = kind
    return found


def __getattr__(name: str) -> Any:
    if name in ("Gating", "Memory", "MemoryShape"):
        return getattr(importlib.import_module("ahn.memories.base"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
