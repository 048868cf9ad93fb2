"""How one forward call reads: settings, padding and the block masks that all its layers share.

A plan travels through the model as its attention mask, so that it reaches every layer also when activation
checkpointing runs a layer again. Legend of shapes: B batch, S sinks, W window.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextvars import ContextVar, Token
from typing import Any, TypeVar, cast

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from ahn.anchors.selection import Selection
from ahn.attachment import Attachment
from ahn.attention.decoding import DecodeStep
from ahn.config import RunSettings
from ahn.errors import CacheError
from ahn.tokens import ExtraKV, Padding, View

Found = TypeVar("Found")

CURRENT: ContextVar[Plan | None] = ContextVar("ahn_plan", default=None)


@dataclasses.dataclass
class Plan:
    """One forward call.

    Attributes:
        attachment: What is attached to the model.
        settings: Mode, window and sinks of the call; a cache brings its own.
        padding: Padding at the left of the rows, or `None`.
        base_mask: Mask for layers without a memory, as the base model's implementation wants it.
        masks: Block masks made so far, shared by the layers.
        made: What `shared` has made so far.
        selection: The choice of anchors in this call; `None` where there are none.
        step: What all layers do at once, in a call of one token; `None` in others.
        before: Outputs of the chunks of a long call that were read before this, its last one.
        token: What ends the call.
    """

    attachment: Attachment
    settings: RunSettings
    padding: Padding | None
    base_mask: Any = None
    masks: dict[tuple[object, ...], torch.Tensor] = dataclasses.field(default_factory=dict)
    made: dict[tuple[str, int], tuple[object, object]] = dataclasses.field(default_factory=dict)
    selection: Selection | None = None
    step: DecodeStep | None = None
    before: list[Any] = dataclasses.field(default_factory=list)
    token: Token[Plan | None] | None = None

    def block_mask(
        self, block: tuple[int, int], keys_from: int, sinks: int, window: int, repeats: int, like: torch.Tensor
    ) -> torch.Tensor:
        """Additive mask of a block of queries over a segment of the window, followed by the sinks.

        Args:
            block: First and last + 1 index of the queries; the last key of the window is that of the last query.
            keys_from: Index of the first key of the window.
            sinks: Number of sinks so far.
            window: Tokens of the layer's window, W.
            repeats: How often to stack the mask, for query heads stacked on one kv head.
            like: A tensor of the dtype and device to use.

        Returns:
            0 where a query may look and -inf elsewhere, `[repeats * queries, keys + sinks]` or, where padding still
            shows, `[B, 1, repeats * queries, keys + sinks]`.
        """
        start, stop = block
        if self.padding and start < self.padding.most + sinks + window:
            allowed = _allowed(block, keys_from, sinks, window, self.padding, like.device)
            return _additive(allowed, repeats, like)
        if start < sinks:
            return _additive(_allowed(block, keys_from, sinks, window, None, like.device), repeats, like)
        # Beyond the sinks a mask depends on distances only: one template serves all blocks, cut where the text begins.
        key = (stop - start, sinks, window, repeats, like.dtype, like.device)
        if key not in self.masks:
            allowed = _allowed(block, start - window + 1, sinks, window, None, like.device)
            self.masks[key] = _additive(allowed, repeats, like)
        return self.masks[key][:, keys_from - (start - window + 1) :]

    def extra_mask(self, extra: ExtraKV, block: tuple[int, int], repeats: int, like: torch.Tensor) -> torch.Tensor:
        """Additive mask of a block of queries over extra keys.

        Args:
            extra: The keys, C of them.
            block: First and last + 1 index of the queries.
            repeats: How often to stack the mask, for query heads stacked on one kv head.
            like: A tensor of the dtype and device to use.

        Returns:
            `[repeats * queries, C]` or, where the rows differ, `[B, 1, repeats * queries, C]`.
        """
        allowed = extra.allowed(*block)
        return _additive(allowed[:, None] if allowed.size(0) > 1 else allowed[0], repeats, like)

    def one_mask(self, extra: ExtraKV, seen: int, like: torch.Tensor) -> torch.Tensor | None:
        """Additive mask of a single query over extra keys, `[1, C]`, made once for all layers.

        Args:
            extra: The keys, C of them.
            seen: Tokens seen, that of the query included.
            like: A tensor of the dtype and device to use.

        Returns:
            The mask, or `None` where rows differ or the query reads none of them.
        """
        if extra.visible_from.size(0) > 1:
            return None

        def make() -> torch.Tensor | None:
            mask = self.extra_mask(extra, (seen - 1, seen), 1, like)
            return mask if bool((mask == 0).any()) else None

        return self.shared("one mask", extra.visible_from, make)

    def shared(self, name: str, source: object, make: Callable[[], Found]) -> Found:
        """What is made of one thing, once for all layers of the call.

        Args:
            name: What it is.
            source: What it is made of.
            make: Makes it.
        """
        key = name, id(source)
        if key not in self.made:
            self.made[key] = source, make()  # the source too, so that nothing else gets its id
        return cast("Found", self.made[key][1])

    def slot_mask(self, view: View, seen: int, window: int, like: torch.Tensor) -> torch.Tensor | None:
        """Mask of a single query over the raw slots of a ring, `[B, 1, 1, slots]`, or `None` if it may read all."""
        sinks, slots = view.sinks.length, view.local.length
        if self.padding is None or seen >= self.padding.most + sinks + window:
            return None
        slot = torch.arange(slots, device=like.device)
        # Sinks are complete when a query reads raw slots; slot S + (j - S) mod W holds token j of the window.
        token = slot + torch.div(seen - 1 - slot, window, rounding_mode="floor") * window
        allowed = (slot < sinks) | (token >= self.padding.counts.to(like.device)[:, None] + sinks)
        return _additive(allowed[:, None, None], 1, like)


def _allowed(
    block: tuple[int, int], keys_from: int, sinks: int, window: int, padding: Padding | None, device: torch.device
) -> torch.Tensor:
    """Which window tokens and sinks each query may read, `[queries, keys + sinks]` or `[B, 1, queries, ...]`."""
    query = torch.arange(*block, device=device)[:, None]
    key = torch.arange(keys_from, max(keys_from, block[1]), device=device)
    sink = torch.arange(sinks, device=device)
    near = (key <= query) & (key > query - window)
    if padding is None:
        return torch.cat((near, sink <= query), dim=-1)
    pads = padding.counts.to(device)[:, None, None]
    # A padding query has no real token to look at: it reads itself, so that its softmax stays finite,
    near = near & ((key >= pads + sinks) | ((key == query) & (query < pads)))
    # or, before the window has any token, sink slots, whose content it cannot harm.
    blind = (query < pads) & ~near.any(-1, keepdim=True)
    return torch.cat((near, (sink + pads <= query) | blind), dim=-1)[:, None]


def _additive(allowed: torch.Tensor, repeats: int, like: torch.Tensor) -> torch.Tensor:
    """0 where allowed and -inf elsewhere, the rows stacked `repeats` times."""
    stacked = allowed.repeat(*[1] * (allowed.dim() - 2), repeats, 1)
    return torch.zeros(stacked.shape, dtype=like.dtype, device=like.device).masked_fill_(~stacked, float("-inf"))


def mask_function(**arguments: Any) -> Any:
    """The mask that a model builds at the start of a call while a memory is attached: the plan of that call.

    The base model's own mask is only built where a layer will use it.
    """
    plan = CURRENT.get()
    if plan is None:
        raise CacheError("a mask was asked for outside of a forward call; static caches do not work with a memory")
    base = ALL_MASK_ATTENTION_FUNCTIONS[plan.attachment.base_implementation]
    if plan.settings.mode == "full":
        return base(**arguments)
    base_mask = base(**arguments) if plan.attachment.keeps_base_layers else None
    return dataclasses.replace(plan, base_mask=base_mask)


def find_padding(mask: torch.Tensor, new: int, known: Padding | None, seen: int, kept: bool) -> Padding | None:
    """Padding of a batch from its attention mask.

    Args:
        mask: `[B, seen + new]`, zero at padding.
        new: Number of new tokens in this call.
        known: What an earlier call on the same cache found.
        seen: Tokens read before this call; 0 without a cache.
        kept: Whether a cache goes on after this call, which padding on the right would spoil.

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
        ends = mask.size(1) - (mask.long().flip(1).cumsum(1) == 0).sum(1) * (not kept)
        regular = (mask.sum(1) == (ends - counts).clamp(min=0)).all()
    if not bool(regular):
        raise CacheError(
            "the attention mask has zeros after a row's first real token, which cannot be read into a cache: pad on "
            "the left (or, to score texts padded on the right, pass use_cache=False)"
        )
    if begun:
        return known
    return Padding(counts, int(counts.max())) if bool(counts.any()) else None
