"""What the host model says of a call beside its tokens: masks, packed rows, outputs. None of it is ignored.

Legend of shapes: B batch, T new tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers.masking_utils import causal_mask_function

from ahn.attachment import Attachment
from ahn.errors import CacheError, ModelError

OURS = "ahn"
"""How the names of all attention implementations of this library begin."""

_FULL = 'read inside ahn.mode(model, "full")'
_SLIDING = "sliding_window_overlay.<locals>.inner_mask"
_PACKED_LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


@dataclasses.dataclass(frozen=True, eq=False)
class HostMask:
    """A mask that a wrapper asked for before its text model was called, to be made when that call begins.

    Attributes:
        arguments: What it was asked for by, as `transformers.masking_utils` hands it on.
    """

    arguments: Mapping[str, Any]


def check_attached(attachment: Attachment) -> None:
    """Checks that the model still attends by way of the memory.

    Raises:
        ModelError: Its attention implementation was changed after the memory was attached.
    """
    for config, original in attachment.implementations:
        name = config._attn_implementation
        if not str(name).startswith(OURS):
            raise ModelError(
                f"the attention implementation was set to {name!r} after the memory was attached, which then is not "
                f"read: call ahn.detach(model) first, or load the model with attn_implementation={name!r}"
                + ("" if original == name else f" (it was {original!r})")
            )


def check_tokens(new: int, seen: int) -> None:
    """Checks that there is a token to read.

    Args:
        new: Tokens that the cache has not read.
        seen: Tokens that it has.

    Raises:
        CacheError: There is none left.
    """
    if new < 1:
        raise CacheError(
            f"there is no token to read that the cache, which has read {seen}, does not have: generate takes the whole "
            "text and skips what the cache has read, so pass torch.cat((ids, new_ids), dim=1)"
        )


def check_outputs(backbone: Any, arguments: Mapping[str, Any]) -> None:
    """Checks that nothing is asked for that a memory does not compute.

    Raises:
        ModelError: The weights of attention are asked for.
    """
    wanted = arguments.get("output_attentions")
    if backbone.config.output_attentions if wanted is None else wanted:
        raise ModelError(
            f"output_attentions=True: a memory attends without making the weights. {_FULL[0].upper()}{_FULL[1:]}, with "
            'a model that was loaded with attn_implementation="eager"'
        )


def check_mask(function: Callable[..., Any]) -> None:
    """Checks that a mask is causal, if with a window of the layer's own.

    Args:
        function: Which keys a query may read, as transformers hands it to a mask interface.

    Raises:
        CacheError: It is anything else.
    """
    for part in _parts(function):
        name = getattr(part, "__qualname__", type(part).__name__)
        if part is not causal_mask_function and name != _SLIDING:
            raise CacheError(
                f"the model asks for a mask that is more than causal ({name.partition('.')[0]}), as for images that "
                f"are read in both directions or packed rows with a cache; a memory cannot follow it: {_FULL}"
            )


def _parts(function: Callable[..., Any]) -> list[Any]:
    """The masks that all have to allow a key, of which a mask is made."""
    name = getattr(function, "__qualname__", "")
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    if name.startswith("and_masks.<locals>"):
        joined = next((parts for parts in cells if isinstance(parts, tuple)), ())
        return [inner for part in joined for inner in _parts(part)]
    # While a graph is traced, transformers parts the documents of rows of which it cannot see that they hold one each.
    tensors = [cell for cell in cells if isinstance(cell, torch.Tensor)]
    if name.startswith("packed_sequence_mask_function.<locals>") and all(not bool(each.any()) for each in tensors):
        return []
    if name.startswith("remap_positions_for_packed") and all(bool((each.diff() == 1).all()) for each in tensors):
        return [inner for cell in cells if callable(cell) for inner in _parts(cell)]
    return [function]


def document_starts(arguments: Mapping[str, Any], tokens: int) -> list[int]:
    """Where the documents of packed rows begin: wherever positions do not go on by one.

    Rows are packed as transformers has it: with positions, and without a mask or a cache.

    Args:
        arguments: Arguments of the call.
        tokens: New tokens of each row, T.

    Returns:
        Indices of the first tokens, 0 among them; 0 alone where nothing is packed.

    Raises:
        CacheError: The rows of a batch are packed differently.
    """
    positions = arguments.get("position_ids")
    if not isinstance(positions, torch.Tensor) or positions.dim() != 2 or tokens < 2:
        return [0]
    begins_BT = positions.diff(dim=1) != 1
    begins_T = begins_BT[0]
    if not bool((begins_BT == begins_T).all()):
        raise CacheError(
            "the rows of this batch are packed with documents of different lengths; pass one row at a time"
        )
    return [0, *(begins_T.nonzero().flatten() + 1).tolist()]


def without_lengths(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments without the lengths of documents that collators of packed rows add for flash attention."""
    return {name: value for name, value in arguments.items() if name not in _PACKED_LENGTHS}
