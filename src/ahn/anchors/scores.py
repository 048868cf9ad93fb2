"""All scores for anchors, by name."""

from __future__ import annotations

from ahn.anchors.base import Score
from ahn.anchors.learned import Learned
from ahn.anchors.queries import Asked
from ahn.anchors.simple import KeyDiff, KeyNorm, Recent, ValueNorm, WindowAttention

SCORES: dict[str, Score] = {
    score.name: score
    for score in (
        KeyDiff(),
        KeyNorm(),
        ValueNorm(),
        WindowAttention(),
        Recent(),
        Asked(),
        Learned(),
    )
}
"""Scores by name. A new one is a class and a line here."""

PREFERRED = ("learned", "asked", "key_diff")
"""Scores that are taken where none is named: the first that a model has weights for, or that needs none."""
