"""Votes on the new tokens of a call: which of them should be anchors once they leave the window, in a layer's eyes.

Legend of shapes: L layers, B batch, T new tokens, D hidden size, G key/value heads, K key size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from ahn.anchors.scores import NewTokens, find_score
from ahn.backbone.rotary import Rotary
from ahn.cache.bank import Tally
from ahn.cache.layer import HippocampalLayer
from ahn.tokens import Padding


class Voter(NamedTuple):
    """What a layer knows of the new tokens.

    Attributes:
        store: Its part of the cache.
        key: Their keys, rotated, `[B, G, T, K]`.
        hidden: What it reads, `[B, T, D]`.
        weights: Its weights for the score, or `None` for a score that needs none.
        rotary: The rotation of the keys, or `None` where nothing asks to undo it.
    """

    store: HippocampalLayer
    key: torch.Tensor
    hidden: torch.Tensor
    weights: nn.Module | None
    rotary: Rotary | None


@torch.no_grad()
def cast_votes(
    voters: Sequence[Voter], score: str, seen: int, delay: int, padding: Padding | None
) -> list[torch.Tensor]:
    """How much each token should be an anchor, for every layer: the new ones or, with a delay, as many before them.

    Args:
        voters: Layers of one shape and rotation, each with weights if the score asks for some.
        score: What they vote by.
        seen: Tokens read before the call.
        delay: Tokens after which a token is voted on.
        padding: Padding at the left of the rows, or `None` where there is none.

    Returns:
        Votes, `[B, T]` or `[B, T, C]` each as the score gives them, on the tokens from `seen - delay` (or 0) on; fewer
        while the first are still too new.
    """
    chosen, rows, length = find_score(score), voters[0].key.size(0), voters[0].key.size(2)
    place = torch.arange(seen, seen + length, device=voters[0].key.device)
    tokens = place[None] if padding is None else place - padding.counts.to(place.device)[:, None]
    if chosen.weights is not None:
        own = [voter.key for voter in voters]  # as they are: the learned score does not look at them
        if chosen.unrotated:
            own = list(_unrotated(torch.cat(own).float(), len(voters), voters[0].rotary).split(rows))
        return [
            chosen.votes(NewTokens(key, tokens, voter.hidden, weights=voter.weights)) for voter, key in zip(voters, own)
        ]
    keys, mean = torch.cat([voter.key for voter in voters]).float(), None
    tokens = tokens.repeat(len(voters) if tokens.size(0) > 1 else 1, 1)
    if chosen.unrotated:
        keys = _unrotated(keys, len(voters), voters[0].rotary)
    if chosen.compares:
        keys, mean = _with_mean([voter.store.tally for voter in voters], keys, tokens, seen, delay)
    return list(chosen.votes(NewTokens(keys, tokens, mean=mean)).expand(keys.size(0), -1).split(rows))


def _unrotated(keys: torch.Tensor, layers: int, rotary: Rotary | None) -> torch.Tensor:
    """Keys of several layers, `[L * B, G, T, K]`, as they were before their rotation."""
    if rotary is None:
        return keys
    cos, sin = (table.repeat(layers, 1, 1) if table.size(0) > 1 else table for table in rotary.tables)
    return rotary.rotation.unrotate(keys, (cos, sin))


def _with_mean(
    tallies: Sequence[Tally], new: torch.Tensor, tokens: torch.Tensor, seen: int, delay: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit keys that are voted on now, and for each the mean of all up to `delay` tokens later, `[L * B, G, T, K]`."""
    real = (tokens >= 0)[:, None, :, None]
    unit = functional.normalize(new, dim=-1) * real
    total, line = unit.cumsum(2), unit
    if tallies[0].held:
        total = torch.cat([tally.held["key_total"] for tally in tallies]) + total
        line = torch.cat((torch.cat([tally.held["key_recent"] for tally in tallies]), unit), dim=2)
    kept = {"key_total": total[:, :, -1:], "key_recent": line[:, :, max(0, line.size(2) - delay) :]}
    parts = {name: tensor.clone().chunk(len(tallies)) for name, tensor in kept.items()}
    for number, tally in enumerate(tallies):
        tally.held = {name: part[number] for name, part in parts.items()}
    due = max(0, delay - seen)  # new tokens whose coming makes no token old enough
    mean = total / (tokens + 1).clamp(min=1)[:, None, :, None]
    return line[:, :, : max(0, new.size(2) - due)], mean[:, :, due:]
