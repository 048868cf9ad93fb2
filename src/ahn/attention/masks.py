"""Which keys a query may read: the one rule, the padding that bends it, and additive masks that say so.

A key is visible from the query of one token until that of another. A token of the window is visible for W queries from
its own on, a sink from its own on, and an extra key as its store says. The kernels in C apply the same rule to
`ahn.native.Segment`.

Legend of shapes: B batch, S sinks, W window, N extra keys.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from ahn.attention.call import CURRENT, Call
from ahn.attention.host import HostMask, check_mask
from ahn.errors import CacheError
from ahn.tokens import NEVER, ExtraKV, Padding, VisibleKV

Index = torch.Tensor | int


def is_visible(query: Index, visible_from: Index, visible_until: Index) -> torch.Tensor:
    """Whether the query of a token reads a key.

    Args:
        query: Index of the query's token.
        visible_from: Index of the first token whose query reads the key.
        visible_until: Index of the first token whose query no longer reads it.
    """
    visible: Any = (query >= visible_from) & (query < visible_until)
    return visible  # type: ignore[no-any-return]


def read_by(extra: ExtraKV, start: int, stop: int) -> ExtraKV:
    """Those extra keys that any query from `start` to `stop` - 1 reads."""
    read = read_by_any(extra, start, stop)
    if bool(read.all()):
        return extra
    keys, values, visible_from, visible_until = extra
    return ExtraKV(keys[:, :, read], values[:, :, read], visible_from[:, read], visible_until[:, read])


def read_by_any(extra: ExtraKV, start: int, stop: int) -> torch.Tensor:
    """Whether any query from `start` to `stop` - 1 reads each extra key, in any row, `[N]`."""
    return ((extra.visible_from < stop) & (extra.visible_until > start)).any(0)


def visible_extra(extra: ExtraKV, start: int, stop: int) -> torch.Tensor:
    """Which extra keys each query from `start` to `stop` - 1 reads, `[B or 1, stop - start, N]`."""
    query = torch.arange(start, stop, device=extra.visible_from.device)[:, None]
    return is_visible(query, extra.visible_from[:, None], extra.visible_until[:, None])


def block_mask(
    call: Call, view: VisibleKV, block: tuple[int, int], keys_from: int, repeats: int, like: torch.Tensor
) -> torch.Tensor:
    """Additive mask of a block of queries over consecutive keys of the window, followed by the sinks.

    Args:
        call: The call, which keeps the mask for its other layers.
        view: What the queries may read.
        block: First and last + 1 index of the queries; the last key of the window is that of the last query.
        keys_from: Index of the first key of the window.
        repeats: How often to stack the mask, for query heads stacked on one kv head.
        like: A tensor of the dtype and device to use.

    Returns:
        0 where a query may look and -inf elsewhere, `[repeats * queries, keys + sinks]` or, where padding still
        shows, `[B, 1, repeats * queries, keys + sinks]`.
    """
    (start, stop), sinks, window = block, view.sinks.length, view.window
    if call.padding and start < call.padding.most + sinks + window:
        allowed = _allowed(block, keys_from, sinks, window, call.padding, like.device)
        return _additive(allowed, repeats, like)
    if start < sinks:
        return _additive(_allowed(block, keys_from, sinks, window, None, like.device), repeats, like)
    # Beyond the sinks a mask depends on distances only: one template serves all blocks, cut where the text begins.
    key = (stop - start, sinks, window, repeats, like.dtype, like.device)
    if key not in call.memo:
        allowed = _allowed(block, start - window + 1, sinks, window, None, like.device)
        call.memo[key] = None, _additive(allowed, repeats, like)
    template: Any = call.memo[key][1]
    return template[:, keys_from - (start - window + 1) :]  # type: ignore[no-any-return]


def extra_mask(extra: ExtraKV, block: tuple[int, int], repeats: int, like: torch.Tensor) -> torch.Tensor:
    """Additive mask of a block of queries over extra keys.

    Args:
        extra: The keys, N of them.
        block: First and last + 1 index of the queries.
        repeats: How often to stack the mask, for query heads stacked on one kv head.
        like: A tensor of the dtype and device to use.

    Returns:
        `[repeats * queries, N]` or, where the rows differ, `[B, 1, repeats * queries, N]`.
    """
    allowed = visible_extra(extra, *block)
    return _additive(allowed[:, None] if allowed.size(0) > 1 else allowed[0], repeats, like)


def one_mask(call: Call, extra: ExtraKV, seen: int, like: torch.Tensor) -> torch.Tensor | None:
    """Additive mask of a single query over extra keys, `[1, N]`, made once for all layers.

    Args:
        call: The call, which keeps the mask for its other layers.
        extra: The keys, N of them.
        seen: Tokens seen, that of the query included.
        like: A tensor of the dtype and device to use.

    Returns:
        The mask, or `None` where rows differ or the query reads none of them.
    """
    if extra.visible_from.size(0) > 1:
        return None

    def make() -> torch.Tensor | None:
        mask = extra_mask(extra, (seen - 1, seen), 1, like)
        return mask if bool((mask == 0).any()) else None

    return call.shared("one mask", extra.visible_from, make)


def slot_mask(call: Call, view: VisibleKV, like: torch.Tensor) -> torch.Tensor | None:
    """Mask of a single query over the raw slots of a ring, `[B, 1, 1, slots]`, or `None` if it may read all."""
    sinks, slots, seen, window = view.sinks.length, view.local.length, view.seen, view.window
    if call.padding is None or seen >= call.padding.most + sinks + window:
        return None
    slot = torch.arange(slots, device=like.device)
    # Sinks are complete when a query reads raw slots; slot S + (j - S) mod W holds token j of the window.
    token = slot + torch.div(seen - 1 - slot, window, rounding_mode="floor") * window
    allowed = (slot < sinks) | (token >= call.padding.counts.to(like.device)[:, None] + sinks)
    return _additive(allowed[:, None, None], 1, like)


def beside(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Two masks side by side; one that holds for all rows is repeated where the other differs from row to row."""
    if left.dim() != right.dim():
        shape = (left if left.dim() > right.dim() else right).shape[:3]
        left, right = (mask.expand(*shape, mask.size(-1)) for mask in (left, right))
    return torch.cat((left, right), dim=-1)


def _allowed(
    block: tuple[int, int], keys_from: int, sinks: int, window: int, padding: Padding | None, device: torch.device
) -> torch.Tensor:
    """Which window tokens and sinks each query may read, `[queries, keys + sinks]` or `[B, 1, queries, ...]`."""
    query = torch.arange(*block, device=device)[:, None]
    key = torch.arange(keys_from, max(keys_from, block[1]), device=device)
    sink = torch.arange(sinks, device=device)
    in_window = is_visible(query, key, key + window)
    if padding is None:
        return torch.cat((in_window, is_visible(query, sink, NEVER)), dim=-1)
    pads = padding.counts.to(device)[:, None, None]
    # A padding query has no real token to look at: it reads itself, so that its softmax stays finite,
    in_window = in_window & ((key >= pads + sinks) | ((key == query) & (query < pads)))
    # or, before the window has any token, sink slots, whose content it cannot harm.
    blind = (query < pads) & ~in_window.any(-1, keepdim=True)
    return torch.cat((in_window, is_visible(query, sink + pads, NEVER) | blind), dim=-1)[:, None]


def _additive(allowed: torch.Tensor, repeats: int, like: torch.Tensor) -> torch.Tensor:
    """0 where allowed and -inf elsewhere, the rows stacked `repeats` times."""
    stacked = allowed.repeat(*[1] * (allowed.dim() - 2), repeats, 1)
    return torch.zeros(stacked.shape, dtype=like.dtype, device=like.device).masked_fill_(~stacked, float("-inf"))


@dataclasses.dataclass(frozen=True, eq=False)
class CallMask:
    """What travels through the model as its attention mask.

    Attributes:
        call: The call.
        base: Mask for layers without a memory, as the base model's implementation wants it.
    """

    call: Call
    base: Any


def mask_function(**arguments: Any) -> Any:
    """The mask that a model builds at the start of a call while a memory is attached; it holds the call.

    The base model's own mask is only built where a layer will use it.

    Returns:
        The base model's own mask in mode "full"; a mask that holds the call; or, where a wrapper asks before its text
        model is called, what it asks for, until that call begins.

    Raises:
        CacheError: The model asks for a mask that a memory cannot follow.
    """
    call, config = CURRENT.get(), arguments.get("config")
    is_of_call = call is not None and any(config is each for each, _ in call.attachment.implementations)
    return mask_of_call(call, arguments) if call is not None and is_of_call else HostMask(arguments)


def mask_of_call(call: Call, arguments: Mapping[str, Any]) -> Any:
    """The mask of a call, from what the model asks for.

    Raises:
        CacheError: It asks for a mask that a memory cannot follow.
    """
    base = ALL_MASK_ATTENTION_FUNCTIONS[call.attachment.base_implementation]
    if call.settings.mode == "full":
        return base(**arguments)
    check_mask(arguments["mask_function"])
    return CallMask(call, base(**arguments) if call.attachment.keeps_base_layers else None)


def find_padding(mask: torch.Tensor, new: int, known: Padding | None, seen: int, has_cache: bool) -> Padding | None:
    """Padding of a batch from its attention mask.

    Args:
        mask: `[B, seen + new]`, zero at padding.
        new: Number of new tokens in this call.
        known: What an earlier call on the same cache found.
        seen: Tokens read before this call; 0 without a cache.
        has_cache: Whether a cache goes on after this call, which padding on the right would spoil.

    Raises:
        CacheError: The mask has another length, a hole, or padding on the right where a cache is kept.
    """
    if mask.dim() != 2 or mask.size(1) != seen + new:
        raise CacheError(
            f"the attention mask must be [batch, {seen + new}] (tokens seen + new tokens), not {list(mask.shape)}"
        )
    begun = seen > 0 and (known is None or known.most < seen)
    mask = mask[:, seen:].bool() if begun else mask.bool()
    if begun:
        counts, regular = mask.new_zeros(1, dtype=torch.long), mask.all()
    else:
        counts = (mask.long().cumsum(1) == 0).sum(1)
        ends = mask.size(1) - (mask.long().flip(1).cumsum(1) == 0).sum(1) * (not has_cache)
        regular = (mask.sum(1) == (ends - counts).clamp(min=0)).all()
    if not bool(regular):
        raise CacheError(
            "the attention mask has zeros after a row's first real token, which cannot be read into a cache: pad on "
            "the left (or, to score texts padded on the right, pass use_cache=False)"
        )
    if begun:
        return known
    return Padding(counts, int(counts.max())) if bool(counts.any()) else None
