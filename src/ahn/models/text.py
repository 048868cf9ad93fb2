"""Texts as tokens, and a choice of items at even distances, for training and evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

TEXT_FILES = (".txt", ".md", ".rst", ".text")
"""How the names of files end that are taken for plain text."""

_AT_ONCE = 1 << 16  # characters of a text that are tokenised together; parts of a text share the processors


def evenly(items: Sequence[T], count: int) -> list[T]:
    """This number of items, at even distances; some of them twice if there are fewer."""
    return [items[(2 * number + 1) * len(items) // (2 * count)] for number in range(count)]


def text_tokens(text: str, tokenizer: Any) -> list[int]:
    """All tokens of a text, with nothing added.

    Args:
        text: The text, of any length.
        tokenizer: The model's tokenizer.
    """
    parts = list(_parts(text))
    encoded = tokenizer(parts, add_special_tokens=False, verbose=False)["input_ids"] if parts else []
    return [token for part in encoded for token in part]


def opening_of(tokenizer: Any) -> list[int]:
    """What a tokenizer puts before every text, such as a begin-of-text token."""
    first = tokenizer.bos_token_id
    return [first] if first is not None and tokenizer("a")["input_ids"][:1] == [first] else []


def _parts(text: str) -> Iterator[str]:
    """A text in parts that end where a line ends, as far as it has lines."""
    start = 0
    while start < len(text):
        end = min(len(text), start + _AT_ONCE)
        if end < len(text) and (line := text.rfind("\n", start, end)) > start:
            end = line  # a line break belongs to what follows it, as tokenizers see it
        yield text[start:end]
        start = end
