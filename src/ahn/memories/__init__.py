"""The memories by name. A new one is one file and one line of `MEMORIES`."""

from __future__ import annotations

from ahn.errors import ConfigError
from ahn.memories.base import Gating, Memory, MemoryShape
from ahn.memories.delta_net import DeltaNet
from ahn.memories.gated_delta_net import GatedDeltaNet
from ahn.memories.mamba2 import Mamba2

__all__ = ["MEMORIES", "Gating", "Memory", "MemoryShape", "build_memory", "memory_names"]

MEMORIES: dict[str, type[Memory]] = {
    "gated_delta_net": GatedDeltaNet,
    "delta_net": DeltaNet,
    "mamba2": Mamba2,
}


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
    if name not in MEMORIES:
        raise ConfigError(f"unknown memory {name!r}; known are {', '.join(MEMORIES)}")
    return MEMORIES[name](shape)
