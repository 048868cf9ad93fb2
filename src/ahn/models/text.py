"""Texts as tokens, and a choice of items at even distances, for training and evaluation."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

TEXT_FILES = (".txt", ".md", ".rst", ".text")
"""How the names of files end that are taken for plain text."""

_AT_ONCE = 1 << 16  # characters of a text that are tokenised together; parts of a text share the processors
_LONGEST = 400  # characters of a sentence
# After the end of a sentence with its quotes and brackets, after an empty line, and after a full stop of Chinese.
_ENDS = re.compile(r"(?<=[.!?])[\"'”’)\]]*\s+|\n\s*\n\s*|[。！？]+[”’」』）]*\s*")


def evenly(items: Sequence[T], count: int) -> list[T]:
    """This number of items, at even distances; some of them twice if there are fewer."""
    return [items[(2 * number + 1) * len(items) // (2 * count)] for number in range(count)]


def sentences(text: str) -> list[str]:
    """A text in sentences that join to the whole, each with the white space after it.

    A sentence of more than 400 characters is cut between words, or anywhere if it has none.
    """
    ends = [match.end() for match in _ENDS.finditer(text)]
    parts = (text[start:stop] for start, stop in zip([0, *ends], [*ends, len(text)]))
    return [short for part in parts for short in _shortened(part) if short.strip()]


def text_tokens(text: str, tokenizer: Any) -> list[int]:
    """All tokens of a text, with nothing added.

    Args:
        text: The text, of any length.
        tokenizer: The model's tokenizer.
    """
    parts = list(_parts(text))
    encoded = tokenizer(parts, add_special_tokens=False, verbose=False)["input_ids"] if parts else []
    return [token for part in encoded for token in part]


def text_offsets(text: str, tokenizer: Any) -> list[tuple[int, int]]:
    """First and last + 1 character of each token that `text_tokens` gives.

    Args:
        text: The text, of any length.
        tokenizer: The model's tokenizer, a fast one.
    """
    offsets: list[tuple[int, int]] = []
    start = 0
    for part in _parts(text):
        encoded = tokenizer(part, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets += [(start + first, start + last) for first, last in encoded["offset_mapping"]]
        start += len(part)
    return offsets


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


def _shortened(sentence: str) -> Iterator[str]:
    while len(sentence) > _LONGEST:
        cut = sentence.rfind(" ", 1, _LONGEST) + 1 or _LONGEST
        yield sentence[:cut]
        sentence = sentence[cut:]
    yield sentence
