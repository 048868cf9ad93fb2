"""The hooks of a model with a memory: what happens before a call, before each layer, and after the call.

They find what is attached on the module they are called for, not in a closure, so that a copied model has its own.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from ahn import _compat, linears
from ahn.attachment import Attachment, Site, attachment_of
from ahn.attention import LayerCall
from ahn.cache import HippocampalCache, HippocampalLayer, Padding
from ahn.cache.anchors import Ballot, Election
from ahn.cache.cache import check_cache, new_cascade
from ahn.config import RunSettings
from ahn.decoding import begin_step
from ahn.errors import CacheError
from ahn.foreseen import foreseen_election, is_foreseen
from ahn.pieces import joined, read_first_pieces
from ahn.plan import CURRENT, Plan, find_padding
from ahn.positions import Rotary


def before_call(backbone: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Starts a call: finds its cache, settings and padding. The hook of the stack of layers."""
    attachment = attachment_of(backbone)
    if args:
        kwargs = {**dict(zip(_parameter_names(backbone), args, strict=False)), **kwargs}
    inputs = _inputs(kwargs)
    cache, padding = _compat.find_cache(kwargs), None
    settings = _settings(attachment, cache)
    if settings.mode != "full" and inputs is not None:
        if cache is None:
            cache = _new_cache(attachment, backbone, kwargs, settings.has_anchors and not is_foreseen())
        padding = _padding(attachment, cache, inputs, kwargs.get("attention_mask"))
    kwargs = _compat.with_cache(backbone, kwargs, cache)
    plan = Plan(attachment, settings, padding)
    if settings.has_anchors and cache is None:
        plan.election = foreseen_election(attachment, settings, padding)
    if isinstance(cache, HippocampalCache) and cache.ballot is not None and inputs is not None:
        plan.before, kwargs = read_first_pieces(backbone, cache.seen_tokens, cache.ballot.longest_call, kwargs)
        cache.padding = padding  # of which the pieces saw their parts
        plan.election = _election(cache, cache.ballot, _inputs(kwargs).size(1))
    if isinstance(cache, HippocampalCache) and inputs is not None:
        plan.step = begin_step(cache, _inputs(kwargs).size(1))
    linears.note_call(plan.step is not None)
    plan.token = CURRENT.set(plan)
    return (), kwargs


def after_call(backbone: Any, args: Any, output: Any) -> Any:
    """The hook that ends a call, also one that failed."""
    plan = CURRENT.get()
    if plan is None or plan.token is None:
        return None
    CURRENT.reset(plan.token)
    if output is not None and plan.step is not None:
        plan.step.close(plan.election)
    if output is not None and plan.election is not None and plan.election.votes:
        plan.election.close()
    return joined([*plan.before, output]) if output is not None and plan.before else None


def _inputs(kwargs: dict[str, Any]) -> Any:
    """Ids or embeddings of a call, whichever it was given."""
    return kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")


def _election(cache: HippocampalCache, ballot: Ballot, new: int) -> Election:
    """The election of a call, whose choice is made before it begins."""
    seen = cache.seen_tokens
    return Election(ballot, seen, ballot.choose(seen, new, cache.padding))


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
    return RunSettings("full", settings.window, settings.sinks)


def _new_cache(attachment: Attachment, backbone: Any, kwargs: dict[str, Any], needed: bool) -> HippocampalCache | None:
    """Makes the cache of a call that was given none, if one is wanted, or needed inside the call."""
    wanted = kwargs.get("use_cache")
    wanted = backbone.config.use_cache and not backbone.training if wanted is None else wanted
    kwargs["use_cache"] = wanted
    return HippocampalCache(_holder(attachment)) if wanted or needed else None


def _padding(attachment: Attachment, cache: HippocampalCache | None, inputs: torch.Tensor, mask: Any) -> Padding | None:
    """Checks that a call can be read and finds the padding of its rows, which its cache keeps."""
    seen = cache.seen_tokens if cache is not None else 0
    batch, new = inputs.shape[:2]
    _check_call(attachment, cache, batch, seen + new)
    if mask is None:
        return cache.padding if cache is not None else None
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        raise CacheError('a memory reads with a 2D attention mask; for a custom mask use ahn.mode(model, "full")')
    padding = find_padding(mask, new, cache.padding if cache is not None else None, seen, kept=cache is not None)
    if cache is not None:
        cache.padding = padding
    return padding


def _check_call(attachment: Attachment, cache: HippocampalCache | None, batch: int, total: int) -> None:
    if cache is not None and (held := cache.rows) not in (None, batch):
        raise CacheError(f"the cache holds {held} rows, but the input has {batch}; start a new cache or keep the batch")
    limit = attachment.position_limit
    if limit is not None and total > limit:
        raise CacheError(f"this model has positions for {limit} tokens only and cannot read {total}")


def _holder(attachment: Attachment) -> nn.Module:
    """A module that `HippocampalCache` recognises as having this attachment."""
    return attachment.sites[0].module


def before_layer(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Sends along what the attention function needs: gates of the new tokens, the store, positions."""
    plan = kwargs.get("attention_mask")
    site = attachment_of(module).sites[module.layer_idx]
    if not isinstance(plan, Plan) or site.memory is None:
        return None
    hidden = args[0] if args else kwargs["hidden_states"]
    gates = site.memory.gates(hidden) if plan.settings.mode == "ahn" and plan.step is None else None
    store = _store(_compat.find_cache(kwargs), site)
    kept = store is not None
    store = store or new_cascade(site, site.memory, plan.settings)
    rotary = _rotary(site, kwargs, plan)
    return args, {**kwargs, "ahn": LayerCall(site, site.memory, plan, store, kept, hidden, gates, rotary)}


def _store(cache: Any, site: Site) -> HippocampalLayer | None:
    """The layer's cascade in the cache of the call, or `None` where no cache is kept."""
    layer = cache.cascades[site.index] if isinstance(cache, HippocampalCache) else None
    return layer if isinstance(layer, HippocampalLayer) else None


def _rotary(site: Site, kwargs: dict[str, Any], plan: Plan) -> Rotary | None:
    """The rotation of the new tokens, where something asks to undo it; the check after attaching saw both inputs."""
    if site.rotation is None:
        return None
    unrotates = plan.attachment.config.memory_positions == "none"
    return Rotary(site.rotation, kwargs["position_embeddings"], kwargs["position_ids"], unrotates)


def _parameter_names(module: nn.Module) -> list[str]:
    return list(inspect.signature(module.forward).parameters)
