"""Everything that leans on an internal of transformers, each with the version it was written for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.generation.configuration_utils import GenerationMode

from ahn.cache import HippocampalCache
from ahn.cache.cache import refuse_assisted_decoding
from ahn.errors import CacheError


def set_implementation(config: Any, name: str | None) -> None:
    """Sets the attention implementation of one config and of no other (5.23: the setter also reaches sub-configs)."""
    config._attn_implementation_internal = name


def attention_configs(backbone: nn.Module) -> Iterator[Any]:
    """Every distinct config that modules of a model ask for their attention implementation."""
    seen: set[int] = set()
    for module in backbone.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation") and id(config) not in seen:
            seen.add(id(config))
            yield config


def make_generate_use_memory(model: Any) -> None:
    """Lets `model.generate` start from a `HippocampalCache` (5.23: `_prepare_cache_for_generation` makes the cache)."""
    original = type(model)._prepare_cache_for_generation

    def prepare(generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, *rest: Any) -> None:
        attachment = model.__dict__["_ahn_attachment"]
        given = model_kwargs.get("past_key_values")
        if (given is None and attachment.settings.mode == "full") or (given is not None and not _is_ours(given)):
            original(model, generation_config, model_kwargs, generation_mode, *rest)
            return
        if generation_mode == GenerationMode.ASSISTED_GENERATION:
            refuse_assisted_decoding()
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise CacheError(
                f"cache_implementation={generation_config.cache_implementation!r} would replace the memory's cache; "
                'leave it out, or generate inside ahn.mode(model, "full")'
            )
        if given is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = HippocampalCache(model)
        else:
            original(model, generation_config, model_kwargs, generation_mode, *rest)

    model.__dict__["_prepare_cache_for_generation"] = prepare


def restore_generate(model: Any) -> None:
    """Undoes `make_generate_use_memory`."""
    model.__dict__.pop("_prepare_cache_for_generation", None)


def _is_ours(cache: Any) -> bool:
    return isinstance(cache, HippocampalCache)


def input_device(backbone: Any) -> torch.device:
    """Device of the input embeddings, where a text enters the model."""
    device: torch.device = backbone.get_input_embeddings().weight.device
    return device
