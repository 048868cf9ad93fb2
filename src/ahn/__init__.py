"""A fixed-size long-term memory for any pretrained decoder language model."""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ahn.attachment import mode
    from ahn.cache import HippocampalCache
    from ahn.checkpoint import from_pretrained, load, load_anchors, push_to_hub, save, save_anchors
    from ahn.config import AHNConfig
    from ahn.errors import AHNError
    from ahn.surgery import attach, attached, detach

__all__ = [
    "AHNConfig",
    "AHNError",
    "HippocampalCache",
    "__version__",
    "attach",
    "attached",
    "detach",
    "from_pretrained",
    "load",
    "load_anchors",
    "mode",
    "push_to_hub",
    "save",
    "save_anchors",
]

_ROOMS = {
    "AHNConfig": "config",
    "AHNError": "errors",
    "HippocampalCache": "cache",
    "attach": "surgery",
    "attached": "surgery",
    "detach": "surgery",
    "from_pretrained": "checkpoint",
    "load": "checkpoint",
    "load_anchors": "checkpoint",
    "mode": "attachment",
    "push_to_hub": "checkpoint",
    "save": "checkpoint",
    "save_anchors": "checkpoint",
}


def __getattr__(name: str) -> object:
    """Imports a public name when it is first used, so that `ahn --help` need not wait for torch."""
    if name not in _ROOMS:
        raise AttributeError(f"module 'ahn' has no attribute {name!r}")
    if name in ("attach", "attached"):
        importlib.import_module("ahn.checkpoint")  # by which `model.save_pretrained` writes the memory too
    value = getattr(importlib.import_module(f"ahn.{_ROOMS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
