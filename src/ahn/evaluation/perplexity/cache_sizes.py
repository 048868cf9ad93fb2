"""How many bytes each arm keeps of a text, by the cost model, and the window that takes as many."""

from __future__ import annotations

import bisect
import dataclasses
from typing import Any

import ahn
from ahn.attachment import attachment_of
from ahn.cost import cost_model
from ahn.evaluation.arm_names import Arm, find_arm


class CacheSizes:
    """Bytes of the caches of one model after it has read a text.

    State, keys and values are counted, those of anchors too. What a score keeps to choose the anchors is not: a few KB.

    Args:
        model: A model with a memory attached; window and sinks are those of its current settings.
        tokens: Tokens of the text.

    Raises:
        ModelError: The cost model does not know this model.
    """

    def __init__(self, model: Any, tokens: int) -> None:
        self._model, self._tokens = model, tokens
        attachment = attachment_of(model)
        run = attachment.settings
        self._window = run.window
        self._memory = attachment.config.memory
        config = dataclasses.replace(attachment.config, window=run.window, sinks=run.sinks, anchors=0)
        self._counted = cost_model(model.config, config, dtype=attachment.layers[0].dtype)

    def bytes_of(self, arm: str) -> int | None:
        """Bytes of an arm's cache; `None` for `tail`, which keeps its text as tokens."""
        kind = find_arm(arm)
        methods = {"ahn": self._memory, "ct_max": "ct", "ct_mean": "ct"}
        return None if kind.method == "tail" else self._bytes(methods.get(kind.method, kind.method), kind)

    def equal_window(self, arm: str) -> str | None:
        """The arm whose larger window takes as many bytes, or up to a token's more: "window+110".

        Args:
            arm: Name of an arm with a memory or anchors.

        Returns:
            `None` for an arm without them, and where the whole text takes less.

        Raises:
            ConfigError: The model cannot read with so large a window.
        """
        kind, target = find_arm(arm), self.bytes_of(arm)
        if target is None or not (kind.method == "ahn" or kind.anchors):
            return None
        sizes = range(1, self._tokens)
        index = bisect.bisect_left(sizes, target, key=lambda size: self._bytes("window", Arm("window", larger=size)))
        if index == len(sizes):
            return None
        with ahn.mode(self._model, "window", window=self._window + sizes[index]):  # checks it
            return f"window+{sizes[index]}"

    def _bytes(self, method: str, arm: Arm) -> int:
        changes = {"window": self._window + arm.larger, "anchors": arm.anchors}
        return self._counted.with_run(**changes).cache_bytes(method, self._tokens)
