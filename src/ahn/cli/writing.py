"""The words of an answer as soon as they are whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from ahn.generation import text_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def words(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> Iterator[str]:
    """The text of tokens as it grows, in pieces that join to the whole: no half characters, no lost spaces."""
    held: list[int] = []
    first = shown = 0  # the tokens from `first` to `shown` are out already and give the next ones their context
    for token in ids:
        held.append(token)
        before, now = (text_of(tokenizer, held[first:stop]) for stop in (shown, len(held)))
        if len(now) > len(before) and not now.endswith("\ufffd"):
            yield now[len(before) :]
            first, shown = shown, len(held)
    yield text_of(tokenizer, held[first:])[len(text_of(tokenizer, held[first:shown])) :]
