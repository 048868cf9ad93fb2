"""Base models by name, their prompts, and the texts they read."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ahn._home import home
    from ahn.models.loading import (
        KNOWN,
        KnownModel,
        as_dtype,
        base_name,
        load_config,
        load_model,
        load_tokenizer,
        resolve,
    )

__all__ = [
    "KNOWN",
    "KnownModel",
    "as_dtype",
    "base_name",
    "home",
    "load_config",
    "load_model",
    "load_tokenizer",
    "resolve",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("ahn.models.loading"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
