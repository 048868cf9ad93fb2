"""The hooks of a model with a memory: what happens before a call, before each layer, and after the call.

They find what is attached on the module they are called for, not in a closure, so that a copied model has its own.
A call is all or nothing for its cache: what it changes is kept once the call, head included, has come to its end.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from ahn.anchors.selection import Selection
from ahn.attachment import Attachment, attachment_of
from ahn.attention import chunks
from ahn.attention.call import CURRENT, CacheUse, Call, LayerCall
from ahn.attention.decoding import begin_step
from ahn.attention.host import (
    HostMask,
    check_attached,
    check_outputs,
    check_tokens,
    document_starts,
    without_lengths,
)
from ahn.attention.masks import CallMask, find_padding, mask_of_call
from ahn.backbone import compat, linear
from ahn.backbone.rotary import Rotary
from ahn.cache import HippocampalCache
from ahn.cache.cache import check_cache
from ahn.config import RunSettings
from ahn.errors import CacheError
from ahn.tokens import Padding

CHUNK = "ahn_chunk_of"
"""Argument that names the long call to which a chunk belongs."""

_READ_IN_FULL: WeakSet[Any] = WeakSet()
"""Caches of the base model that were filled in mode "full", and keep that mode as ours keep theirs."""

_HAS_HEAD: ContextVar[bool] = ContextVar("ahn_has_head", default=False)


def before_model(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Before the whole model, head included: from now on its cache waits for the head."""
    _HAS_HEAD.set(True)
    attachment = attachment_of(model)
    if (broken_off := CURRENT.get()) is not None and broken_off.attachment is attachment:
        CURRENT.set(None)  # by Ctrl-C, after which torch runs no hook
    if (cache := _given_cache(args, kwargs)) is not None:
        cache.settle()
        return None
    if not attachment.is_wrapped or attachment.settings.mode == "full" or compat.find_cache(kwargs) is not None:
        return None
    wanted = kwargs.get("use_cache")
    if not (model.config.get_text_config().use_cache and not model.training if wanted is None else wanted):
        return None
    # A wrapper would make a cache of its own before its text model runs.
    return args, compat.with_cache(model, kwargs, HippocampalCache(model))


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
        documents, kwargs, returns_tuple = _read_first_documents(backbone, kwargs)
        call, kwargs = _begin(backbone, kwargs)
        call.documents, call.returns_tuple = documents, returns_tuple
        kwargs = _with_own_masks(call, kwargs)
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
    in_full = call.settings.mode == "full" and isinstance(output, Mapping)
    if in_full and (cache := compat.find_cache(output)) is not None:
        _READ_IN_FULL.add(cache)
    if output is not None and call.step is not None:
        call.step.close()
    if output is not None and call.selection is not None:
        call.selection.close()
    if call.is_chunk:
        return None
    if call.cache is not None:
        _end(call, call.cache, output)
    return None if output is None else _whole_output(call, output)


def _end(call: Call, cache: HippocampalCache, output: Any) -> None:
    """Keeps what a call has read, at once or when its head has run too; takes it back where the call failed."""
    if output is None:
        cache.rollback()
        return
    cache.end_call()
    if call.cache_use == "returned" or (call.cache_use == "given" and not _HAS_HEAD.get()):
        cache.settle()


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
    layer = call.attachment.layers[module.layer_idx]
    if layer.memory is None:
        return None
    hidden = args[0] if args else kwargs["hidden_states"]
    gates = None
    if call.settings.mode == "ahn" and call.step is None:
        with compat.loaded(layer.memory):
            gates = layer.memory.gates(hidden)
    rotary = None
    if layer.rotation is not None:
        unrotates = call.attachment.config.memory_positions == "none"
        rotary = Rotary(layer.rotation, kwargs["position_embeddings"], kwargs["position_ids"], unrotates)
    return LayerCall(layer, layer.memory, call, hidden, gates, rotary)


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
    if settings.mode == "full" and cache is not None:
        _READ_IN_FULL.add(cache)
    if settings.mode != "full" and inputs is not None:
        check_tokens(inputs.size(1), 0 if cache is None else cache.get_seq_length())
        check_attached(attachment)
        check_outputs(backbone, kwargs)
        if cache is None:
            call.cache_use = _use_of_new_cache(backbone, kwargs)
            if call.cache_use == "returned" or settings.has_anchors:
                cache = HippocampalCache(attachment.layers[0].module)
        if isinstance(cache, HippocampalCache):
            call.cache = cache
            cache.settle()
        call.padding = _padding(call, inputs, _padding_mask(kwargs.get("attention_mask")))
        if call.cache is not None:
            call.cache.begin_call()
            call.cache.padding = call.padding
    return call, compat.with_cache(backbone, kwargs, cache)


def _settings(attachment: Attachment, cache: Any) -> RunSettings:
    """Settings of a call: those of its cache, which is full attention for one that was filled so."""
    if isinstance(cache, HippocampalCache):
        if cache.attachment is not attachment:
            raise CacheError("this cache was made for another model, or before the memory was attached anew")
        return cache.settings
    settings = attachment.settings
    if cache is None or settings.mode == "full":
        return settings
    if cache in _READ_IN_FULL:
        return RunSettings(settings.window, settings.sinks, mode="full")
    if cache.get_seq_length() > 0:
        raise CacheError(
            f"this {type(cache).__name__} was filled without the memory, before it was attached or by prefix tuning: "
            'read its text into ahn.HippocampalCache(model), or go on inside ahn.mode(model, "full")'
        )
    check_cache(cache)
    return settings


def _use_of_new_cache(backbone: Any, kwargs: dict[str, Any]) -> CacheUse:
    """What the caller, who gave no cache, knows of one; noted in the arguments too."""
    kwargs["use_cache"] = _wants_cache(backbone, kwargs)
    return "returned" if kwargs["use_cache"] else "hidden"


def _wants_cache(backbone: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a call that is given no cache shall return one."""
    wanted = kwargs.get("use_cache")
    return bool(backbone.config.use_cache and not backbone.training if wanted is None else wanted)


def _wants_tuple(backbone: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a call shall return a tuple."""
    wanted = kwargs.get("return_dict")
    return (backbone.config.return_dict if wanted is None else wanted) is False


def _padding(call: Call, inputs: torch.Tensor, mask: Any) -> Padding | None:
    """Checks that a call can be read, and finds the padding of its rows."""
    cache, (batch, new) = call.cache, inputs.shape[:2]
    seen, known = (0, None) if cache is None else (cache.seen_tokens, cache.padding)
    if cache is not None and (rows := cache.rows) not in (None, batch):
        raise CacheError(f"the cache holds {rows} rows, but the input has {batch}; start a new cache or keep the batch")
    limit = call.attachment.position_limit
    if limit is not None and seen + new > limit:
        raise CacheError(f"this model has positions for {limit} tokens only and cannot read {seen + new}")
    if mask is None:
        return known
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        raise CacheError('a memory reads with a 2D attention mask; for a custom mask use ahn.mode(model, "full")')
    return find_padding(mask, new, known, seen, has_cache=call.cache_use != "hidden")


def _prepare(call: Call, cache: HippocampalCache, new: int) -> None:
    """What is done before the layers read new tokens into a cache."""
    if call.has_gradients:
        call.snapshots = cache.snapshots()
    if cache.scoreboard is not None:
        call.selection = Selection(cache.scoreboard, cache.get_seq_length(), new, call.padding)
    call.step = begin_step(cache, new, call.selection)


def _read_first_chunks(backbone: Any, call: Call, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Reads all of a long call but its last chunk, whose arguments are returned."""
    cache, inputs = call.cache, _inputs(kwargs)
    if cache is None or cache.scoreboard is None or inputs is None:
        return kwargs
    longest = cache.scoreboard.longest_call
    if inputs.size(1) <= longest:
        return kwargs
    _check_checkpointing(backbone, call)
    call.returns_tuple = call.returns_tuple or _wants_tuple(backbone, kwargs)
    *first, last = chunks.cut_all({**kwargs, "return_dict": True}, cache.get_seq_length(), longest)
    for chunk in first:
        output = backbone(**chunk, **{CHUNK: call})
        call.chunk_outputs.append(output)
    return last


def _check_checkpointing(backbone: Any, call: Call) -> None:
    """Refuses what would lose keys: transformers takes the cache from layers that it runs again."""
    again = any(getattr(m, "gradient_checkpointing", False) is True and m.training for m in backbone.modules())
    if call.has_gradients and call.attachment.keeps_base_layers and again:
        raise CacheError(
            "with anchors, a long text is read in chunks, which activation checkpointing cuts off from each other in "
            "layers without a memory; train without anchors, without checkpointing, or with a memory in every layer"
        )


def _with_own_masks(call: Call, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call with the masks that a wrapper asked for before it; a memory reads by their padding."""
    host_mask = kwargs.get("attention_mask")
    masks = host_mask if isinstance(host_mask, Mapping) else {"": host_mask}
    if not any(isinstance(mask, HostMask) for mask in masks.values()):
        return kwargs
    result = {
        name: mask_of_call(call, mask.arguments) if isinstance(mask, HostMask) else mask for name, mask in masks.items()
    }
    return {**kwargs, "attention_mask": result if isinstance(host_mask, Mapping) else result[""]}


def _padding_mask(host_mask: Any) -> Any:
    """The mask of padding in what a call was given: that of a wrapper's masks, or the given one itself."""
    mask = next(iter(host_mask.values()), None) if isinstance(host_mask, Mapping) else host_mask
    return mask.arguments.get("attention_mask") if isinstance(mask, HostMask) else host_mask


def _read_first_documents(backbone: Any, kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any], bool]:
    """Reads all documents of packed rows but the last: none sees another.

    Returns:
        Their outputs; the arguments of the last one, or those of a call that is not packed; whether a tuple is wanted.
    """
    inputs, cache = _inputs(kwargs), compat.find_cache(kwargs)
    is_plain = inputs is not None and cache is None and kwargs.get("attention_mask") is None
    if not is_plain or attachment_of(backbone).settings.mode == "full" or _wants_cache(backbone, kwargs):
        return [], kwargs, False
    starts = document_starts(kwargs, inputs.size(1))
    if len(starts) == 1:
        return [], kwargs, False
    returns_tuple = _wants_tuple(backbone, kwargs)
    kwargs = {**without_lengths(kwargs), "return_dict": True, "use_cache": False}
    *first, last = chunks.cut_at(kwargs, [*starts[1:], inputs.size(1)])
    return [backbone(**document) for document in first], last, returns_tuple


def _whole_output(call: Call, output: Any) -> Any:
    """The output that the caller of a call gets; `None` where it is the model's own."""
    hides_cache = call.cache is not None and call.cache_use == "hidden"
    if not (call.chunk_outputs or call.documents or hides_cache):
        return None
    if call.chunk_outputs:
        output = chunks.join([*call.chunk_outputs, output])
    if hides_cache:
        output = chunks.without(output, call.cache)
    if call.documents:
        output = chunks.join([*call.documents, output])
    return output.to_tuple() if call.returns_tuple else output
