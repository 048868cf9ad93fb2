"""Long calls in chunks: what leaves the window must have been voted on by every layer, thus read in an earlier call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def read_first_chunks(
    backbone: Any, seen: int, longest: int, arguments: dict[str, Any]
) -> tuple[list[Any], dict[str, Any]]:
    """Reads all chunks of a call but its last.

    Args:
        backbone: The stack of layers, whose hooks are called for each chunk.
        seen: Tokens read before the call.
        longest: Tokens of a chunk at most.
        arguments: The call's arguments, among them its cache.

    Returns:
        The outputs of those chunks, and the arguments of the last one.
    """
    inputs = arguments["input_ids"] if arguments.get("input_ids") is not None else arguments["inputs_embeds"]
    new = inputs.size(1)
    starts = range(0, new, longest)
    chunks = [_chunk(arguments, seen, new, slice(start, min(start + longest, new))) for start in starts]
    return [backbone(**chunk) for chunk in chunks[:-1]], chunks[-1]


def joined(outputs: list[Any]) -> Any:
    """The output of a whole call from those of its chunks; what is no tensor per token is that of the last."""
    last = outputs[-1]
    if isinstance(last, Mapping):
        return type(last)(**{name: _join([output[name] for output in outputs]) for name in last})
    return tuple(_join(list(values)) for values in zip(*outputs))


def _chunk(arguments: Mapping[str, Any], seen: int, new: int, part: slice) -> dict[str, Any]:
    def cut(name: str, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if name == "attention_mask":
            return value[:, : seen + part.stop]
        if value.dim() == 1 and value.size(0) == new:
            return value[part]
        return value[:, part] if value.dim() > 1 and value.size(1) == new else value

    return {name: cut(name, value) for name, value in arguments.items()}


def _join(parts: list[Any]) -> Any:
    if isinstance(parts[0], torch.Tensor) and parts[0].dim() > 1:
        return torch.cat(parts, dim=1)
    if isinstance(parts[0], tuple):
        return tuple(_join(list(each)) for each in zip(*parts))
    return parts[-1]
