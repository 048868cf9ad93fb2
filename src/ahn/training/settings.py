"""Everything that makes a training what it is, in one flat list of settings that YAML files and options fill."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ahn._home import write_text
from ahn.config import (
    USUAL_ANCHORS,
    AHNConfig,
    ExactTokens,
    MemoryPositions,
    Quantize,
    Settings,
    SinkPositions,
    check_choice,
    file_setting,
    same_setting,
    setting,
)
from ahn.errors import ConfigError, one_line
from ahn.memories import split_names
from ahn.training.setting_values import typed_value

if TYPE_CHECKING:  # what takes seconds to import, and help texts need not
    from ahn.training.data import Cut
    from ahn.training.sampling import AnchorDraw, Span, SpanDraw
    from ahn.training.sources import DataQuery

STAGES = ("transfer", "distill")
START = "start"
"""In place of stages: the initial weights are written, and nothing is trained."""
FILE = "train.yaml"
"""Name under which the settings are saved beside the weights."""
_MEMORY_FILES = {file.stem for file in (Path(__file__).parents[1] / "memories").glob("[a-z]*.py")} - {"base"}


def _published(name: str) -> Any:
    from ahn.training import sampling

    return getattr(sampling, name)


@dataclasses.dataclass(frozen=True)
class TrainSettings(Settings):
    """Settings of a training, with defaults for a small model on a laptop.

    Each field says what it is in its `metadata["help"]`; `ahn train --help` shows those that are options too.

    Raises:
        ConfigError: A value is of the wrong kind or out of range.
    """

    data: tuple[str, ...] = setting(
        (), "Text, JSONL, a folder of them, or a dataset's name; may be given several times."
    )
    out: str = setting("", "Folder for weights, settings, checkpoints, table and plot.")
    model: str = setting("smollm2-135m", "The base model: a built-in name, a folder, or a hub id.", alias="base")
    memory: str = setting(
        "gated_delta_net", f"Kind of memory, or several joined by +: {', '.join(sorted(_MEMORY_FILES))}."
    )
    adapter: str | None = setting(None, "Weights to start from: a folder, name or hub id; of another kind, what fits.")
    layers: tuple[int, ...] | None = file_setting(None, "Layers that get a memory, as in `AHNConfig`.")
    sink_positions: SinkPositions = same_setting(ExactTokens, "sink_positions", option=False, kw_only=False)
    memory_positions: MemoryPositions = same_setting(AHNConfig, "memory_positions", option=False, kw_only=False)
    dtype: str = setting(
        "auto",
        "Of the base: float32, bfloat16, float16, or auto, which is bfloat16 on a GPU and float32 elsewhere.",
        choices=("auto", "float32", "bfloat16", "float16"),
        metavar="DTYPE",
    )
    quantize: str | None = setting(
        None,
        "Store the weights of the base, which stay frozen, in fewer bits.",
        choices=typing.get_args(Quantize),
        unset="as the file has them",
    )
    stages: tuple[str, ...] = setting(
        ("distill",), "distill, transfer, or transfer,distill; or start, for the initial weights alone.", joined=True
    )
    steps: int = setting(500, "Optimizer steps of distill.", least=1)
    transfer_steps: int = setting(200, "Optimizer steps of transfer.", least=1)
    losses: dict[str, float] = file_setting(
        help='Weights of the losses of the stage distill: "kl", "ce", "attention".', factory=lambda: {"kl": 1.0}
    )
    precision: str = file_setting(
        "auto",
        "What a float32 base multiplies in during the stage distill: float32, bfloat16 or auto, the faster one on a "
        "CPU. State, loss and weights stay in float32.",
        choices=("auto", "float32", "bfloat16"),
    )
    length: int = setting(1024, "Tokens of a sequence, at most.", least=1)
    min_length: int | None = setting(None, "Leave shorter texts out.", unset="half of --length")
    pack: bool = setting(False, "Join short texts into full sequences.", names="--pack/--cut")
    per_document: int | None = file_setting(
        None, "Sequences of a document at most, spread evenly over it; all if left out."
    )
    held_out: float = setting(0.02, "Without --valid: share of the data for it.")
    valid: tuple[str, ...] = setting((), "Text for the closing table, as --data.")
    split: str = file_setting("train", "Split of a dataset.")
    data_name: str | None = file_setting(None, "Configuration of a dataset.")
    streaming: bool = setting(False, "Read a dataset while training.", names="--streaming/--download")
    window: int = setting(256, "Window to evaluate and save with.")
    sinks: int = setting(32, "Sinks to evaluate and save with.")
    draw: str = setting(
        "random",
        "Train each sequence with another window and other sinks, or all with these.",
        choices=("random", "fixed"),
    )
    totals: tuple[int, ...] = file_setting(help="Candidates for sinks + window.", factory=lambda: _published("TOTALS"))
    least_total: float = file_setting(
        help="Least share of its sequence that a total may be.", factory=lambda: _published("LEAST_SHARE"), least=0
    )
    sink_counts: tuple[int, ...] = file_setting(
        help="Candidates for the sinks. The published 0 is left out: without any sink a small model falls apart, and "
        "its memory learns to be one.",
        factory=lambda: (4, *_published("SINKS")[1:]),
    )
    anchors: tuple[int, ...] = setting(
        (0,),
        "Numbers of anchors to train with, joined by commas; one is drawn for each sequence. With 0 among them the "
        "memory serves alone too.",
        joined=True,
    )
    anchor_weights: str | None = file_setting(
        None,
        "Weights of the score learned, which chooses the anchors, as for `ahn.load_anchors`. Left out, those that ship "
        "for the base, or new ones that are made from the texts first.",
    )
    anchor_documents: int = file_setting(120, "Texts that new weights of the score learned are made from.", least=6)
    average: float = file_setting(
        0.0,
        "Part of the steps of the stage distill that the saved weights are averaged over: 0.25 for about the last "
        "quarter. 0 keeps the last weights.",
        least=0,
    )
    batch: int = setting(1, "Sequences at once, per process.", least=1)
    accumulation: int = setting(1, "Batches of a step, per process.", least=1)
    lr: float = setting(1e-4, "Learning rate of distill.")
    transfer_lr: float = file_setting(1e-3, "Learning rate of the stage transfer.")
    transfer_relative: bool = file_setting(
        False, "Whether transfer_lr is a share of each parameter's size, see `ahn.training.optimizer`."
    )
    trained_memories: tuple[str, ...] | None = file_setting(
        None, "Of several memories joined by +, those that learn; all if left out."
    )
    scale_lr: float = file_setting(
        0.0,
        "Learning rate of the logarithm of each head's read-out length, see `ahn.training.optimizer`; it follows the "
        "schedule of the others. For the stage distill; 0 leaves plain AdamW.",
        least=0,
    )
    schedule: str = file_setting("cosine", "Learning rate schedule, a name of transformers.")
    warmup: float = file_setting(0.1, "Share of the steps over which the learning rate rises.", least=0)
    weight_decay: float = file_setting(0.1, "Of AdamW, on matrices.", least=0)
    max_grad_norm: float = file_setting(1.0, "Length that a longer gradient is cut to.", least=0)
    initial_decay: tuple[float, float] | None = file_setting(
        (0.001, 1.0),
        "Lowest and highest decay rate that fresh memories start with, exp(A_log), drawn uniformly; the published 0 to "
        "16 if left out. Memories without decay ignore it.",
    )
    initial_gate: float | None = file_setting(
        1.0,
        "How far the output gates of fresh memories are open: the gate of an average token is its silu; the published "
        "start, near zero and of either sign, if left out.",
    )
    initial_readout: float | None = file_setting(
        0.3,
        "Share of the closed-form solution that the output projections of fresh memories start with, see "
        "`ahn.training.readout`; the published start, zero, if left out.",
    )
    upper_readout: float | None = file_setting(
        None, "The same share in the upper half of the layers; as initial_readout if left out."
    )
    initial_texts: int = file_setting(8, "Sequences that the closed form is solved on.", least=1)
    seed: int = setting(0, "Of all random numbers.")
    checkpointing: str | None = setting(
        None,
        "What the backward pass computes again instead of keeping it.",
        choices=("none", "attention", "layers"),
        unset="by tokens of a batch: from 2,048 attention, from 4,096 layers",
    )
    loss_share: float = setting(1.0, "Share of the positions that the loss looks at, drawn anew in every step.")
    teacher_cache: str | None = setting(
        None, "Folder to keep what the teacher has read, for further trainings by kl and ce."
    )
    slice_tokens: int | None = file_setting(None, "As for `distillation_loss`.", least=1)
    log_every: int = setting(5, "Steps between lines.", least=1)
    save_every: int = setting(50, "Steps between checkpoints.", least=1)
    keep: int = file_setting(2, "Checkpoints kept.", least=1)
    eval_every: int = file_setting(
        100,
        "Steps between two evaluations of the loss on held-out sequences, beside those before the first step and after "
        "the last; none at all if 0, or if no text is held out.",
        least=0,
    )
    eval_tokens: int = file_setting(4096, "Held-out tokens read for an evaluation.", least=1)
    report_tokens: int = file_setting(8192, "Held-out tokens read for the closing table; none if 0.", least=0)
    report_to: str = setting("none", "tensorboard, wandb or none, beside the console.")
    licence: str | None = file_setting(None, "Licence that the model card names, as the hub does: apache-2.0, mit.")
    arguments: dict[str, Any] = file_setting(
        help="Further arguments of `transformers.TrainingArguments`, such as `fsdp` or `deepspeed`.", factory=dict
    )

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, typed_value(field.name, getattr(self, field.name), hints[field.name]))
            _check_range(field, getattr(self, field.name))
        for name in ("lr", "transfer_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be a positive number, not {getattr(self, name)}")
        self._check_together()
        self.span_draw.options(self.length)
        self.span_draw.options(self.chunking.min_length)

    def _check_together(self) -> None:
        """Checks what settings say about each other."""
        from ahn.training.losses import check_weights

        in_order = [stage for stage in STAGES if stage in self.stages]
        if self.stages != (START,) and (not self.stages or in_order != list(self.stages)):
            raise ConfigError(
                f"stages must be transfer, distill or both in this order, or start, not {list(self.stages)}"
            )
        if self.quantize is not None and self.dtype not in ("auto", "float32"):
            raise ConfigError(f"a base in {self.quantize} multiplies in float32: leave dtype={self.dtype} out")
        if not 0 < self.loss_share <= 1:
            raise ConfigError(f"loss_share must be a share above 0 and at most 1, not {self.loss_share}")
        if self.teacher_cache is not None and self.losses.get("attention"):
            raise ConfigError("teacher_cache does not serve the loss attention; leave one of the two out")
        if self.average > 1:
            raise ConfigError(f"average must be a part of the steps from 0 to 1, not {self.average}")
        _ = self.anchor_draw  # checks the numbers
        if (self.scale_lr or self.transfer_relative) and "optim" in self.arguments:
            raise ConfigError(
                "scale_lr and transfer_relative are of our own AdamW; leave them or the argument optim out"
            )
        trained = self.trained_memories
        if trained is not None and not set() < set(trained) <= set(split_names(self.memory)):
            raise ConfigError(f"trained_memories must name memories of {self.memory}, not {list(trained)}")
        low, high = self.initial_decay or (0, 1)
        if not 0 <= low <= high < math.inf or high == 0:
            raise ConfigError(f"initial_decay must be a range of rates from 0 on, not {list(self.initial_decay or ())}")
        check_weights(self.losses)
        self.memory_config()

    def memory_config(self) -> AHNConfig:
        """Settings of the memory."""
        names = ("memory", "window", "sinks", "layers", "sink_positions", "memory_positions")
        return AHNConfig(**{name: getattr(self, name) for name in names})

    @property
    def chunking(self) -> Cut:
        """How documents become sequences."""
        from ahn.training.data import Cut

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
        from ahn.training.sampling import Span

        return Span(self.window, self.sinks)

    @property
    def span_draw(self) -> SpanDraw:
        """How window and sinks of each sequence are drawn."""
        from ahn.training.sampling import SpanDraw

        fixed = self.span if self.draw == "fixed" else None
        return SpanDraw(self.totals, self.sink_counts, fixed, self.seed, self.least_total)

    @property
    def anchor_draw(self) -> AnchorDraw:
        """How the number of anchors of each sequence is drawn."""
        from ahn.training.sampling import AnchorDraw

        return AnchorDraw(self.anchors, self.seed)

    @property
    def reported_anchors(self) -> int:
        """Anchors of the closing table: the usual number where it was trained with, or the largest; 0 for none."""
        return USUAL_ANCHORS if USUAL_ANCHORS in self.anchors else max(self.anchors)

    @property
    def query(self) -> DataQuery:
        """What to take of a dataset."""
        from ahn.training.sources import DataQuery

        return DataQuery(self.split, self.data_name, self.streaming)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainSettings:
        """Settings from plain values, such as those of a YAML file.

        Raises:
            ConfigError: A name is unknown or a value cannot work.
        """
        return super().from_dict(_with_new_names(values))


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
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is no YAML: {one_line(error)}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{file} holds no settings; write one `name: value` a line")
    return _with_new_names(values)


def write_yaml(settings: TrainSettings, file: str | Path) -> None:
    """Writes settings so that `read_yaml` finds them again.

    Raises:
        OutputError: The file cannot be written.
    """
    import yaml

    write_text(file, yaml.safe_dump(settings.to_dict(), sort_keys=False))


def _with_new_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values in which the base model is `model`, as which older files know `base`."""
    return {"model" if name == "base" else name: value for name, value in values.items()}


def _check_range(field: dataclasses.Field[Any], value: Any) -> None:
    least, choices = field.metadata["least"], field.metadata["choices"]
    if value is None:
        return
    if least is not None and not least <= value < math.inf:
        raise ConfigError(f"{field.name} must be at least {least}, not {value}")
    if choices:
        check_choice(field.name, value, choices)
