"""Everything that leans on an internal of torch or transformers, each with the version it was written for."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import GenerationMixin

CACHE_NAMES = ("cache", "past_key_values")
"""Names of a cache among the arguments and outputs of a model, in any version."""
_GENERATES_FROM = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE = "cache" if "cache" in _GENERATES_FROM else "past_key_values"
"""Name under which this transformers hands a cache on (`past_key_values` before 5.24; 5.40 removes that name)."""

FUSED_GROUPS_HEADS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)
"""Whether torch's fused attention on a CPU lets query heads share a kv head; 2.6 to 2.8 read past the keys instead."""


def cache_name(model: Any) -> str:
    """Name by which a model takes a cache (5.24: code that comes from the hub with its model may keep the old one)."""
    return _cache_name(type(model).forward)


@functools.lru_cache
def _cache_name(forward: Callable[..., Any]) -> str:
    """The name for every model of a class: looking at a signature takes as long as a layer of a token."""
    parameters = inspect.signature(forward).parameters
    return next((name for name in CACHE_NAMES if name in parameters), CACHE)


def find_cache(arguments: Mapping[str, Any]) -> Any:
    """The cache among the arguments or outputs of a call, under its name of any version, or `None`."""
    # Not by `get`: an output of transformers warns of its older name.
    return next((value for name, value in arguments.items() if name in CACHE_NAMES and value is not None), None)


def with_cache(model: Any, arguments: Mapping[str, Any], cache: Any) -> dict[str, Any]:
    """The arguments of a call with this cache instead of theirs, under the one name that the model takes."""
    others = {name: value for name, value in arguments.items() if name not in CACHE_NAMES}
    return others if cache is None else {**others, cache_name(model): cache}


def generated_from(generation_config: Any, arguments: Mapping[str, Any]) -> int | None:
    """Tokens that `generate` is given with those that its cache has read (5.24 may count them instead of a mask)."""
    mask = arguments.get("attention_mask")
    known = mask.size(-1) if isinstance(mask, torch.Tensor) else getattr(generation_config, "_mask_length", None)
    return int(known) if known is not None else None


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


def unwrap(model: Any) -> Any:
    """The model of transformers inside the wrappers of DistributedDataParallel, torch.compile and peft."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):  # torch.compile
            model = inner
        elif hasattr(model, "peft_config") and callable(getattr(model, "get_base_model", None)):
            model = model.get_base_model()
        else:
            return model


def active_module(module: Any) -> Any:
    """The module that a wrapper of peft's `modules_to_save` uses now, or the module itself."""
    saved = module._modules.get("modules_to_save")  # `getattr` would search, and fail, at each layer of each token
    if not isinstance(saved, nn.ModuleDict):
        return module
    active: list[str] = [] if module.disable_adapters else module.active_adapters
    return next((saved[name] for name in active if name in saved), module.original_module)


def only_captures(module: nn.Module) -> bool:
    """Whether all hooks behind a module are those by which transformers once gave its outputs back (5.23)."""
    return all(_home_of(hook) == "transformers.utils.output_capturing" for hook in module._forward_hooks.values())


def is_hook_of_ours(hook: Any) -> bool:
    """Whether a hook is one of this library."""
    return _home_of(hook).startswith("ahn.")


def _home_of(hook: Any) -> str:
    """The module that a hook was defined in, or nothing: methods of C types have none."""
    return getattr(hook, "__module__", None) or ""


def execution_device(module: nn.Module) -> torch.device | None:
    """Device on which accelerate runs a module whose weights it keeps elsewhere, or `None` for any other module."""
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    if device is None:
        return None
    return torch.device(device if isinstance(device, (str, torch.device)) else f"cuda:{device}")


@contextlib.contextmanager
def loaded(module: nn.Module) -> Iterator[None]:
    """Has the parameters of a module itself there inside the block, if accelerate keeps them elsewhere until it runs.

    Args:
        module: A module whose parameters are used without calling it.
    """
    hook = getattr(module, "_hf_hook", None)
    if hook is None or not any(parameter.is_meta for parameter in module.parameters(recurse=False)):
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, ())


def input_device(backbone: Any) -> torch.device:
    """Device on which a text enters the model: that of the input embeddings."""
    embeddings = backbone.get_input_embeddings()
    device: torch.device = execution_device(embeddings) or embeddings.weight.device
    return device
