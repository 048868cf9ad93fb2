"""Names of the ways of reading that are compared, and what they stand for; nothing here needs torch."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from ahn.errors import ConfigError

ARMS = ("full", "window", "ahn", "ct_max", "ct_mean", "tail")
"""Names of the arms, to some of which a number may be added: `window+64`, `ahn+64`, `ahn+64:recent`."""

GRAMMAR = f"{', '.join(ARMS)}, window+64 (a larger window) or ahn+64 (64 anchors)"
"""What a name may be, for messages."""

ARMS_HELP = f"Ways to read, joined by commas: {', '.join(ARMS)}, window+64, ahn+64."
"""What the option `--arms` is, in the help of commands."""

_NAME = re.compile(rf"({'|'.join(ARMS)})(?:\+(\d+)(?::([a-z_]+))?)?")


class Arm(NamedTuple):
    """What an arm's name stands for.

    Attributes:
        method: One of `ARMS`.
        added: Tokens by which `window` is larger, or anchors of `ahn`.
        anchor_score: What the anchors are chosen by; that of the model's settings if `None`.
    """

    method: str
    added: int = 0
    anchor_score: str | None = None

    @property
    def has_anchors(self) -> bool:
        """Whether it keeps anchors."""
        return self.method == "ahn" and self.added > 0

    def settings(self, window: int) -> dict[str, Any]:
        """Settings for `ahn.mode`, where the window that all arms share is this.

        Args:
            window: Tokens of the window.
        """
        if self.method == "window":
            return {"window": window + self.added}
        if self.method != "ahn":
            return {}
        score = {} if self.anchor_score is None else {"anchor_score": self.anchor_score}
        return {"anchors": self.added, **score} if self.added else {}


def find_arm(name: str) -> Arm:
    """The arm of a name.

    Raises:
        ConfigError: There is none.
    """
    match = _NAME.fullmatch(name)
    method, added, score = match.groups() if match else ("", None, None)
    takes = {"window": score is None, "ahn": True}.get(method, added is None)
    if not match or not takes or (added is not None and int(added) < 1):
        raise ConfigError(f"unknown arm {name!r}; known are {GRAMMAR}")
    return Arm(method, int(added or 0), score)
