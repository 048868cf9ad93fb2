"""Settings of the making of scores for anchors that need weights; `ahn.training.anchors` makes them."""

from __future__ import annotations

import dataclasses

from ahn.config import Settings, file_setting, setting
from ahn.errors import ConfigError

HELD_OUT = 6
"""One in this many documents is held out."""

QUESTION_TOKENS = 200
"""Tokens of a document that are left for its questions."""

BEYOND_TOKENS = 64
"""Tokens that a text has beyond the window, at least."""


def scores_with_weights() -> tuple[str, ...]:
    """Names of the scores that need weights, which are made here."""
    from ahn.anchors.scores import SCORES

    return tuple(name for name, score in SCORES.items() if score.weight_names)


@dataclasses.dataclass(frozen=True)
class AnchorSettings(Settings):
    """Settings of the making of scores.

    Each field says what it is in its `metadata["help"]`; `ahn train anchors --help` shows those that are options too.

    Raises:
        ConfigError: A value is out of range.
    """

    data: tuple[str, ...] = setting(
        (), "Text, JSONL, a folder of them, or a dataset's name; may be given several times."
    )
    out: str = setting("", "Folder for the weights.")
    model: str = setting("smollm2-135m", "The base model: a built-in name, a folder, or a hub id.", alias="base")
    documents: int = setting(120, "Texts to read; every sixth is held out.", least=HELD_OUT)
    length: int = setting(1280, "Most tokens of a text with its questions.")
    window: int = setting(256, "Tokens behind each token that count as near.", least=8)
    voters: int = setting(3, "How many layers score by learned, from half to two thirds of the depth.", least=1)
    width: int = file_setting(32, "Units of a vote.", least=1)
    left_out: str = setting("fare", "Kind of fact that only the closing table knows.")
    seed: int = setting(0, "Of all random numbers.")
    queries: str | None = setting(
        None, "Weights to take asked from, which learned learns from too.", metavar="FOLDER", unset="they are made"
    )
    scores: tuple[str, ...] = setting(
        ("asked", "learned"), "Joined by commas: asked (trains nothing), learned.", joined=True
    )

    def __post_init__(self) -> None:
        from ahn.training.anchors.documents import FORMATS

        least = {field.name: field.metadata["least"] for field in dataclasses.fields(self)}
        for name, value in {**least, "length": self.window + QUESTION_TOKENS + BEYOND_TOKENS}.items():
            if value is not None and getattr(self, name) < value:
                raise ConfigError(f"{name} must be at least {value}, not {getattr(self, name)}")
        known = scores_with_weights()
        if not self.scores or not set(self.scores) <= set(known):
            raise ConfigError(f"scores must be some of {', '.join(known)}, not {', '.join(self.scores) or 'none'}")
        if self.left_out not in FORMATS:
            raise ConfigError(f"left_out must be one of {', '.join(FORMATS)}, not {self.left_out!r}")
