"""Two scores of a value: is it in the answer, and how does it rank among wrong values of its kind."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ahn.evaluation.arms import ArmReader

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


def log_probability(reader: ArmReader, ids: Sequence[int]) -> float:
    """Log-probability of tokens after what a reader has read, in nats.

    Args:
        reader: The reader; a copy of it reads the tokens.
        ids: Token ids, at least one.
    """
    fork = reader.fork()
    fork.feed(torch.tensor(ids))
    return -float(fork.nll.double().sum())
