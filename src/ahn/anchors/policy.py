"""The score and the layers that choose the anchors of a text, settled once when the text begins."""

from __future__ import annotations

import bisect
from collections.abc import Container, Mapping
from typing import NamedTuple

from ahn.anchors.base import Score
from ahn.anchors.scores import PREFERRED, SCORES
from ahn.config import AUTO, MOST, RunSettings
from ahn.errors import ConfigError

Weighted = Mapping[int, Container[str]]
"""For the index of each layer with a memory, in order, the scores that it has weights for."""


class Policy(NamedTuple):
    """What chooses the anchors of a text.

    Attributes:
        score: The score.
        layers: Indices of the layers whose mean it is.
    """

    score: Score
    layers: frozenset[int]


def settle(settings: RunSettings, weighted: Weighted, score: Score | None = None) -> Policy:
    """What chooses the anchors of a text that begins now.

    Args:
        settings: Settings with anchors, which were checked.
        weighted: The layers that may score.
        score: The score, where it is not that of the settings.

    Raises:
        ConfigError: The score needs weights, and no layer has any.
    """
    score = score or _find_score(settings, weighted)
    named = settings.anchor_layers
    layers = [index for index in weighted if named is None or index in named]
    if score.weight_names:
        layers = [index for index in layers if score.name in weighted[index]]
    if not layers:
        where = "this model" if named is None else f"layers {list(named)}"
        raise ConfigError(
            f'anchor_score="{score.name}" has no weights on {where}; load some with '
            "ahn.load_anchors(model, name), or choose anchors by key_diff"
        )
    return Policy(score, frozenset(layers if named is not None else score.default_layers(layers)))


def check_anchors(
    settings: RunSettings,
    weighted: Weighted,
    window: int,
    rotation_problem: str | None,
    score: Score | None = None,
) -> None:
    """Checks the settings of anchors; whether there are weights is not asked before a text begins.

    Args:
        settings: The settings.
        weighted: The layers that may score.
        window: Tokens of the shortest window of them.
        rotation_problem: Why keys cannot be had as they were before their rotation, or `None` if they can.
        score: As for `settle`.

    Raises:
        ConfigError: There is no such score, it cannot serve this model, it needs a longer window, or a layer is named
            that has no memory.
    """
    if not settings.has_anchors and settings.anchor_score == AUTO:
        return
    score = score or _find_score(settings, weighted)
    if not settings.has_anchors:
        return
    if unknown := sorted(set(settings.anchor_layers or ()) - set(weighted)):
        raise ConfigError(f"anchor_layers names {unknown}, but the layers with a memory are {list(weighted)}")
    if score.pre_rope and rotation_problem:
        others = ", ".join(name for name, other in SCORES.items() if not other.pre_rope)
        raise ConfigError(
            f"the rotary positions of this model cannot be undone ({rotation_problem}), as anchor_score="
            f'"{score.name}" asks; use one of {others}'
        )
    check_window(score, window)


def check_window(score: Score, window: int) -> None:
    """Checks that scores are final before their tokens leave the window.

    Args:
        score: The score.
        window: Tokens of the shortest window.

    Raises:
        ConfigError: The window is too short.
    """
    if window <= score.span(window):
        raise ConfigError(
            f"anchors need a window of at least {_least_window(score)} tokens in every layer with a memory, not "
            f"{window}; use a larger window, or anchors=0"
        )


def _least_window(score: Score) -> int:
    """Tokens of the shortest window that is longer than the span of a score, which grows with the window."""
    windows = range(MOST + 1)
    return bisect.bisect_left(windows, True, key=lambda window: window > score.span(window))


def _find_score(settings: RunSettings, weighted: Weighted) -> Score:
    """The score that settings name or, where they leave it open, the first preferred one that can serve."""
    name = settings.anchor_score
    if name == AUTO:
        named = settings.anchor_layers
        having = [scores for index, scores in weighted.items() if named is None or index in named]
        name = next(
            each for each in PREFERRED if not SCORES[each].weight_names or any(each in scores for scores in having)
        )
    if name not in SCORES:
        raise ConfigError(f"unknown anchor_score {name!r}; known are {AUTO}, {', '.join(SCORES)}")
    return SCORES[name]
