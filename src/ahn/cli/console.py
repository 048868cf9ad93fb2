"""What reaches a terminal: text, without the control characters that a file or a model may have in it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.segment import Segment

# All but tabs and ends of lines, and those that turn the direction of what follows.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """A text with its control characters written out as Python writes them."""
    return _CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)


class SafeConsole(Console):
    """A console that writes control characters of what it is given out."""

    def render(self, renderable: Any, options: Any = None) -> Iterable[Segment]:
        """See `Console.render`."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))
