"""What a memory is and how a run reads text with it: frozen settings, declared and checked once, with a round trip."""

from __future__ import annotations

import dataclasses
import difflib
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, TypedDict, TypeVar, get_args

from ahn.errors import ConfigError

_Settings = TypeVar("_Settings", bound="Settings")

Mode = Literal["full", "window", "ahn", "ct_max", "ct_mean"]
SinkPositions = Literal["absolute", "bounded"]
MemoryPositions = Literal["rope", "none"]
Quantize = Literal["int4", "int8", "bf16"]
CacheDtype = Literal["bfloat16", "float16"]
MOST = 2**40
"""What no window and no number of tokens or layers passes."""
AUTO = "auto"
"""The `anchor_score` that leaves it to the model, which decides when a text begins."""
USUAL_ANCHORS = 128
"""Anchors that commands and `from_pretrained` keep where there are weights to choose them by and nobody names a number.
From there on twice as many bytes win little back, see docs/usage.md."""


def setting(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    least: float | None = None,
    choices: Sequence[str] = (),
    factory: Callable[[], Any] | None = None,
    kw_only: bool = False,
    **option: Any,
) -> Any:
    """A field of a settings class, declared once: what it is, what it may be, and its option on the command line.

    Args:
        default: Its value if left out; a field without default and factory must be given.
        help: What it is, for people.
        least: Its smallest value.
        choices: The words that it may be.
        factory: Makes the default, where that is mutable or costs an import.
        kw_only: Whether it is given by its name alone.
        **option: How the command line shows it, see `ahn.cli.options`.
    """
    metadata = {"help": help, "least": least, "choices": tuple(choices), **option}
    if factory is not None:
        return dataclasses.field(default_factory=factory, metadata=metadata, kw_only=kw_only)
    return dataclasses.field(default=default, metadata=metadata, kw_only=kw_only)


def file_setting(default: Any = dataclasses.MISSING, help: str = "", **facts: Any) -> Any:
    """A setting that is no option of the command line: files and Python alone name it. See `setting`."""
    return setting(default, help, option=False, **facts)


def same_setting(settings: type, name: str, **changes: Any) -> Any:
    """The same setting in another class.

    Args:
        settings: The settings class that declares it.
        name: Its name.
        **changes: What is different there, as for `setting`; most often the default.
    """
    field = next(field for field in dataclasses.fields(settings) if field.name == name)
    factory = None if field.default_factory is dataclasses.MISSING else field.default_factory
    default = {} if "default" in changes or "factory" in changes else {"default": field.default, "factory": factory}
    return setting(**{**field.metadata, **default, **changes})


class Settings:
    """A settings class: a frozen dataclass with a round trip through plain values."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON and YAML."""
        values = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls: type[_Settings], values: Mapping[str, Any]) -> _Settings:
        """The settings that `to_dict` wrote, or that a file names.

        Raises:
            ConfigError: A key is unknown or a value is out of range.
        """
        check_names(values, [field.name for field in dataclasses.fields(cls)])
        return cls(**values)


class RunChanges(TypedDict, total=False):
    """What `ahn.mode` may change of a run; `None` leaves it as it was. See `ExactTokens`."""

    window: int | None
    sinks: int | None
    sink_positions: SinkPositions | None
    anchors: int | None
    anchor_score: str | None
    anchor_layers: Sequence[int] | None
    cache_dtype: CacheDtype | None


@dataclasses.dataclass(frozen=True)
class ExactTokens(Settings):
    """Which tokens a run keeps exactly, and what they seem to be far from.

    Attributes:
        window: Tokens kept exactly behind the current one, which counts itself; sinks are not part of it.
        sinks: First tokens of each sequence that always stay exact.
        sink_positions: "absolute" reads sinks at their true distance (as published). "bounded" never lets that distance
            pass the base model's trained context, so that texts of any length stay in the range it knows.
        anchors: Tokens that stay exact beyond the window, chosen as they leave it; 0 for none. Modes "ahn" and
            "window" read them.
        anchor_score: What they are chosen by, a key of `ahn.anchors.scores.SCORES`; looked up when it is attached.
            "auto" takes what the model has weights for, `learned` before `asked`, and `key_diff` where it has none.
        anchor_layers: Indices of the layers whose mean score counts; `None` leaves it to the score, see
            `ahn.anchors.base.Score.default_layers`.
        cache_dtype: What keys and values of sinks, window and anchors are rounded to when they are stored, "bfloat16"
            or "float16"; `None` keeps what the model computes. Attention computes in the model's dtype either way, and
            states of memories stay in float32.

    Raises:
        ConfigError: A value is out of range.

    Source: arXiv 2510.07318, sections 3 and 4; bounded sinks follow StreamingLLM (arXiv 2309.17453).
    """

    window: int = setting(32640, "Tokens kept exactly behind the current one.", least=1)
    sinks: int = setting(128, "First tokens that always stay exact.", least=0)
    sink_positions: SinkPositions = setting(
        "absolute", "How far away the sinks may seem.", choices=get_args(SinkPositions), kw_only=True
    )
    anchors: int = setting(0, "Tokens that stay exact beyond the window.", least=0, kw_only=True)
    anchor_score: str = setting(AUTO, "What anchors are chosen by.", kw_only=True)
    anchor_layers: tuple[int, ...] | None = setting(None, "Layers that vote on anchors.", kw_only=True)
    cache_dtype: CacheDtype | None = setting(
        None,
        "Store sinks, window and anchors in half precision.",
        choices=get_args(CacheDtype),
        unset="as the model computes",
        kw_only=True,
    )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON and YAML; without a `cache_dtype` as before there was one."""
        values = super().to_dict()
        return values if self.cache_dtype is not None else _without(values, "cache_dtype")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), field.metadata.get("least")
            if least is not None:
                check_whole(field.name, value, least)
            if (choices := field.metadata.get("choices")) and not (value is None is field.default):
                check_choice(field.name, value, choices)
        if not isinstance(self.anchor_score, str) or not self.anchor_score:
            raise ConfigError(f"anchor_score must be the name of a score, not {self.anchor_score!r}")
        _set_layer_indices(self, "anchor_layers")


@dataclasses.dataclass(frozen=True)
class RunSettings(ExactTokens):
    """How one run reads: in which mode, and which tokens it keeps exactly.

    Attributes:
        mode: "full" is the base model itself. "window" reads sinks and window only, and "ahn" adds the memory. "ct_max"
            and "ct_mean" add the slots of a Compressive Transformer instead, a baseline that learns nothing.

    Raises:
        ConfigError: A value is out of range.
    """

    mode: Mode = setting("ahn", "What is read beside the exact tokens.", choices=get_args(Mode), kw_only=True)

    @classmethod
    def like(cls, settings: ExactTokens, **changes: Any) -> RunSettings:
        """A run like another one, or like those that a config asks for.

        Args:
            settings: The run, or the config.
            **changes: What is different, by the names of the attributes; what is `None` is not. The mode is "ahn" if
                left out.

        Raises:
            ConfigError: A value is out of range.
        """
        values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(ExactTokens)}
        return cls(**values | {name: value for name, value in changes.items() if value is not None})

    @property
    def has_anchors(self) -> bool:
        """Whether anchors are chosen and read."""
        return self.mode in ("ahn", "window") and self.anchors > 0


@dataclasses.dataclass(frozen=True)
class _MemoryName:
    """What stands first in an `AHNConfig`."""

    memory: str = "gated_delta_net"


@dataclasses.dataclass(frozen=True)
class AHNConfig(ExactTokens, _MemoryName):
    """Settings of a memory, and which tokens its runs keep exactly if they do not choose that themselves.

    Attributes:
        memory: Name of the memory, a key of `ahn.memories.MEMORIES`; looked up when it is attached. Several joined by
            `+` share the layers that get one, from the lowest to the highest: "gated_delta_net+linearized_attention".
        layers: Indices of the layers that get a memory; the others keep the base model's own attention and its growing
            cache. `None` takes every layer with full attention or, where all layers slide by themselves, every layer.
        memory_positions: "rope" gives the memory the rotated queries and keys (as published); "none" takes them before
            the rotation, so that what is stored does not depend on where it stood. A property of the weights.

    All others are as in `ExactTokens`.

    Raises:
        ConfigError: A value is out of range.
    """

    layers: tuple[int, ...] | None = None
    memory_positions: MemoryPositions = setting(
        "rope", "What the memory sees of positions.", choices=get_args(MemoryPositions), kw_only=True
    )

    def __post_init__(self) -> None:
        if not isinstance(self.memory, str) or not self.memory:
            raise ConfigError(f"memory must be the name of a memory, not {self.memory!r}")
        super().__post_init__()
        _set_layer_indices(self, "layers")


def _without(values: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != name}


def check_config(config: object) -> AHNConfig:
    """The settings of a memory that a user gave.

    Raises:
        ConfigError: They are something else, such as a dictionary.
    """
    if not isinstance(config, AHNConfig):
        what = f"the class {config.__name__}" if isinstance(config, type) else type(config).__name__
        raise ConfigError(f"a config must be an ahn.AHNConfig, not {what}; make one by ahn.AHNConfig(window=1024)")
    return config


def check_names(given: Iterable[str], known: Iterable[str]) -> None:
    """Checks the names of settings.

    Raises:
        ConfigError: One is unknown.
    """
    known = sorted(known)
    if unknown := sorted(set(given) - set(known)):
        close = difflib.get_close_matches(unknown[0], known, n=1)
        guess = f" (did you mean {close[0]}?)" if close else ""
        raise ConfigError(f"unknown settings {', '.join(unknown)}{guess}; known are {', '.join(known)}")


def check_whole(name: str, value: object, least: int) -> None:
    """Checks a whole number.

    Raises:
        ConfigError: It is none, too small, or larger than any count of tokens.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name} must be a whole number of at least {least}, not {reprlib.repr(value)}")
    if value > MOST:
        raise ConfigError(f"{name} must be a whole number of at most {MOST}, not {reprlib.repr(value)}")


def check_choice(name: str, value: object, known: Sequence[object]) -> None:
    """Checks that a value is one of a few words.

    Raises:
        ConfigError: It is none of them.
    """
    if value not in known:
        raise ConfigError(f"{name} must be one of {', '.join(str(word) for word in known if word)}, not {value!r}")


def check_span(window: int, sinks: int) -> None:
    """Checks window and sinks.

    Raises:
        ConfigError: One of them is not a whole number, the window is below 1 or the sinks below 0.
    """
    check_whole("window", window, 1)
    check_whole("sinks", sinks, 0)


def _set_layer_indices(settings: object, name: str) -> None:
    """Sorts the layers that a setting names, if it names any."""
    layers = getattr(settings, name)
    if layers is None:
        return
    indices = tuple(layers) if isinstance(layers, Iterable) else ()
    if not indices or any(not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < MOST for i in indices):
        raise ConfigError(f"{name} must name at least one layer by its index from 0, not {reprlib.repr(layers)}")
    if len(set(indices)) != len(indices):
        raise ConfigError(f"{name} names a layer twice: {reprlib.repr(indices)}")
    object.__setattr__(settings, name, tuple(sorted(indices)))
