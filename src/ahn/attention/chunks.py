"""Long calls in chunks: anchors are chosen by scores of all layers, which must have read a token before it leaves.

Nobody can tell from outside. Arguments are cut by what they mean, and one that nobody here knows is refused by name.
Legend of shapes: B batch, T tokens, D hidden size, L layers, H query heads, N keys, R rotated size, X experts.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ahn.backbone import compat
from ahn.errors import CacheError

_TOKEN_AXES = {
    "input_ids": 1,
    "inputs_embeds": 1,
    "token_type_ids": 1,
    "mm_token_type_ids": 1,
    "per_layer_inputs": 1,  # [B, T, L, D]
    "position_ids": -1,  # [B, T], or [3, B, T] and [4, B, T] where a position has several parts
    "cache_position": -1,
    "position_embeddings": -2,  # a pair of [B, T, R]
}
"""The axis of the tokens in each argument that holds something for every new token."""


def cut_all(arguments: Mapping[str, Any], seen: int, longest: int) -> list[dict[str, Any]]:
    """The arguments of each chunk of a call.

    Args:
        arguments: The call's arguments, among them its cache.
        seen: Tokens read before the call.
        longest: Tokens of a chunk at most.

    Raises:
        CacheError: An argument cannot be cut.
    """
    inputs = arguments["input_ids"] if arguments.get("input_ids") is not None else arguments["inputs_embeds"]
    new = inputs.size(1)
    return cut_at(arguments, [*range(longest, new, longest), new], seen)


def cut_at(arguments: Mapping[str, Any], ends: Sequence[int], seen: int = 0) -> list[dict[str, Any]]:
    """The arguments of each part of a call.

    Args:
        arguments: The call's arguments.
        ends: Where each part ends, the call's number of new tokens last.
        seen: Tokens read before the call.

    Raises:
        CacheError: An argument cannot be cut.
    """
    parts = [slice(start, end) for start, end in itertools.pairwise([0, *ends])]
    return [{name: _cut(name, each, seen, ends[-1], part) for name, each in arguments.items()} for part in parts]


def _cut(name: str, value: Any, seen: int, new: int, part: slice) -> Any:
    if name in compat.CACHE_NAMES or not _holds_tensors(value):
        return value
    if name == "attention_mask":
        return value[:, : seen + part.stop]
    axis = _TOKEN_AXES.get(name)
    if isinstance(value, (tuple, list)) and axis is not None:
        return type(value)(_cut(name, each, seen, new, part) for each in value)
    is_known = axis is not None and isinstance(value, torch.Tensor) and -value.dim() <= axis < value.dim()
    if not is_known or value.size(axis) != new:
        raise CacheError(
            f"these {new} tokens are read in parts, because of anchors or as packed documents, and the argument "
            f'{name!r} cannot be cut to them; leave it out, or read inside ahn.mode(model, "full")'
        )
    return value.narrow(axis, part.start, part.stop - part.start)


def _holds_tensors(value: Any) -> bool:
    """Whether something holds numbers that may belong to tokens; a single number belongs to the call."""
    if isinstance(value, torch.Tensor):
        return value.dim() > 0
    if isinstance(value, Mapping):
        value = list(value.values())
    return isinstance(value, (tuple, list)) and any(_holds_tensors(each) for each in value)


def join(outputs: Sequence[Any]) -> Any:
    """The output of a whole call from those of its chunks."""
    last = outputs[-1]
    rows = last["last_hidden_state"].size(0)
    joined = {name: _join(name, [output[name] for output in outputs], rows) for name in last}
    return type(last)(**joined)


def without(output: Any, cache: object) -> Any:
    """An output without a cache that nobody asked for."""
    if isinstance(output, Mapping):
        kind: Any = type(output)
        return kind(**{name: value for name, value in output.items() if value is not cache})
    return tuple(value for value in output if value is not cache) if isinstance(output, tuple) else output


def _join(name: str, parts: list[Any], rows: int) -> Any:
    if isinstance(parts[0], (tuple, list)):
        return tuple(_join(name, list(each), rows) for each in zip(*parts, strict=True))
    if name in ("last_hidden_state", "hidden_states"):
        return torch.cat(parts, dim=1)
    if name == "router_logits" and parts[0].dim() == 2:  # [B * T, X]
        return torch.cat([part.unflatten(0, (rows, -1)) for part in parts], dim=1).flatten(0, 1)
    return parts[-1]
