"""Names of the ways of reading that are compared, and what they stand for; nothing here needs torch."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from ahn.errors import ConfigError

ARMS = ("full", "window", "ahn", "ct_max", "ct_mean", "tail")
"""Names of arms that need no number."""

GRAMMAR = (
    f"{', '.join(ARMS)}, window+64 (a larger window), anchors+64 (64 anchors, no memory) or ahn+64 (memory and anchors)"
)
"""What a name may be, for messages. A score may follow the anchors: `ahn+64:recent`."""

ARMS_HELP = f"Ways to read, joined by commas: {', '.join(ARMS)}, window+64, anchors+64, ahn+64."
"""What the option `--arms` is, in the help of commands."""

_NAME = re.compile(rf"({'|'.join(ARMS)}|anchors)(?:\+([1-9]\d*)(?::([a-z_]+))?)?")


class Arm(NamedTuple):
    """What an arm's name stands for.

    Attributes:
        method: One of `ARMS`; anchors without a memory are read in "window".
        larger: Tokens by which its window is larger than that of the others.
        anchors: Number of anchors.
        anchor_score: What they are chosen by; that of the model's settings if `None`.
    """

    method: str
    larger: int = 0
    anchors: int = 0
    anchor_score: str | None = None

    def settings(self, window: int) -> dict[str, Any]:
        """Settings for `ahn.mode`, where the window that all arms share is this.

        Args:
            window: Tokens of the window.
        """
        score = {} if self.anchor_score is None else {"anchor_score": self.anchor_score}
        if self.method == "window":
            return {"window": window + self.larger, "anchors": self.anchors, **score}
        return {"anchors": self.anchors, **score}


def find_arm(name: str) -> Arm:
    """The arm of a name.

    Raises:
        ConfigError: There is none.
    """
    match = _NAME.fullmatch(name)
    method, digits, score = match.groups() if match else ("", None, None)
    number = int(digits or 0)
    if method == "window" and score is None:
        return Arm(method, larger=number)
    if (method == "ahn" or (method == "anchors" and number)) and (number or score is None):
        return Arm("window" if method == "anchors" else method, anchors=number, anchor_score=score)
    if method in ARMS and digits is None:
        return Arm(method)
    raise ConfigError(f"unknown arm {name!r}; known are {GRAMMAR}")
