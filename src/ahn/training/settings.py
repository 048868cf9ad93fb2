"""Everything that makes a training what it is, in one flat list of settings that YAML files and options fill."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ahn.config import AHNConfig, MemoryPositions, SinkPositions
from ahn.errors import ConfigError
from ahn.training.data import Cut
from ahn.training.draws import SINKS, TOTALS, Span, SpanDraw
from ahn.training.losses import check_weights
from ahn.training.sources import DataQuery
from ahn.training.votes import AnchorDraw

STAGES = ("transfer", "distill")
_COUNTS = (
    "steps", "transfer_steps", "length", "batch", "accumulation", "log_every", "save_every", "keep", "eval_tokens",
    "initial_texts",
)  # fmt: skip
_CHOICES: dict[str, tuple[str | None, ...]] = {
    "draw": ("random", "fixed"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "checkpointing": (None, "none", "attention", "layers"),
    "precision": ("auto", "float32", "bfloat16"),
}
FILE = "train.yaml"
"""Name under which the settings are saved beside the weights."""


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """Settings of a training, with defaults for a small model on a laptop.

    Attributes:
        data: Files, folders and datasets to train on.
        out: Folder for everything that comes of it.
        base: The base model, as for `ahn.from_pretrained`.
        memory: The memory to train, a name of `ahn.memories.memory_names()`.
        adapter: Weights to start from, as for `ahn.load`; fresh ones if left out. Of another kind of memory, what both
            kinds have in common is taken.
        layers: Layers that get a memory, as in `AHNConfig`.
        sink_positions: As in `AHNConfig`.
        memory_positions: As in `AHNConfig`.
        dtype: Of the base model: "float32", "bfloat16", "float16"; "auto" is bfloat16 on a GPU and float32 elsewhere.
        stages: "transfer", "distill" or both, in this order.
        precision: What a float32 base multiplies in while memories are distilled: "float32", "bfloat16" (state, loss
            and weights stay in float32); "auto" measures for a second on a CPU which is faster.
        steps: Optimizer steps of the stage distill.
        transfer_steps: Optimizer steps of the stage transfer.
        losses: Weights of the losses of the stage distill: "kl", "ce", "attention".
        length: Tokens of a training sequence at most.
        min_length: Tokens at least; half of the length if left out.
        pack: Whether to join documents, so that all sequences are full.
        per_document: Sequences of a document at most, spread evenly over it; all if left out.
        held_out: Share of the data that is kept for the closing table.
        valid: Files, folders and datasets for the closing table, instead of a share.
        split: Split of a dataset.
        data_name: Configuration of a dataset.
        streaming: Whether to read a dataset while training.
        window: Window that the memory is evaluated and saved with.
        sinks: Sinks likewise.
        draw: "random" trains each sequence with another span, "fixed" all with `window` and `sinks`.
        totals: Candidates for sinks and window together.
        sink_counts: Candidates for the sinks. The published 0 is left out: without any sink a small model falls apart,
            and its memory learns to be one.
        anchors: Numbers of anchors that the student of the stage distill reads beside sinks and window; one is drawn
            for each sequence. With several, one memory serves with and without.
        anchor_weights: Weights of the score "learned", by which they are chosen, as for `ahn.load_anchors`.
        average: Part of the steps of the stage distill over which the weights that are kept are averaged: 0.25 for
            about the last quarter; 0 keeps the last.
        batch: Sequences of a forward pass, on each process.
        accumulation: Forward passes of a step, on each process.
        lr: Learning rate of the stage distill.
        transfer_lr: Learning rate of the stage transfer.
        scale_lr: Learning rate of the logarithm of each head's read-out length, see `ahn.training.optimizer`; it
            follows the schedule of the others. For the stage distill; 0 leaves plain AdamW.
        schedule: Learning rate schedule, a name of transformers.
        warmup: Share of the steps over which the learning rate rises.
        weight_decay: Of AdamW, on matrices.
        max_grad_norm: Length that a longer gradient is cut to.
        initial_decay: Lowest and highest decay rate that fresh memories start with, exp(A_log), drawn uniformly; the
            published 0 to 16 if left out. Memories without decay do not look at it.
        initial_gate: How far the output gates of fresh memories are open: the gate of an average token is its silu;
            the published start, near zero and of either sign, if left out.
        initial_readout: Share of the closed-form solution that the output projections of fresh memories start with, see
            `ahn.training.readout`; the published start, zero, if left out.
        initial_texts: Sequences that the closed form is solved on.
        seed: What all random numbers depend on.
        checkpointing: What the backward pass computes again instead of keeping it: "none", "attention" (window and
            memory, which keep the most) or "layers" (everything); if left out, "none" below 2,048 tokens a batch,
            "attention" below 4,096, and "layers" from there on.
        loss_share: Share of the positions that the losses on distributions look at, drawn anew in every step; the
            vocabulary product of a small model is a large part of its work.
        teacher_cache: Folder that keeps what the teacher thinks of each sequence (hidden size values a token), for
            further passes and further memories; nothing is kept if left out. For the losses "kl" and "ce".
        slice_tokens: As for `distillation_loss`.
        log_every: Steps between two lines of the log.
        save_every: Steps between two checkpoints.
        keep: Checkpoints kept.
        eval_every: Steps between two evaluations of the loss on held-out sequences, beside those before the first step
            and after the last; none at all if 0, or if no text is held out.
        eval_tokens: Held-out tokens read for an evaluation.
        report_tokens: Held-out tokens read for the closing table; none if 0.
        report_to: Where to log beside the console: "tensorboard", "wandb", or "none".
        arguments: Further arguments of `transformers.TrainingArguments`, such as `fsdp` or `deepspeed`.

    Raises:
        ConfigError: A value is of the wrong kind or out of range.
    """

    data: tuple[str, ...] = ()
    out: str = ""
    base: str = "smollm2-135m"
    memory: str = "gated_delta_net"
    adapter: str | None = None
    layers: tuple[int, ...] | None = None
    sink_positions: SinkPositions = "absolute"
    memory_positions: MemoryPositions = "rope"
    dtype: str = "auto"
    stages: tuple[str, ...] = ("distill",)
    precision: str = "auto"
    steps: int = 500
    transfer_steps: int = 200
    losses: dict[str, float] = dataclasses.field(default_factory=lambda: {"kl": 1.0})
    length: int = 1024
    min_length: int | None = None
    pack: bool = False
    per_document: int | None = None
    held_out: float = 0.02
    valid: tuple[str, ...] = ()
    split: str = "train"
    data_name: str | None = None
    streaming: bool = False
    window: int = 256
    sinks: int = 32
    draw: str = "random"
    totals: tuple[int, ...] = TOTALS
    sink_counts: tuple[int, ...] = (4, *SINKS[1:])
    anchors: tuple[int, ...] = (0,)
    anchor_weights: str | None = None
    average: float = 0.0
    batch: int = 1
    accumulation: int = 1
    lr: float = 1e-4
    transfer_lr: float = 1e-3
    scale_lr: float = 0.0
    schedule: str = "cosine"
    warmup: float = 0.1
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    initial_decay: tuple[float, float] | None = (0.001, 1.0)
    initial_gate: float | None = 1.0
    initial_readout: float | None = 0.3
    initial_texts: int = 8
    seed: int = 0
    checkpointing: str | None = None
    loss_share: float = 1.0
    teacher_cache: str | None = None
    slice_tokens: int | None = None
    log_every: int = 5
    save_every: int = 50
    keep: int = 2
    eval_every: int = 100
    eval_tokens: int = 4096
    report_tokens: int = 8192
    report_to: str = "none"
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _typed(field.name, getattr(self, field.name), hints[field.name]))
        for name in _COUNTS:
            _at_least(name, getattr(self, name), 1)
        for name in ("eval_every", "report_tokens", "weight_decay", "max_grad_norm", "warmup", "scale_lr"):
            _at_least(name, getattr(self, name), 0)
        for name in ("lr", "transfer_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be a positive number, not {getattr(self, name)}")
        if self.slice_tokens is not None:
            _at_least("slice_tokens", self.slice_tokens, 1)
        self._check_choices()
        self.span_draw.candidates(self.length)
        self.span_draw.candidates(self.cut.min_length)

    def _check_choices(self) -> None:
        if not self.stages or [stage for stage in STAGES if stage in self.stages] != list(self.stages):
            raise ConfigError(f"stages must be transfer, distill or both in this order, not {list(self.stages)}")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"{name} must be one of {', '.join(filter(None, known))}, not {getattr(self, name)!r}"
                )
        if not 0 < self.loss_share <= 1:
            raise ConfigError(f"loss_share must be a share above 0 and at most 1, not {self.loss_share}")
        if self.teacher_cache is not None and self.losses.get("attention"):
            raise ConfigError("teacher_cache does not serve the loss attention; leave one of the two out")
        if not 0 <= self.average <= 1:
            raise ConfigError(f"average must be a part of the steps from 0 to 1, not {self.average}")
        if any(self.anchor_draw.counts) and (self.anchor_weights is None or self.teacher_cache is not None):
            raise ConfigError("anchors need anchor_weights to be chosen by, and a teacher that reads: no teacher_cache")
        if self.scale_lr and "optim" in self.arguments:
            raise ConfigError("scale_lr is a setting of our own AdamW; leave it or the argument optim out")
        low, high = self.initial_decay or (0, 1)
        if not 0 <= low <= high < math.inf or high == 0:
            raise ConfigError(f"initial_decay must be a range of rates from 0 on, not {list(self.initial_decay or ())}")
        check_weights(self.losses)
        self.memory_config()

    def memory_config(self) -> AHNConfig:
        """Settings of the memory."""
        return AHNConfig(self.memory, self.window, self.sinks, self.layers, self.sink_positions, self.memory_positions)

    @property
    def cut(self) -> Cut:
        """How documents become sequences."""
        shortest = self.min_length or max(2, self.length // 2)
        return Cut(self.length, shortest, self.pack, self.held_out, self.per_document)

    @property
    def recomputed(self) -> str:
        """What the backward pass computes again: "none", "attention" or "layers"."""
        if self.checkpointing is not None:
            return self.checkpointing
        tokens = self.batch * self.length
        return "none" if tokens < 2048 else "attention" if tokens < 4096 else "layers"

    @property
    def span(self) -> Span:
        """Window and sinks of evaluations."""
        return Span(self.window, self.sinks)

    @property
    def span_draw(self) -> SpanDraw:
        """How window and sinks of each sequence are drawn."""
        return SpanDraw(self.totals, self.sink_counts, self.span if self.draw == "fixed" else None, self.seed)

    @property
    def anchor_draw(self) -> AnchorDraw:
        """How the number of anchors of each sequence is drawn."""
        return AnchorDraw(self.anchors, self.seed)

    @property
    def query(self) -> DataQuery:
        """What to take of a dataset."""
        return DataQuery(self.split, self.data_name, self.streaming)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> TrainSettings:
        """Settings from plain values, such as those of a YAML file.

        Raises:
            ConfigError: A name is unknown or a value cannot work.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ConfigError(f"unknown settings {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for YAML."""
        values = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def read_yaml(file: str | Path) -> dict[str, Any]:
    """The settings that a YAML file names.

    Raises:
        ConfigError: It cannot be read, or is no list of names and values.
    """
    import yaml

    try:
        values = yaml.safe_load(Path(file).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read ({getattr(error, 'strerror', None) or error})") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{file} holds no settings; write one `name: value` a line")
    return values


def write_yaml(settings: TrainSettings, file: str | Path) -> None:
    """Writes settings so that `read_yaml` finds them again."""
    import yaml

    Path(file).write_text(yaml.safe_dump(settings.to_dict(), sort_keys=False), encoding="utf-8")


def _at_least(name: str, value: float, least: float) -> None:
    if not least <= value < math.inf:
        raise ConfigError(f"{name} must be at least {least}, not {value}")


def _typed(name: str, value: Any, hint: Any) -> Any:
    """The value in the type that a setting has; numbers may come as text, for YAML reads 1e-3 as one.

    Raises:
        ConfigError: It is of another kind.
    """
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _typed(name, value, next(part for part in parts if part is not type(None)))
    if origin is typing.Literal or hint is str:
        if isinstance(value, str):
            return value
    elif origin is tuple:
        if isinstance(value, list | tuple) and (parts[-1] is ... or len(value) == len(parts)):
            return tuple(_typed(name, each, parts[0]) for each in value)
    elif origin is dict or hint is dict:
        if isinstance(value, Mapping):
            return {
                str(key): _typed(name, each, parts[1]) if parts[1] is float else each for key, each in value.items()
            }
    elif isinstance(value, bool) == (hint is bool) and (number := _number(value, hint)) is not None:
        return number
    kind = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}.get(hint, "a list")
    kind = "names with numbers" if origin is dict else kind
    raise ConfigError(f"{name} must be {kind}, not {value!r}")


def _number(value: Any, hint: type) -> Any:
    if hint is float and isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return None
    if isinstance(value, int) or (hint is float and isinstance(value, float)):
        return hint(value)
    return None
