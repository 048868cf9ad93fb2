"""Sequences of tokens as datasets and batches.

Legend of shapes: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from ahn.distillation import IGNORED
from ahn.models.text import evenly


class Piece(NamedTuple):
    """One sequence of tokens.

    Attributes:
        ids: Token ids.
        labels: The same with -100 where a token does not count, or `None` where all count.
    """

    ids: Sequence[int]
    labels: Sequence[int] | None = None


class Pieces(Dataset[dict[str, torch.Tensor]]):
    """Sequences in memory, four bytes a token.

    Args:
        sequences: The sequences.
    """

    def __init__(self, sequences: Iterable[Piece]) -> None:
        self._sequences = [_packed(piece) for piece in sequences]

    def __len__(self) -> int:
        return len(self._sequences)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return _item(*self._sequences[index])

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(len(ids) for ids, _ in self._sequences)

    def spread(self, tokens: int) -> Pieces:
        """Sequences at even distances that have about this number of tokens together; at least one sequence."""
        count = max(1, min(len(self), tokens * len(self) // max(1, self.tokens)))
        chosen = Pieces([])
        chosen._sequences = evenly(self._sequences, count)
        return chosen

    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return [len(ids) for ids, _ in self._sequences]


class PieceStream(IterableDataset[dict[str, torch.Tensor]]):
    """Sequences that are made while they are read, for texts that do not fit into memory.

    Args:
        sequences: Starts a new pass over the sequences; every call must give the same ones.
    """

    def __init__(self, sequences: Callable[[], Iterable[Piece]]) -> None:
        super().__init__()
        self._open = sequences

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = get_worker_info()
        for number, piece in enumerate(self._open()):
            if worker is None or number % worker.num_workers == worker.id:
                yield _item(*_packed(piece))


def collate(items: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch of sequences, padded on the right where they differ in length.

    Args:
        items: `input_ids`, `[T]`, and optionally `labels`, `[T]`.

    Returns:
        `input_ids` and `labels`, `[B, T]`, and where there is padding `attention_mask`.
    """
    ids = [torch.as_tensor(item["input_ids"]) for item in items]
    labels = [torch.as_tensor(item["labels"]) if "labels" in item else row for item, row in zip(items, ids)]
    longest = max(row.numel() for row in ids)
    batch = {"input_ids": _padded(ids, longest, 0), "labels": _padded(labels, longest, IGNORED)}
    if any(row.numel() < longest for row in ids):
        batch["attention_mask"] = _padded([torch.ones_like(row) for row in ids], longest, 0)
    return batch


def _packed(piece: Piece) -> tuple[Any, Any]:
    """Ids and labels, if it has any, in four bytes each."""
    return tuple(None if each is None else np.asarray(each, dtype=np.int32) for each in piece)  # type: ignore[return-value]


def _item(ids: Any, labels: Any) -> dict[str, torch.Tensor]:
    item = {"input_ids": torch.from_numpy(ids).long()}
    return item if labels is None else {**item, "labels": torch.from_numpy(labels).long()}


def _padded(rows: list[torch.Tensor], length: int, value: int) -> torch.Tensor:
    return torch.stack([torch.nn.functional.pad(row, (0, length - row.numel()), value=value) for row in rows])
