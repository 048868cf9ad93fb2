"""How a layer votes on the tokens it reads: which of them should be anchors once they leave the window.

Legend of shapes: B batch, T new tokens, G key/value heads, K key size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from ahn.errors import ConfigError
from ahn.scores.gate import AnchorGate

__all__ = [
    "LEARNED",
    "NEAR",
    "ORACLE",
    "SCORES",
    "UNROTATED",
    "AnchorGate",
    "NewTokens",
    "find_score",
    "told",
    "usual_voters",
    "vote_delay",
]

NEAR = 3
"""Neighbours on each side that a token's score is averaged over. Those behind it are still in the window."""


@dataclasses.dataclass(frozen=True)
class NewTokens:
    """The new tokens of a layer, as the scores see them.

    Attributes:
        keys: Keys, `[B, G, T, K]` float32; as they were before their rotation for the scores in `UNROTATED`.
        tokens: Their indices from each row's first real token, `[B, T]`.
        hidden: For the scores in `LEARNED`: what the layer read, `[B, T, D]`.
        mean: For the scores in `UNROTATED`: the mean of all unit keys up to some tokens behind each, as `keys`.
        gate: For the scores in `LEARNED`: the layer's gate.
    """

    keys: torch.Tensor
    tokens: torch.Tensor
    hidden: torch.Tensor | None = None
    mean: torch.Tensor | None = None
    gate: AnchorGate | None = None


def key_diff(new: NewTokens) -> torch.Tensor:
    """How much a key differs from the mean key: minus their cosine. Source: KeyDiff, arXiv 2504.15364."""
    cosine: torch.Tensor = torch.cosine_similarity(new.keys, _there(new.mean), dim=-1)
    return -cosine.mean(1)


def key_norm(new: NewTokens) -> torch.Tensor:
    """Minus the length of the key: short keys draw attention. Source: arXiv 2406.11430."""
    length: torch.Tensor = torch.linalg.vector_norm(new.keys, dim=-1)
    return -length.mean(1)


def learned(new: NewTokens) -> torch.Tensor:
    """What a small network says that was trained to foresee how much questions look at a token."""
    votes: torch.Tensor = _there(new.gate)(_there(new.hidden))
    return votes


def recent(new: NewTokens) -> torch.Tensor:
    """The later the better, which enlarges the window: a control."""
    return new.tokens.float()


def random(new: NewTokens) -> torch.Tensor:
    """A number between 0 and 1 that depends on the index of the token alone: a control."""
    hashed: torch.Tensor = new.tokens * 2654435761 % 2**32
    return hashed.float() / 2**32


SCORES: dict[str, Callable[[NewTokens], torch.Tensor]] = {
    "key_diff": key_diff,
    "key_norm": key_norm,
    "learned": learned,
    "recent": recent,
    "random": random,
}
"""Scores by name: of new tokens to votes, `[B, T]`, the higher the better. A new one is a function and a line here."""

ORACLE = "oracle"
"""A score that is not in the table: the tokens that `told` names, for the bound of what a choice can bring."""

_told: ContextVar[frozenset[int] | None] = ContextVar("ahn_told", default=None)

UNROTATED = ("key_diff",)
"""Scores that need keys as they were before their rotation, and their mean."""

LEARNED = ("learned",)
"""Scores that need weights. Only the layers that have some vote."""


_DELAY = 64
"""Tokens after which scores in `UNROTATED` vote: near the beginning of a text a mean of the keys so far says little."""


def vote_delay(score: str, window: int) -> int:
    """Tokens after which a token is voted on, while it is still in the window.

    Args:
        score: Name of the score.
        window: Tokens of the shortest window.
    """
    return min(_DELAY, window // 4) if score in UNROTATED else 0


def usual_voters(score: str, layers: Sequence[int]) -> list[int]:
    """The layers that vote where none are named.

    Keys that differ from the mean tell facts from filler in some layers only: of SmolLM2's 30 best in 18 and 20, which
    keep more of every kind than all together (docs/log.md). So of any model those at these depths vote by `key_diff`.

    Args:
        score: Name of the score.
        layers: Indices of the layers that could vote, in order.
    """
    if score not in UNROTATED:
        return list(layers)
    count = len(layers)
    return sorted({layers[place] for place in (3 * count // 5, 2 * count // 3)})


@contextmanager
def told(tokens: Iterable[int]) -> Iterator[None]:
    """Makes known the score "oracle" inside a `with` block: it votes for these tokens alone.

    Args:
        tokens: Their indices from each row's first real token.
    """
    token = _told.set(frozenset(tokens))
    try:
        yield
    finally:
        _told.reset(token)


def _oracle(new: NewTokens) -> torch.Tensor:
    wanted = torch.tensor(sorted(_there(_told.get())), dtype=torch.long, device=new.tokens.device)
    return torch.isin(new.tokens, wanted).float()


def find_score(name: str) -> Callable[[NewTokens], torch.Tensor]:
    """The score of a name.

    Raises:
        ConfigError: There is none.
    """
    if name == ORACLE and _told.get() is not None:
        return _oracle
    if name not in SCORES:
        raise ConfigError(f"unknown anchor_score {name!r}; known are {', '.join(SCORES)}")
    return SCORES[name]


def _there(value: Any) -> Any:
    """A value that the layer found for this score."""
    if value is None:
        raise ConfigError("a layer was asked for a score that it has nothing to give for")
    return value
