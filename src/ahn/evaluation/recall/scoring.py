"""Two scores of a value: is it in the answer, and how does it rank among wrong values of its kind."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

_GROUPED = re.compile(r"(?<=\d),(?=\d{3})")


def found(value: str, answer: str) -> bool:
    """Whether an answer holds a value as a whole word, whatever its case; a number also as "1,234,567".

    Args:
        value: The value that is wanted.
        answer: What the model wrote.
    """
    plain = _GROUPED.sub("", answer) if value.isdecimal() else answer
    return re.search(rf"(?<!\w){re.escape(value)}(?!\w)", plain, re.IGNORECASE) is not None


def rank(scores: Sequence[float]) -> int:
    """Place of the first of several scores, from 1; others that equal it stand before it.

    Args:
        scores: The higher the better; NaN is the lowest.
    """
    best, *others = (-math.inf if math.isnan(score) else score for score in scores)
    return 1 + sum(other >= best for other in others)


def log_probability(reader: Any, ids: Sequence[int], chunk: int) -> float:
    """Log-probability of tokens after what a reader has read, in nats; the reader goes on.

    Args:
        reader: A reader that scores what it is fed, as `ahn.evaluation.arms.arm_reader` gives it with `score=True`.
        ids: Token ids, at least one.
        chunk: Most tokens of a forward pass.
    """
    feed(reader, ids, chunk)
    return -float(reader.nll[-len(ids) :].double().sum())


def feed(reader: Any, ids: Iterable[int], chunk: int) -> None:
    """Lets a reader read tokens, in pieces."""
    import torch

    for piece in torch.tensor(list(ids), dtype=torch.long).split(chunk):
        reader.feed(piece)
