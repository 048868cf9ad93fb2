"""What a memory is and how a run reads text with it: frozen settings, checked once, with a JSON round trip."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal, get_args

from ahn.errors import ConfigError

Mode = Literal["full", "window", "ahn", "ct_max", "ct_mean"]
SinkPositions = Literal["absolute", "bounded"]
MemoryPositions = Literal["rope", "none"]


AUTO = "auto"
"""The `anchor_score` that leaves it to the model, which decides when a text begins."""


@dataclasses.dataclass(frozen=True)
class AHNConfig:
    """Settings of a memory and the defaults of the runs that use it.

    Attributes:
        memory: Name of the memory, a key of `ahn.memories.MEMORIES`; looked up when it is attached.
        window: Tokens kept exactly behind the current one, which counts itself; sinks are not part of it.
            A setting of a run, not of the weights: any run may choose another one.
        sinks: First tokens of each sequence that stay exact for ever. Also a setting of a run.
        layers: Indices of the layers that get a memory; the others keep the base model's own attention and its growing
            cache. `None` takes every layer with full attention or, where all layers slide by themselves, every layer.
        sink_positions: "absolute" reads sinks at their true distance (as published); "bounded" never lets that distance
            pass the base model's trained context, so that texts of any length stay in the range it knows.
        memory_positions: "rope" gives the memory the rotated queries and keys (as published); "none" takes them before
            the rotation, so that what is stored does not depend on where it stood. A property of the weights.
        anchors: Tokens that stay exact beyond the window, chosen as they leave it; 0 for none. A setting of a run.
        anchor_score: What they are chosen by, a key of `ahn.scores.SCORES`; looked up when it is attached. "auto" takes
            what the model has weights for, `learned` before `asked`, and `key_diff` where it has none.
        anchor_layers: Indices of the layers that vote on anchors; `None` takes those that the score does best with, see
            `ahn.scores.usual_voters`.

    Raises:
        ConfigError: A value is out of range.

    Source: arXiv 2510.07318, sections 3 and 4; bounded sinks follow StreamingLLM (arXiv 2309.17453).
    """

    memory: str = "gated_delta_net"
    window: int = 32640
    sinks: int = 128
    layers: tuple[int, ...] | None = None
    sink_positions: SinkPositions = "absolute"
    memory_positions: MemoryPositions = "rope"
    anchors: int = 0
    anchor_score: str = AUTO
    anchor_layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.memory, str) or not self.memory:
            raise ConfigError(f"memory must be the name of a memory, not {self.memory!r}")
        _choice("sink_positions", self.sink_positions, get_args(SinkPositions))
        _choice("memory_positions", self.memory_positions, get_args(MemoryPositions))
        check_span(self.window, self.sinks)
        check_anchors(self.anchors, self.anchor_score)
        for name in ("layers", "anchor_layers"):
            _set_layer_indices(self, name)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        values = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> AHNConfig:
        """The settings that `to_dict` wrote.

        Raises:
            ConfigError: A key is unknown or a value is out of range.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ConfigError(f"unknown settings {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        return cls(**values)


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """How one run reads: in which mode, and the exact tokens it keeps.

    Attributes:
        mode: "full" is the base model itself; "window" reads sinks and window only; "ahn" adds the memory; "ct_max" and
            "ct_mean" add the slots of a Compressive Transformer in its place, a baseline that learns nothing.
        window: Tokens of the window, the current one included.
        sinks: Tokens at the start of each sequence that stay exact.
        sink_positions: See `AHNConfig`.
        anchors: See `AHNConfig`; read in the modes "ahn" and "window".
        anchor_score: See `AHNConfig`.
        anchor_layers: See `AHNConfig`.
    """

    mode: Mode
    window: int
    sinks: int
    sink_positions: SinkPositions = "absolute"
    anchors: int = 0
    anchor_score: str = AUTO
    anchor_layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        _choice("mode", self.mode, get_args(Mode))
        _choice("sink_positions", self.sink_positions, get_args(SinkPositions))
        check_span(self.window, self.sinks)
        check_anchors(self.anchors, self.anchor_score)
        _set_layer_indices(self, "anchor_layers")

    @classmethod
    def of(cls, config: AHNConfig, mode: Mode = "ahn") -> RunSettings:
        """The run that a config asks for."""
        names = [field.name for field in dataclasses.fields(cls) if field.name != "mode"]
        return cls(mode, **{name: getattr(config, name) for name in names})

    @property
    def has_anchors(self) -> bool:
        """Whether anchors are chosen and read."""
        return self.mode in ("ahn", "window") and self.anchors > 0


def check_span(window: int, sinks: int) -> None:
    """Checks window and sinks.

    Raises:
        ConfigError: One of them is not a whole number, the window is below 1 or the sinks below 0.
    """
    for name, value, least in (("window", window, 1), ("sinks", sinks, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigError(f"{name} must be a whole number of at least {least}, not {value!r}")


def check_anchors(anchors: int, score: str) -> None:
    """Checks the settings of anchors.

    Raises:
        ConfigError: The number is not a whole one from 0 on, or the score is no name.
    """
    if not isinstance(anchors, int) or isinstance(anchors, bool) or anchors < 0:
        raise ConfigError(f"anchors must be a whole number of at least 0, not {anchors!r}")
    if not isinstance(score, str) or not score:
        raise ConfigError(f"anchor_score must be the name of a score, not {score!r}")


def _choice(name: str, value: object, known: Iterable[str]) -> None:
    known = tuple(known)
    if value not in known:
        raise ConfigError(f"{name} must be one of {', '.join(known)}, not {value!r}")


def _set_layer_indices(settings: object, name: str) -> None:
    """Sorts the layers that a setting names, if it names any."""
    layers = getattr(settings, name)
    if layers is None:
        return
    indices = tuple(layers)
    if not indices or any(not isinstance(i, int) or isinstance(i, bool) or i < 0 for i in indices):
        raise ConfigError(f"{name} must name at least one layer by its index from 0, not {indices!r}")
    if len(set(indices)) != len(indices):
        raise ConfigError(f"{name} names a layer twice: {indices!r}")
    object.__setattr__(settings, name, tuple(sorted(indices)))
