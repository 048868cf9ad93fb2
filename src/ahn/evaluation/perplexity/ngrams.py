"""Which tokens complete something that stood in the text before: found by counting, without a model.

A token closes an n-gram, itself and the n - 1 tokens before it. Where the n-gram is rare, the language alone does not
tell the token, but an earlier occurrence does. By where that stood when the token was predicted, tokens are in groups:

- `evicted`: the last occurrence has left the window, and was no sink. A memory may hold it.
- `window`: it stands in the window, or among the sinks.
- `never`: there is none; the same kind of token, met for the first time.
- `often`: the n-gram is not rare.

The split follows the one of associative recall in Zoology (arXiv 2312.04927), which goes by counts too, never by the
loss; there a pair is rare by its count in the training data, here an n-gram is by its count in all texts given.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ahn.evaluation.perplexity.documents import Ids

GROUPS = ("evicted", "window", "never", "often")
"""Names of the groups, in the order of their numbers."""

EVICTED, WINDOW, NEVER, OFTEN = range(4)


def group_tokens(
    texts: Sequence[Ids], documents: Sequence[Ids], n: int, most: int, sinks: int, window: int
) -> list[NDArray[np.int8]]:
    """The group of every token but the first of each document.

    Args:
        texts: All texts that are given, `[T]` each, whole even where only parts of them are read: they are counted.
        documents: What is read of them, `[T]` each.
        n: Tokens of an n-gram, at least 2.
        most: Occurrences in all texts up to which an n-gram is rare.
        sinks: Tokens at the start that stay in sight.
        window: Tokens behind the querying one that are in sight, itself counted.

    Returns:
        Numbers of `GROUPS`, `[T - 1]` for each document: element `i` for token `i + 1`, which token `i` predicts.
    """
    numbers = _number_ngrams([*texts, *documents], n)
    counted, read = numbers[: len(texts)], numbers[len(texts) :]
    kinds = 1 + max((int(each.max()) for each in numbers if each.size), default=0)
    counts = sum((np.bincount(each, minlength=kinds) for each in counted), np.zeros(kinds, dtype=np.int64))
    by_document = []
    for document, closed in zip(documents, read, strict=True):
        groups = np.full(max(0, len(document) - 1), NEVER, dtype=np.int8)
        ends = np.arange(n - 1, n - 1 + len(closed))  # positions of the tokens that close an n-gram
        before = _last_before(closed)
        last = ends[before]
        visible = (last < sinks) | (last > ends - 1 - window)
        known = np.where(before < 0, NEVER, np.where(visible, WINDOW, EVICTED))
        groups[ends - 1] = np.where(counts[closed] > most, OFTEN, known)
        by_document.append(groups)
    return by_document


def _number_ngrams(sequences: Sequence[Ids], n: int) -> list[Ids]:
    """A number for every n-gram, the same for the same tokens, `[T - n + 1]` for each sequence."""
    numbers = [np.asarray(each, dtype=np.int64) for each in sequences]
    for length in range(2, n + 1):
        width = 1 + max((int(each.max()) for each in sequences if len(each)), default=0)
        # The n-gram one shorter and the token after it: their numbers stay small enough to share 64 bits.
        pairs = [each[:-1] * width + np.asarray(ids)[length - 1 :] for each, ids in zip(numbers, sequences)]
        _, joined = np.unique(np.concatenate(pairs), return_inverse=True)
        numbers = np.split(joined.reshape(-1), np.cumsum([len(each) for each in pairs])[:-1])
    return numbers


def _last_before(numbers: Ids) -> Ids:
    """For each element the place of the last equal one before it, or -1."""
    order = np.argsort(numbers, kind="stable")
    before = np.full(len(numbers), -1, dtype=np.int64)
    same = numbers[order[1:]] == numbers[order[:-1]]
    before[order[1:][same]] = order[:-1][same]
    return before
