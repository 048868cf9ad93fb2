"""How a layer votes on the tokens it reads: which of them should be anchors once they leave the window.

Legend of shapes: B batch, T new tokens, C kinds of facts, R reaches, G key/value heads, K key size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from ahn.anchors.learned import AnchorGate
from ahn.anchors.queries import AnchorQueries
from ahn.config import AUTO
from ahn.errors import ConfigError

__all__ = [
    "LONG_POOL",
    "ORACLE",
    "POOL",
    "PREFERRED",
    "SCORES",
    "AnchorGate",
    "AnchorQueries",
    "NewTokens",
    "Score",
    "default_layers",
    "find_score",
    "oracle",
]

POOL = 3
"""Neighbours on each side that a token's score is averaged over. Those behind it are still in the window."""
LONG_POOL = 10
"""And where facts are long, of some scores."""


@dataclasses.dataclass(frozen=True)
class NewTokens:
    """The new tokens of a layer, as the scores see them.

    Attributes:
        keys: Keys, `[B, G, T, K]` float32; as they were before their rotation for the scores that are `pre_rope`.
        tokens: Their indices from each row's first real token, `[B, T]`.
        hidden: What the layer read, `[B, T, D]`; for scores with weights.
        mean: The mean of all unit keys up to some tokens behind each, as `keys`; for the scores that compare with it.
        weights: The layer's weights, of the score's own kind; for scores with weights.
    """

    keys: torch.Tensor
    tokens: torch.Tensor
    hidden: torch.Tensor | None = None
    mean: torch.Tensor | None = None
    weights: nn.Module | None = None


def key_diff(new: NewTokens) -> torch.Tensor:
    """How much a key differs from the mean key: minus their cosine. Source: KeyDiff, arXiv 2504.15364."""
    cosine: torch.Tensor = torch.cosine_similarity(new.keys, _there(new.mean), dim=-1)
    return -cosine.mean(1)


def key_norm(new: NewTokens) -> torch.Tensor:
    """Minus the length of the key: short keys draw attention. Source: arXiv 2406.11430."""
    length: torch.Tensor = torch.linalg.vector_norm(new.keys, dim=-1)
    return -length.mean(1)


def asked(new: NewTokens) -> torch.Tensor:
    """How much the queries of example questions would look at a key, by kind; nothing is trained: `AnchorQueries`."""
    votes: torch.Tensor = _there(new.weights)(new.keys)
    return votes


def learned(new: NewTokens) -> torch.Tensor:
    """What a small network says that was trained to foresee how much questions look at a token."""
    votes: torch.Tensor = _there(new.weights)(_there(new.hidden))
    return votes


def recent(new: NewTokens) -> torch.Tensor:
    """The later the better, which enlarges the window: a control."""
    return new.tokens.float()


def random(new: NewTokens) -> torch.Tensor:
    """A number between 0 and 1 that depends on the index of the token alone: a control."""
    hashed: torch.Tensor = new.tokens * 2654435761 % 2**32
    return hashed.float() / 2**32


_DELAY = 64
"""Tokens after which scores vote that compare with a mean, which says little near the beginning of a text."""


@dataclasses.dataclass(frozen=True)
class Score:
    """A way to choose anchors.

    Attributes:
        votes: From new tokens to votes, `[B, T]`, the higher the better; or, for R reaches, `[B, T, C, R]`, of which
            the best kind counts once the layers have taken their mean, NaN where a layer does not vote.
        pre_rope: Whether it needs keys as they were before their rotation.
        needs_mean: Whether it needs their mean, for which it votes some tokens later.
        weights: What a layer must have to vote; `None` for a score that needs nothing.
        reaches: Neighbours on each side that votes are averaged over, of which the highest mean counts.
        gain: What means over more neighbours than `POOL` have ahead, because those of many are seldom high.
        lends: Tokens before one with a high score that are lent some of it, because they say what it is about, and
            behind it, because the mean is low where a fact ends; behind a mean over more neighbours as many more.
        fade: How much of a score is lost with every token by which it is lent.
    """

    votes: Callable[[NewTokens], torch.Tensor]
    pre_rope: bool = False
    needs_mean: bool = False
    weights: type[AnchorGate] | type[AnchorQueries] | None = None
    reaches: tuple[int, ...] = (POOL,)
    gain: float = 0.0
    lends: tuple[int, int] = (0, 0)
    fade: float = 0.0

    def delay(self, window: int) -> int:
        """Tokens after which a token is voted on, while it is still in the window.

        Args:
            window: Tokens of the shortest window.
        """
        return min(_DELAY, window // 4) if self.needs_mean else 0

    def before(self, window: int) -> int:
        """Tokens before one with a high score that are lent some of it: no more than a quarter of a window.

        Args:
            window: Tokens of the shortest window.
        """
        return min(self.lends[0], window // 4)

    def behind(self, reach: int) -> int:
        """Tokens behind one with a high score that are lent some of it.

        Args:
            reach: Neighbours that its votes are averaged over.
        """
        return self.lends[1] + reach - POOL

    def ahead(self, reach: int) -> float:
        """What a mean over so many neighbours has ahead.

        Args:
            reach: Neighbours on each side.
        """
        return self.gain if reach > POOL else 0.0

    def span(self, window: int) -> int:
        """Tokens that must be in the window behind one that leaves, so that all it depends on has been voted on.

        Args:
            window: Tokens of the shortest window.
        """
        return max(self.reaches) + self.delay(window) + self.before(window)


SCORES = {
    "key_diff": Score(key_diff, pre_rope=True, needs_mean=True),
    "key_norm": Score(key_norm),
    "asked": Score(
        asked, pre_rope=True, weights=AnchorQueries, reaches=(POOL, LONG_POOL), gain=0.8, lends=(12, 4), fade=0.02
    ),
    "learned": Score(learned, weights=AnchorGate, lends=(12, 2), fade=0.07),
    "recent": Score(recent),
    "random": Score(random),
}
"""Scores by name. A new one is a function and a line here."""

ORACLE = "oracle"
"""A score that is not in the table: the tokens that `oracle` names, for the bound of what a choice can bring."""

_wanted: ContextVar[frozenset[int] | None] = ContextVar("ahn_wanted", default=None)


def default_layers(score: str, layers: Sequence[int]) -> list[int]:
    """The layers that vote where none are named.

    Keys that differ from the mean tell facts from filler in some layers only: of SmolLM2's 30 best in 18 and 20, which
    keep more of every kind than all together (docs/log.md). So of any model those at these depths vote by `key_diff`.

    Args:
        score: Name of the score.
        layers: Indices of the layers that could vote, in order.
    """
    if not find_score(score).needs_mean:
        return list(layers)
    count = len(layers)
    return sorted({layers[place] for place in (3 * count // 5, 2 * count // 3)})


@contextmanager
def oracle(tokens: Iterable[int]) -> Iterator[None]:
    """Makes known the score "oracle" inside a `with` block: it votes for these tokens alone.

    Args:
        tokens: Their indices from each row's first real token.
    """
    token = _wanted.set(frozenset(tokens))
    try:
        yield
    finally:
        _wanted.reset(token)


def _oracle(new: NewTokens) -> torch.Tensor:
    wanted = torch.tensor(sorted(_there(_wanted.get())), dtype=torch.long, device=new.tokens.device)
    return torch.isin(new.tokens, wanted).float()


PREFERRED = ("learned", "asked", "key_diff")
"""Scores that are taken where none is named: the first that a model has weights for, or that needs none."""


def find_score(name: str) -> Score:
    """The score of a name.

    Raises:
        ConfigError: There is none.
    """
    if name == ORACLE and _wanted.get() is not None:
        return Score(_oracle)
    if name not in SCORES:
        raise ConfigError(f"unknown anchor_score {name!r}; known are {AUTO}, {', '.join(SCORES)}")
    return SCORES[name]


def _there(value: Any) -> Any:
    """A value that the layer found for this score."""
    if value is None:
        raise ConfigError("a layer was asked for a score that it has nothing to give for")
    return value
