"""The hooks of a model with a memory: what happens before a call, before each layer, and after the call.

They find what is attached on the module they are called for, not in a closure, so that a copied model has its own.
A call is all or nothing for its cache: what it changes is kept once the call, head included, has come to its end.
"""

from __future__ import annotations

import inspect
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from ahn.anchors.selection import Selection
from ahn.attachment import Attachment, attachment_of
from ahn.attention import chunks
from ahn.attention.call import CURRENT, CacheUse, Call, LayerCall
from ahn.attention.decoding import begin_step
from ahn.attention.masks import CallMask, find_padding
from ahn.backbone import compat, linear
from ahn.backbone.rotary import Rotary
from ahn.cache import HippocampalCache
from ahn.cache.cache import check_cache
from ahn.config import RunSettings
from ahn.errors import CacheError
from ahn.tokens import Padding

CHUNK = "ahn_chunk_of"
"""Argument that names the long call to which a chunk belongs."""

_HAS_HEAD: ContextVar[bool] = ContextVar("ahn_has_head", default=False)


def before_model(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before the whole model, head included: from now on its cache waits for the head."""
    _HAS_HEAD.set(True)
    if (cache := _given_cache(args, kwargs)) is not None:
        cache.settle()


def after_model(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """After the whole model, also where it failed: keeps what was read, or takes it back."""
    _HAS_HEAD.set(False)
    if (cache := _given_cache(args, kwargs)) is None:
        return
    if output is None:
        cache.rollback()
    else:
        cache.settle()


def before_call(backbone: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Starts a call: finds its cache, settings and padding. The hook of the stack of layers."""
    kwargs = dict(_named(backbone, args, kwargs))
    whole: Call | None = kwargs.pop(CHUNK, None)
    if whole is not None:
        call = whole.chunk()
        call.token = CURRENT.set(call)
    else:
        call, kwargs = _begin(backbone, kwargs)
        call.token = CURRENT.set(call)
        kwargs = _read_first_chunks(backbone, call, kwargs)
    inputs = _inputs(kwargs)
    if call.cache is not None and inputs is not None:
        _prepare(call, call.cache, inputs.size(1))
    linear.note_call(call.step is not None)
    return (), kwargs


def after_call(backbone: Any, args: Any, output: Any) -> Any:
    """The hook that ends a call, also one that failed."""
    call = CURRENT.get()
    if call is None or call.token is None or call.attachment is not attachment_of(backbone):
        return None
    CURRENT.reset(call.token)
    call.token = None
    if output is not None and call.step is not None:
        call.step.close()
    if output is not None and call.selection is not None:
        call.selection.close()
    if call.is_chunk or call.cache is None:
        return None
    if output is None:
        call.cache.rollback()
        return None
    call.cache.end_call()
    if call.cache_use == "returned" or (call.cache_use == "given" and not _HAS_HEAD.get()):
        call.cache.settle()
    return _whole_output(call, call.cache, output)


def before_layer(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Sends along what the attention function needs: the call, gates of the new tokens, positions."""
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, CallMask):
        return None
    return args, {**kwargs, "ahn": layer_call(module, mask.call, args, kwargs)}


def layer_call(module: Any, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerCall | None:
    """One layer in a call; `None` for a layer without a memory.

    Args:
        module: The layer.
        call: The call.
        args: Arguments of the layer.
        kwargs: More of them, by name; the check after attaching saw those that are needed.
    """
    site = call.attachment.sites[module.layer_idx]
    if site.memory is None:
        return None
    hidden = args[0] if args else kwargs["hidden_states"]
    gates = site.memory.gates(hidden) if call.settings.mode == "ahn" and call.step is None else None
    rotary = None
    if site.rotation is not None:
        unrotates = call.attachment.config.memory_positions == "none"
        rotary = Rotary(site.rotation, kwargs["position_embeddings"], kwargs["position_ids"], unrotates)
    return LayerCall(site, site.memory, call, hidden, gates, rotary)


def _named(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a module's forward by name."""
    return {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs} if args else kwargs


def _given_cache(args: tuple[Any, ...], kwargs: dict[str, Any]) -> HippocampalCache | None:
    return next((each for each in (*args, *kwargs.values()) if isinstance(each, HippocampalCache)), None)


def _inputs(kwargs: dict[str, Any]) -> Any:
    """Ids or embeddings of a call, whichever it was given."""
    return kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")


def _begin(backbone: Any, kwargs: dict[str, Any]) -> tuple[Call, dict[str, Any]]:
    """A call, and its arguments with its cache."""
    attachment, inputs, cache = attachment_of(backbone), _inputs(kwargs), compat.find_cache(kwargs)
    settings = _settings(attachment, cache)
    call = Call(attachment, settings, None)
    if settings.mode != "full" and inputs is not None:
        if cache is None:
            call.cache_use = _use_of_new_cache(backbone, kwargs)
            if call.cache_use == "returned" or settings.has_anchors:
                cache = HippocampalCache(attachment.sites[0].module)
        if isinstance(cache, HippocampalCache):
            call.cache = cache
            cache.settle()
        call.padding = _padding(call, inputs, kwargs.get("attention_mask"))
        if call.cache is not None:
            call.cache.begin_call()
            call.cache.padding = call.padding
    return call, compat.with_cache(backbone, kwargs, cache)


def _settings(attachment: Attachment, cache: Any) -> RunSettings:
    """Settings of a call: those of its cache; one that the base model made was made by full attention."""
    if isinstance(cache, HippocampalCache):
        if cache.attachment is not attachment:
            raise CacheError("this cache was made for another model, or before the memory was attached anew")
        return cache.settings
    settings = attachment.settings
    if cache is None or settings.mode == "full":
        return settings
    if cache.get_seq_length() == 0:
        check_cache(cache)
    return RunSettings(settings.window, settings.sinks, mode="full")


def _use_of_new_cache(backbone: Any, kwargs: dict[str, Any]) -> CacheUse:
    """What the caller, who gave no cache, knows of one; noted in the arguments too."""
    wanted = kwargs.get("use_cache")
    wanted = backbone.config.use_cache and not backbone.training if wanted is None else wanted
    kwargs["use_cache"] = wanted
    return "returned" if wanted else "hidden"


def _padding(call: Call, inputs: torch.Tensor, mask: Any) -> Padding | None:
    """Checks that a call can be read, and finds the padding of its rows."""
    cache, (batch, new) = call.cache, inputs.shape[:2]
    seen, known = (0, None) if cache is None else (cache.seen_tokens, cache.padding)
    if cache is not None and (held := cache.rows) not in (None, batch):
        raise CacheError(f"the cache holds {held} rows, but the input has {batch}; start a new cache or keep the batch")
    limit = call.attachment.position_limit
    if limit is not None and seen + new > limit:
        raise CacheError(f"this model has positions for {limit} tokens only and cannot read {seen + new}")
    if mask is None:
        return known
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        raise CacheError('a memory reads with a 2D attention mask; for a custom mask use ahn.mode(model, "full")')
    return find_padding(mask, new, known, seen, kept=call.cache_use != "hidden")


def _prepare(call: Call, cache: HippocampalCache, new: int) -> None:
    """What is done before the layers read new tokens into a cache."""
    if call.has_gradients:
        call.before = cache.snapshots()
    if cache.scoreboard is not None:
        call.selection = Selection(cache.scoreboard, cache.get_seq_length(), new, call.padding)
    call.step = begin_step(cache, new)


def _read_first_chunks(backbone: Any, call: Call, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Reads all of a long call but its last chunk, whose arguments are returned."""
    cache, inputs = call.cache, _inputs(kwargs)
    if cache is None or cache.scoreboard is None or inputs is None:
        return kwargs
    longest = cache.scoreboard.longest_call
    if inputs.size(1) <= longest:
        return kwargs
    _check_checkpointing(backbone, call)
    wanted = kwargs.get("return_dict")
    call.returns_tuple = (backbone.config.return_dict if wanted is None else wanted) is False
    *first, last = chunks.cut_all({**kwargs, "return_dict": True}, cache.get_seq_length(), longest)
    for chunk in first:
        output = backbone(**chunk, **{CHUNK: call})
        call.chunk_outputs.append((output, cache.get_seq_length()))
    return last


def _check_checkpointing(backbone: Any, call: Call) -> None:
    """Refuses what would lose keys: transformers takes the cache from layers that it runs again.

    Raises:
        CacheError: Layers without a memory, which read their keys from the cache, are run again.
    """
    again = any(getattr(m, "gradient_checkpointing", False) is True and m.training for m in backbone.modules())
    if call.has_gradients and call.attachment.keeps_base_layers and again:
        raise CacheError(
            "with anchors, a long text is read in chunks, which activation checkpointing cuts off from each other in "
            "layers without a memory; train without anchors, without checkpointing, or with a memory in every layer"
        )


def _whole_output(call: Call, cache: HippocampalCache, output: Any) -> Any:
    """The output that the caller of a call gets; `None` where it is the model's own."""
    if call.chunk_outputs:
        output = chunks.join([*call.chunk_outputs, (output, cache.get_seq_length())])
    elif call.cache_use != "hidden":
        return None
    if call.cache_use == "hidden":
        output = chunks.without(output, cache)
    return output.to_tuple() if call.returns_tuple else output
