"""What is read: whole texts, their beginnings, or pieces of one length at even distances over all texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ahn.evaluation.errors import EvaluationError
from ahn.models.text import evenly

Ids = NDArray[np.int64]


@dataclasses.dataclass(frozen=True, eq=False)
class TokenDocument:
    """Tokens that are read from start to end.

    Attributes:
        name: Of the text, and where in it a piece begins.
        ids: Token ids, `[T]`, the model's opening included.
    """

    name: str
    ids: Ids


def whole(texts: dict[str, Ids], opening: Sequence[int], length: int | None) -> list[TokenDocument]:
    """Every text from its start.

    Args:
        texts: Token ids by name.
        opening: Tokens before every text, such as a begin-of-text token.
        length: Tokens of a document at most, the opening included; all if left out.
    """
    return [TokenDocument(name, _opened(opening, ids)[:length]) for name, ids in texts.items()]


def excerpts(texts: dict[str, Ids], opening: Sequence[int], length: int, count: int) -> list[TokenDocument]:
    """Pieces of exactly one length: all texts are cut, and some taken at even distances over all pieces.

    Args:
        texts: Token ids by name.
        opening: Tokens before every piece.
        length: Tokens of a piece, the opening included.
        count: How many pieces.

    Raises:
        EvaluationError: There are fewer.
    """
    size = max(1, length - len(opening))
    starts = [(name, start) for name, ids in texts.items() for start in range(0, len(ids) - size + 1, size)]
    if len(starts) < count:
        raise EvaluationError(
            f"of {count:,} pieces of {length:,} tokens the texts hold {len(starts):,} only. Ask for fewer with "
            "--pieces, or for shorter ones with --length."
        )
    return [
        TokenDocument(f"{name}, token {start:,}", _opened(opening, texts[name][start : start + size]))
        for name, start in evenly(starts, count)
    ]


def _opened(opening: Sequence[int], ids: Ids) -> Ids:
    return np.concatenate([np.asarray(opening, dtype=np.int64), ids])
