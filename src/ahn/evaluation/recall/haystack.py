"""The text in which needles are hidden, cut where a sentence ends."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence

_LONGEST = 400  # characters; what goes on for longer is cut between words
# After the end of a sentence with its quotes and brackets, after an empty line, and after a full stop of Chinese.
_ENDS = re.compile(r"(?<=[.!?])[\"'”’)\]]*\s+|\n\s*\n\s*|[。！？]+[”’」』）]*\s*")


def sentences(text: str) -> list[str]:
    """A text in pieces that join to the whole, each with the white space after it.

    Args:
        text: Any text. A sentence of more than 400 characters is cut between words, or anywhere if it has none.
    """
    ends = [match.end() for match in _ENDS.finditer(text)]
    pieces = (text[start:stop] for start, stop in zip([0, *ends], [*ends, len(text)]))
    return [part for piece in pieces for part in _short(piece) if part.strip()]


def from_text(pieces: Sequence[str], rng: random.Random) -> Iterator[str]:
    """Sentences from a random one on, round the end of the text, each once."""
    start = rng.randrange(len(pieces))
    for index in range(len(pieces)):
        yield pieces[(start + index) % len(pieces)]


def _short(piece: str) -> Iterator[str]:
    while len(piece) > _LONGEST:
        cut = piece.rfind(" ", 1, _LONGEST) + 1 or _LONGEST
        yield piece[:cut]
        piece = piece[cut:]
    yield piece
