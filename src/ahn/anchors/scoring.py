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
from ahn.cache.bank import KeyMean
from ahn.cache.layer import HippocampalLayer
from ahn.tokens import Padding


class Scorer(NamedTuple):
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
def score_tokens(
    scorers: Sequence[Scorer], score: str, seen: int, delay: int, padding: Padding | None
) -> list[torch.Tensor]:
    """How much each token should be an anchor, for every layer: the new ones or, with a delay, as many before them.

    Args:
        scorers: Layers of one shape and rotation, each with weights if the score asks for some.
        score: What they vote by.
        seen: Tokens read before the call.
        delay: Tokens after which a token is voted on.
        padding: Padding at the left of the rows, or `None` where there is none.

    Returns:
        Votes, `[B, T]` or `[B, T, C]` each as the score gives them, on the tokens from `seen - delay` (or 0) on; fewer
        while the first are still too new.
    """
    rule, rows, length = find_score(score), scorers[0].key.size(0), scorers[0].key.size(2)
    place = torch.arange(seen, seen + length, device=scorers[0].key.device)
    tokens = place[None] if padding is None else place - padding.counts.to(place.device)[:, None]
    if rule.weights is not None:
        own = [scorer.key for scorer in scorers]  # as they are: the learned score does not look at them
        if rule.pre_rope:
            own = list(_pre_rope(torch.cat(own).float(), len(scorers), scorers[0].rotary).split(rows))
        return [
            rule.votes(NewTokens(key, tokens, scorer.hidden, weights=scorer.weights))
            for scorer, key in zip(scorers, own)
        ]
    keys, mean = torch.cat([scorer.key for scorer in scorers]).float(), None
    tokens = tokens.repeat(len(scorers) if tokens.size(0) > 1 else 1, 1)
    if rule.pre_rope:
        keys = _pre_rope(keys, len(scorers), scorers[0].rotary)
    if rule.needs_mean:
        keys, mean = _with_mean([scorer.store.key_mean for scorer in scorers], keys, tokens, seen, delay)
    return list(rule.votes(NewTokens(keys, tokens, mean=mean)).expand(keys.size(0), -1).split(rows))


def _pre_rope(keys: torch.Tensor, layers: int, rotary: Rotary | None) -> torch.Tensor:
    """Keys of several layers, `[L * B, G, T, K]`, as they were before their rotation."""
    if rotary is None:
        return keys
    cos, sin = (table.repeat(layers, 1, 1) if table.size(0) > 1 else table for table in rotary.tables)
    return rotary.rotation.unrotate(keys, (cos, sin))


def _with_mean(
    key_means: Sequence[KeyMean], new: torch.Tensor, tokens: torch.Tensor, seen: int, delay: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit keys that are voted on now, and for each the mean of all up to `delay` tokens later, `[L * B, G, T, K]`."""
    real = (tokens >= 0)[:, None, :, None]
    unit = functional.normalize(new, dim=-1) * real
    total, line = unit.cumsum(2), unit
    if key_means[0].held:
        total = torch.cat([key_mean.held["key_total"] for key_mean in key_means]) + total
        line = torch.cat((torch.cat([key_mean.held["key_recent"] for key_mean in key_means]), unit), dim=2)
    kept = {"key_total": total[:, :, -1:], "key_recent": line[:, :, max(0, line.size(2) - delay) :]}
    parts = {name: tensor.clone().chunk(len(key_means)) for name, tensor in kept.items()}
    for number, key_mean in enumerate(key_means):
        key_mean.held = {name: part[number] for name, part in parts.items()}
    due = max(0, delay - seen)  # new tokens whose coming makes no token old enough
    mean = total / (tokens + 1).clamp(min=1)[:, None, :, None]
    return line[:, :, : max(0, new.size(2) - due)], mean[:, :, due:]
