"""Votes on the new tokens of a call: which of them should be anchors once they leave the window, in a layer's eyes.

Legend of shapes: L layers, B batch, T new tokens, D hidden size, G key/value heads, K key size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional

from ahn.cache.exact import Padding
from ahn.cache.layer import HippocampalLayer
from ahn.positions import Rotary
from ahn.scores import LEARNED, UNROTATED, AnchorGate, NewTokens, find_score


class Voter(NamedTuple):
    """What a layer knows of the new tokens.

    Attributes:
        store: Its cascade.
        key: Their keys, rotated, `[B, G, T, K]`.
        hidden: What it reads, `[B, T, D]`.
        gate: Its learned vote, or `None` where it has none.
        rotary: The rotation of the keys, or `None` where nothing asks to undo it.
    """

    store: HippocampalLayer
    key: torch.Tensor
    hidden: torch.Tensor
    gate: AnchorGate | None
    rotary: Rotary | None


@torch.no_grad()
def cast_votes(voters: Sequence[Voter], score: str, seen: int, padding: Padding | None) -> list[torch.Tensor]:
    """How much each new token should be an anchor, `[B, T]` for every layer.

    Args:
        voters: Layers of one shape and rotation, each with a gate if the score is a learned one.
        score: What they vote by.
        seen: Tokens read before the call.
        padding: Padding at the left of the rows, or `None` where there is none.
    """
    votes, rows, length = find_score(score), voters[0].key.size(0), voters[0].key.size(2)
    place = torch.arange(seen, seen + length, device=voters[0].key.device)
    tokens = place[None] if padding is None else place - padding.counts.to(place.device)[:, None]
    if score in LEARNED:
        return [votes(NewTokens(voter.key, tokens, voter.hidden, gate=voter.gate)) for voter in voters]
    keys, mean = torch.cat([voter.key for voter in voters]).float(), None
    tokens = tokens.repeat(len(voters) if tokens.size(0) > 1 else 1, 1)
    if score in UNROTATED:
        keys = _unrotated(keys, len(voters), voters[0].rotary)
        mean = _mean_key([voter.store for voter in voters], keys, tokens)
    return list(votes(NewTokens(keys, tokens, mean=mean)).expand(keys.size(0), -1).split(rows))


def _unrotated(keys: torch.Tensor, layers: int, rotary: Rotary | None) -> torch.Tensor:
    """Keys of several layers, `[L * B, G, T, K]`, as they were before their rotation."""
    if rotary is None:
        return keys
    cos, sin = (table.repeat(layers, 1, 1) if table.size(0) > 1 else table for table in rotary.tables)
    return rotary.rotation.undo(keys, (cos, sin))


def _mean_key(stores: Sequence[HippocampalLayer], keys: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Mean of all unit keys of a layer up to each new one, `[L * B, G, T, K]`; their sum is remembered."""
    total = (functional.normalize(keys, dim=-1) * (tokens >= 0)[:, None, :, None]).cumsum(2)
    before = [store.key_total for store in stores if store.key_total is not None]
    if before:
        total = torch.cat(before) + total
    for store, last in zip(stores, total[:, :, -1:].clone().chunk(len(stores)), strict=True):
        store.key_total = last
    return total / (tokens + 1).clamp(min=1)[:, None, :, None]
