"""What attaching leaves on a model: where the memories sit, and which settings a run has.

The settings of a run live beside the model, never in its config. A call takes those of the innermost `mode` block that
is open around it. A thread without a block of its own takes those of the block that was opened last anywhere. Without
any block the memory's config holds. A cache keeps the settings it was made with.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ahn.anchors.base import Score
from ahn.anchors.policy import check_anchors
from ahn.backbone import compat
from ahn.backbone.rotary import Rotation
from ahn.config import AHNConfig, Mode, RunChanges, RunSettings, check_names
from ahn.errors import ConfigError, ModelError
from ahn.memories import Memory, MemoryShape
from ahn.quantization import is_quantized, refuse_saving

if TYPE_CHECKING:
    from typing_extensions import Unpack

COMPUTED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Types that attention is computed in; weights of any other are quantised."""
MODULE = "memory"
"""Name of the memory inside its attention module, hence in the model's state dict."""
SCORE_WEIGHTS = "anchor_votes"
"""Name of the weights of anchor scores there; the word is older than the score."""
_ATTRIBUTE = "_ahn_attachment"


SAVERS: list[Callable[[nn.Module, str], None]] = []
"""What writes a memory beside the base model that `save_pretrained` writes; `ahn.checkpoint` puts itself here."""


@dataclasses.dataclass(eq=False)
class AttentionLayer:
    """One attention layer of the base model.

    Attributes:
        module: The attention module.
        index: Its layer index, from 0.
        shape: Sizes of the layer.
        found_dtype: What it computed in when the memory was attached.
        found_device: Where it computed then.
        sliding_window: Tokens that the base model's layer itself sees, or `None` for full attention.
        built: The memory that was made for it; `None` where the layer keeps the base model's own attention.
        rotation: How to undo its rotary positions; `None` where it has none or nothing asks for it.
        anchor_weights: Its weights of anchor scores, by score; `None` where it has none.
    """

    module: nn.Module
    index: int
    shape: MemoryShape
    found_dtype: torch.dtype
    found_device: torch.device
    sliding_window: int | None
    built: Memory | None = None
    rotation: Rotation | None = None
    anchor_weights: nn.ModuleDict | None = None

    @property
    def memory(self) -> Memory | None:
        """The memory in the model's tree, where other libraries may have wrapped it, or `None` where there is none."""
        if self.built is None:
            return None
        memory: Memory = compat.active_module(self.module._modules.get(MODULE) or self.built)
        return memory

    @property
    def dtype(self) -> torch.dtype:
        """What the layer computes in: that of its weights unless they are quantised."""
        kinds = (tensor.dtype for tensor in self.module.parameters())
        return next((kind for kind in kinds if kind in COMPUTED), self.found_dtype)

    @property
    def device(self) -> torch.device:
        """Where the layer computes: where its weights are unless they are offloaded."""
        weight = next(self.module.parameters(), None)
        return self.found_device if weight is None or weight.is_meta else weight.device

    def score_weights(self, score: str) -> nn.Module | None:
        """Its weights of one anchor score, or `None` where it has none."""
        return self.anchor_weights[score] if self.anchor_weights is not None and score in self.anchor_weights else None


@dataclasses.dataclass(eq=False)
class Block:
    """A `mode` block that is open.

    Attributes:
        attachment: The model's attachment.
        settings: How the model reads inside of it.
    """

    attachment: Attachment
    settings: RunSettings


_OPEN: list[Block] = []  # of all threads, in the order in which they were opened
_AROUND: ContextVar[tuple[Block, ...]] = ContextVar("ahn_blocks", default=())  # those around the code that runs


@dataclasses.dataclass(eq=False)
class Attachment:
    """Everything that attaching a memory to a model set up.

    Attributes:
        config: The memory's settings.
        layers: The model's attention layers, in order.
        base_implementation: Name of the attention implementation that the model had before.
        trained_context: Positions that the base model was trained on.
        rotation_problem: Why the rotary positions of this model cannot be undone, or `None` if they can or it has none.
        position_limit: Tokens that a model with a table of positions can read at all, or `None`.
        is_wrapped: Whether the model holds its decoder inside a wrapper, as those that also see images do.
        handles: The hooks that were registered.
        implementations: Every config that was changed, with the attention implementation it named before.
    """

    config: AHNConfig
    layers: tuple[AttentionLayer, ...]
    base_implementation: str
    trained_context: int
    rotation_problem: str | None = None
    position_limit: int | None = None
    is_wrapped: bool = False
    handles: list[RemovableHandle] = dataclasses.field(default_factory=list)
    implementations: list[tuple[Any, str | None]] = dataclasses.field(default_factory=list)

    @property
    def settings(self) -> RunSettings:
        """Settings of a run that starts now: those of the innermost `mode`, or the config's."""
        around = [block for block in _AROUND.get() if block in _OPEN]
        blocks = [block for block in (*_OPEN, *around) if block.attachment is self]
        return blocks[-1].settings if blocks else RunSettings.like(self.config)

    def layer(self, index: int) -> AttentionLayer:
        """The layer of an index."""
        return self.layers[index]

    @property
    def memories(self) -> list[Memory]:
        """The memories of all layers that have one, in order."""
        return [memory for layer in self.layers if (memory := layer.memory) is not None]

    @property
    def exact_tokens(self) -> int:
        """Tokens of the longest text that every layer reads exactly."""
        total = self.config.sinks + self.config.window
        return min((total, *(layer.sliding_window for layer in self.layers if layer.sliding_window)))

    @property
    def tolerance(self) -> float:
        """Share of their mean by which outputs inside the window may differ from the base model's: rounding."""
        exact = self.config.cache_dtype is None and all(layer.dtype == torch.float32 for layer in self.layers)
        return 1e-3 if exact else 5e-2

    @property
    def keeps_base_layers(self) -> bool:
        """Whether some layers have no memory."""
        return any(layer.built is None for layer in self.layers)

    @property
    def weighted_layers(self) -> dict[int, frozenset[str]]:
        """For the index of each layer with a memory, in order, the anchor scores that it has weights for."""
        return {layer.index: frozenset(layer.anchor_weights or ()) for layer in self.layers if layer.memory is not None}

    def check(self, settings: RunSettings, score: Score | None = None) -> None:
        """Checks that this model can be read with these settings; mode "full" has no sinks, window and anchors.

        Args:
            settings: The settings.
            score: What anchors are chosen by, where it is not what the settings say.

        Raises:
            ConfigError: The rotary positions must be undone and cannot be, bounded sinks do not fit into the trained
                context with the window, the sinks leave no window in a layer that slides by itself, or the anchors
                cannot be chosen.
        """
        if settings.mode != "full":
            self._check_span(settings)
        check_anchors(settings, self.weighted_layers, self._shortest_window(settings), self.rotation_problem, score)

    def _check_span(self, settings: RunSettings) -> None:
        """Checks positions, sinks and window; see `check`."""
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
        for layer in self.layers:
            if layer.memory is not None and layer.sliding_window is not None and layer.sliding_window <= settings.sinks:
                raise ConfigError(
                    f"{settings.sinks} sinks leave no window in layer {layer.index}, which slides over "
                    f"{layer.sliding_window} tokens by itself; use fewer sinks or leave it out with layers="
                )

    def _shortest_window(self, settings: RunSettings) -> int:
        """Tokens of the shortest window of a layer with a memory."""
        served = [layer.sliding_window for layer in self.layers if layer.memory is not None]
        return min([settings.window, *(own - settings.sinks for own in served if own is not None)])


def set_attachment(model: nn.Module, attachment: Attachment | None) -> None:
    """Notes on a module what was attached to it; `None` removes the note."""
    if attachment is None:
        model.__dict__.pop(_ATTRIBUTE, None)
    else:
        model.__dict__[_ATTRIBUTE] = attachment


def find_attachment(model: nn.Module) -> Attachment | None:
    """What is attached to a model, or `None`."""
    attachment: Attachment | None = getattr(compat.unwrap(model), _ATTRIBUTE, None)
    return attachment


def attachment_of(model: nn.Module) -> Attachment:
    """What is attached to a model.

    Raises:
        ModelError: Nothing is.
    """
    if (attachment := find_attachment(model)) is None:
        raise ModelError(f"no memory is attached to this {type(model).__name__}; call ahn.attach(model) first")
    return attachment


def save_with_memory(model: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
    """Saves the base model as transformers does, and the memory beside it, where `ahn.from_pretrained` finds both.

    Args:
        model: A model with a memory attached.
        save_directory: The folder.
        *args: As for `save_pretrained` of transformers.
        **kwargs: The same.

    Raises:
        ModelError: The weights of the base model are stored in few bits.
    """
    if is_quantized(model):
        refuse_saving()
    tensors = kwargs.pop("state_dict", None) or model.state_dict()
    marks = (f".{MODULE}.", f".{SCORE_WEIGHTS}.")
    base = {name: tensor for name, tensor in tensors.items() if not any(mark in name for mark in marks)}
    type(model).save_pretrained(model, save_directory, *args, state_dict=base, **kwargs)
    for save in SAVERS:
        save(model, os.fspath(save_directory))


@contextlib.contextmanager
def mode(
    model: nn.Module,
    name: Mode,
    **changes: Unpack[RunChanges],
) -> Iterator[None]:
    """Reads in another mode, or with another window, inside a `with` block.

    A cache that is already alive keeps the settings it was made with. Blocks may be nested. A block also holds in
    threads that have no block of their own, as when `model.generate` streams from a thread that was started inside it.
    Threads and tasks with blocks of their own do not see each other's.

    Args:
        model: A model with a memory attached.
        name: "full" is the base model itself. "window" reads sinks and window, and "ahn" adds the memory. "ct_max" and
            "ct_mean" read the slots of a Compressive Transformer instead of the memory, see `ahn.cache.compressive`.
        **changes: `window`, `sinks`, `sink_positions`, `anchors`, `anchor_score`, `anchor_layers` and
            `cache_dtype`, see `ahn.config.ExactTokens`; what is left out or `None` is as before.

    Raises:
        ModelError: No memory is attached.
        ConfigError: A name is unknown, a value is out of range, the mode has no anchors, or the model cannot be read
            with these settings.
    """
    attachment = attachment_of(model)
    check_names(changes, RunChanges.__annotations__)
    settings = RunSettings.like(attachment.settings, mode=name, **changes)
    if changes.get("anchors") and name in ("ct_max", "ct_mean"):
        raise ConfigError(
            f'mode "{name}" has no anchors but slots: leave anchors out, or read in mode "ahn" or "window"'
        )
    attachment.check(settings)
    block = Block(attachment, settings)
    _OPEN.append(block)
    _AROUND.set((*_AROUND.get(), block))
    try:
        yield
    finally:  # blocks of interleaved generators need not end in the order in which they began
        _OPEN.remove(block)
        _AROUND.set(tuple(other for other in _AROUND.get() if other is not block))
