"""The weights that choose the anchors of a training: those that are named, those that ship, or new ones."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import ahn
from ahn.attachment import attachment_of
from ahn.checkpoint.anchors import ANCHORS, score_weights_for
from ahn.errors import ConfigError
from ahn.training.anchor_settings import BEYOND_TOKENS, HELD_OUT, QUESTION_TOKENS, AnchorSettings
from ahn.training.anchors.run import train_anchors
from ahn.training.log import Say
from ahn.training.settings import TrainSettings

FOLDER = "anchors"
"""Folder of new weights, within that of the training."""
_SCORE = "learned"


def load_score_weights(model: Any, settings: TrainSettings, say: Say) -> bool:
    """Gives a model the weights that choose the anchors of its training; they are made first where there are none.

    Args:
        model: The base model with a memory attached, whose weights play no part.
        settings: Settings of the training.
        say: Is told what is done.

    Returns:
        Whether the training has anchors.

    Raises:
        ConfigError: New weights are needed, and several processes run, or the texts are too short.
        DataError: The texts cannot be read, or are too few.
        CheckpointError: The weights cannot be loaded or written.
    """
    has_anchors = any(settings.anchors)
    if settings.anchor_weights is not None:
        ahn.load_anchors(model, settings.anchor_weights)
    elif has_anchors:
        _load_or_make(model, settings, say)
    return has_anchors


def _load_or_make(model: Any, settings: TrainSettings, say: Say) -> None:
    folder = Path(settings.out).expanduser() / FOLDER
    weights = folder if (folder / ANCHORS.config).is_file() else score_weights_for(None, settings.model)
    if weights is None:
        _make(model, settings, folder, say)
    ahn.load_anchors(model, weights or folder)  # also new ones, which are rounded in their file


def _make(model: Any, settings: TrainSettings, folder: Path, say: Say) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "several processes cannot make the weights that choose anchors; make them first with `ahn train anchors`, "
            "and name their folder as anchor_weights"
        )
    say(f"making the weights that choose anchors from {settings.anchor_documents} texts")
    longest = attachment_of(model).trained_context
    train_anchors(_anchor_settings(settings, folder, longest), say, model)


def _anchor_settings(settings: TrainSettings, folder: Path, longest: int) -> AnchorSettings:
    """As `ahn train anchors` would be called for this training, with texts that the model can read."""
    shortest = settings.window + QUESTION_TOKENS + BEYOND_TOKENS
    return AnchorSettings(
        data=settings.data,
        out=str(folder),
        model=settings.model,
        documents=max(HELD_OUT, settings.anchor_documents),
        length=max(shortest, min(AnchorSettings.length, longest)),
        window=settings.window,
        seed=settings.seed,
        scores=(_SCORE,),
    )
