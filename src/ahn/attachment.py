"""What attaching leaves on a model: where the memories sit, and which settings a run has.

The settings of a run live in a context variable, never in the model's config: `mode` may be nested, and threads do not
see each other's.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from ahn.anchors.scores import PREFERRED, SCORES, default_layers, find_score
from ahn.backbone.rotary import Rotation
from ahn.config import AUTO, AHNConfig, Mode, RunSettings, SinkPositions
from ahn.errors import ConfigError, ModelError
from ahn.memories import Memory, MemoryShape

_OVERRIDES: ContextVar[Mapping[int, RunSettings]] = ContextVar("ahn_modes", default={})  # noqa: B039 (never mutated)
_ATTRIBUTE = "_ahn_attachment"


@dataclasses.dataclass(eq=False)
class Site:
    """One attention layer of the base model.

    Attributes:
        module: The attention module.
        index: Its layer index, from 0.
        shape: Sizes of the layer.
        sliding_window: Tokens that the base model's layer itself sees, or `None` for full attention.
        memory: Its memory, or `None` where the layer keeps the base model's own attention.
        rotation: How to undo its rotary positions; `None` where it has none or nothing asks for it.
        anchor_weights: Its weights for votes on anchors, by score; `None` where it has none.
    """

    module: nn.Module
    index: int
    shape: MemoryShape
    sliding_window: int | None
    memory: Memory | None = None
    rotation: Rotation | None = None
    anchor_weights: nn.ModuleDict | None = None

    def score_weights(self, score: str) -> nn.Module | None:
        """Its weights for votes by a score, or `None` where it has none."""
        return self.anchor_weights[score] if self.anchor_weights is not None and score in self.anchor_weights else None


@dataclasses.dataclass(eq=False)
class Attachment:
    """Everything that attaching a memory to a model set up.

    Attributes:
        config: The memory's settings.
        sites: The model's attention layers, in order.
        base_implementation: Name of the attention implementation that the model had before.
        trained_context: Positions that the base model was trained on.
        rotation_problem: Why the rotary positions of this model cannot be undone, or `None` if they can or it has none.
        position_limit: Tokens that a model with a table of positions can read at all, or `None`.
        handles: The hooks that were registered.
        implementations: Every config that was changed, with the attention implementation it named before.
    """

    config: AHNConfig
    sites: tuple[Site, ...]
    base_implementation: str
    trained_context: int
    rotation_problem: str | None = None
    position_limit: int | None = None
    handles: list[RemovableHandle] = dataclasses.field(default_factory=list)
    implementations: list[tuple[Any, str | None]] = dataclasses.field(default_factory=list)

    @property
    def settings(self) -> RunSettings:
        """Settings of a run that starts now: those of the innermost `mode`, or the config's."""
        return self._decided(self.given)

    @property
    def given(self) -> RunSettings:
        """The same as they were given: with anchors, the score may be "auto"."""
        return _OVERRIDES.get().get(id(self), RunSettings.of(self.config))

    def site(self, index: int) -> Site:
        """The site of a layer."""
        return self.sites[index]

    @property
    def keeps_base_layers(self) -> bool:
        """Whether some layers have no memory."""
        return any(site.memory is None for site in self.sites)

    def check(self, settings: RunSettings) -> None:
        """Checks that this model can be read with these settings.

        Raises:
            ConfigError: The rotary positions must be undone and cannot be, bounded sinks do not fit into the trained
                context with the window, or the sinks leave no window in a layer that slides by itself.
        """
        undoes = settings.sink_positions == "bounded" or self.config.memory_positions == "none"
        if undoes and self.rotation_problem:
            raise ConfigError(
                f"the rotary positions of this model cannot be undone ({self.rotation_problem}); use "
                'sink_positions="absolute" and memory_positions="rope"'
            )
        span = settings.sinks + settings.window
        if settings.sink_positions == "bounded" and span > self.trained_context:
            raise ConfigError(
                f"sinks + window = {span} exceed the {self.trained_context} positions that the base model was trained "
                'on, so bounded sinks cannot precede the window; use a smaller window or sink_positions="absolute"'
            )
        self._check_anchors(self._decided(settings))
        for site in self.sites:
            if site.memory is not None and site.sliding_window is not None and site.sliding_window <= settings.sinks:
                raise ConfigError(
                    f"{settings.sinks} sinks leave no window in layer {site.index}, which slides over "
                    f"{site.sliding_window} tokens by itself; use fewer sinks or leave it out with layers="
                )

    def scoring_layers(self, settings: RunSettings) -> frozenset[int]:
        """Indices of the layers that vote on anchors.

        Raises:
            ConfigError: The score needs weights, and no layer has any.
        """
        score = settings.anchor_score
        weighted = find_score(score).weights is not None
        able = [site.index for site in self._served() if not weighted or site.score_weights(score) is not None]
        if settings.anchor_layers is not None:
            able = [index for index in able if index in settings.anchor_layers]
        elif not weighted:
            able = default_layers(score, able)
        if not able:
            where = "this model" if settings.anchor_layers is None else f"layers {list(settings.anchor_layers)}"
            raise ConfigError(
                f'anchor_score="{score}" has no weights on {where}; load some with '
                "ahn.load_anchors(model, name), or choose anchors by key_diff"
            )
        return frozenset(able)

    def _served(self) -> list[Site]:
        """Layers with a memory."""
        return [site for site in self.sites if site.memory is not None]

    def _decided(self, settings: RunSettings) -> RunSettings:
        """Settings that name the score, where there are anchors."""
        if not settings.anchors or settings.anchor_score != AUTO:
            return settings
        layers = settings.anchor_layers
        scorers = [site for site in self._served() if layers is None or site.index in layers]
        able = (
            name
            for name in PREFERRED
            if SCORES[name].weights is None or any(site.score_weights(name) is not None for site in scorers)
        )
        return dataclasses.replace(settings, anchor_score=next(able))

    def _check_anchors(self, settings: RunSettings) -> None:
        if settings.anchor_score == AUTO:
            return
        score = find_score(settings.anchor_score)
        if not settings.anchors:
            return
        served = [site.index for site in self._served()]
        if unknown := sorted(set(settings.anchor_layers or ()) - set(served)):
            raise ConfigError(f"anchor_layers names {unknown}, but the layers with a memory are {served}")
        if score.pre_rope and self.rotation_problem:
            others = ", ".join(name for name, other in SCORES.items() if not other.pre_rope)
            raise ConfigError(
                f"the rotary positions of this model cannot be undone ({self.rotation_problem}), as anchor_score="
                f'"{settings.anchor_score}" asks; use one of {others}'
            )
        needed = score.span(settings.window)
        if settings.window <= needed:
            raise ConfigError(f"anchors need a window of more than {needed} tokens, not {settings.window}")


def set_attachment(model: nn.Module, attachment: Attachment | None) -> None:
    """Notes on a module what was attached to it; `None` removes the note."""
    if attachment is None:
        model.__dict__.pop(_ATTRIBUTE, None)
    else:
        model.__dict__[_ATTRIBUTE] = attachment


def find_attachment(model: nn.Module) -> Attachment | None:
    """What is attached to a model, or `None`."""
    found: Attachment | None = getattr(_unwrap(model), _ATTRIBUTE, None)
    return found


def attachment_of(model: nn.Module) -> Attachment:
    """What is attached to a model.

    Raises:
        ModelError: Nothing is.
    """
    if (found := find_attachment(model)) is None:
        raise ModelError(f"no memory is attached to this {type(model).__name__}; call ahn.attach(model) first")
    return found


@contextlib.contextmanager
def mode(
    model: nn.Module,
    name: Mode,
    *,
    window: int | None = None,
    sinks: int | None = None,
    sink_positions: SinkPositions | None = None,
    anchors: int | None = None,
    anchor_score: str | None = None,
    anchor_layers: Sequence[int] | None = None,
) -> Iterator[None]:
    """Reads in another mode, or with another window, inside a `with` block.

    A cache that is already alive keeps the settings it was made with. Blocks may be nested, and a block in one thread
    or task does not touch the others.

    Args:
        model: A model with a memory attached.
        name: "full" is the base model itself, "window" reads sinks and window with the memory silent, "ahn" reads all;
            "ct_max" and "ct_mean" read the slots of a Compressive Transformer in place of the memory, see
            `ahn.cache.compressive`.
        window: Tokens of the window; as before if left out.
        sinks: Number of sinks; as before if left out.
        sink_positions: "absolute" or "bounded"; as before if left out.
        anchors: Number of anchors; as before if left out.
        anchor_score: What they are chosen by; as before if left out.
        anchor_layers: Layers that vote on them; as before if left out.

    Raises:
        ModelError: No memory is attached.
        ConfigError: A value is out of range, or the model cannot be read with these settings.
    """
    attachment = attachment_of(model)
    changes: dict[str, Any] = {
        "window": window,
        "sinks": sinks,
        "sink_positions": sink_positions,
        "anchors": anchors,
        "anchor_score": anchor_score,
        "anchor_layers": None if anchor_layers is None else tuple(anchor_layers),
    }
    given = {key: value for key, value in changes.items() if value is not None}
    settings = dataclasses.replace(attachment.given, mode=name, **given)
    attachment.check(settings)
    token = _OVERRIDES.set({**_OVERRIDES.get(), id(attachment): settings})
    try:
        yield
    finally:
        _OVERRIDES.reset(token)


def _unwrap(model: nn.Module) -> nn.Module:
    """The model inside the wrapper of DistributedDataParallel, or the model itself."""
    inner = getattr(model, "module", None)
    return inner if isinstance(inner, nn.Module) and not hasattr(model, _ATTRIBUTE) else model
