"""From the options of a command to a model with a memory and its tokenizer, without a dependency's chatter."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from ahn.cli import checks
from ahn.cli.terminal import notes, output
from ahn.config import USUAL_ANCHORS, AHNConfig, ExactTokens, Quantize, SinkPositions, same_setting, setting

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ahn.checkpoint import Description


@dataclass(frozen=True)
class ModelChoice:
    """Which model a command works with, and what a run of it keeps exactly; `None` as saved, or as usual."""

    model: str = setting("smollm2-135m", "A built-in name, a folder, a GGUF file, or a hub id owner/name.")
    adapter: str | None = setting(
        None, "Folder or hub id of the memory's weights; none for an untrained one.", unset="what ships for the model"
    )
    window: int | None = same_setting(ExactTokens, "window", default=None, unset="the adapter's, or 1024")
    sinks: int | None = same_setting(ExactTokens, "sinks", default=None, unset="the adapter's, or 32")
    sink_positions: SinkPositions | None = same_setting(
        ExactTokens,
        "sink_positions",
        default=None,
        choices=("bounded", "absolute"),
        unset="the adapter's, or bounded",
        kw_only=False,
    )
    cache_dtype: str | None = same_setting(ExactTokens, "cache_dtype", kw_only=False)
    quantize: str | None = setting(
        None,
        "Store the base model's weights in fewer bits.",
        choices=get_args(Quantize),
        unset="as the file has them",
    )

    def __post_init__(self) -> None:
        checks.adapter(self.adapter)


@dataclass(frozen=True)
class AnchoredModel(ModelChoice):
    """The same for commands that read texts of any length, with anchors where the model has weights to choose them."""

    sink_positions: SinkPositions | None = same_setting(ModelChoice, "sink_positions", unset="bounded")
    anchors: int | None = same_setting(
        ExactTokens, "anchors", default=None, unset=f"{USUAL_ANCHORS} where there are weights to choose them by",
        kw_only=False,
    )  # fmt: skip


@dataclass(frozen=True)
class ModelSettings(ModelChoice):
    """The same for commands that take their own window and sinks, whatever the adapter was saved with."""

    window: int = same_setting(ExactTokens, "window", default=1024)
    sinks: int = same_setting(ExactTokens, "sinks", default=32)
    sink_positions: SinkPositions = same_setting(ModelChoice, "sink_positions", default="bounded", unset=None)


_USUAL = AHNConfig(window=ModelSettings.window, sinks=ModelSettings.sinks, sink_positions=ModelSettings.sink_positions)


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to read.

    Attributes:
        name: Its name, as the user gave it.
        model: The model, with a memory attached.
        tokenizer: Its tokenizer.
        config: Settings of its memory.
        adapter: Where the memory's weights come from, or `None` where they are untrained.
        scores: Where the weights that choose anchors come from, or `None` where there are none.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    config: AHNConfig
    adapter: str | None
    scores: str | None = None

    def anchors(self, wanted: int | None) -> int:
        """How many anchors to read with.

        Args:
            wanted: What the user said, or `None`.
        """
        from ahn.checkpoint.anchors import usual_anchors

        return usual_anchors(self.model) if wanted is None else wanted

    def reads_with(self, anchors: int) -> str:
        """What it reads a text with beside sinks and window, for a sentence.

        Args:
            anchors: The number of anchors.
        """
        memory = f"a memory {self.config.memory} from {self.adapter}" if self.adapter else "a memory that is untrained"
        if not anchors:
            return f"{memory}, no anchors"
        chosen = f", chosen with weights from {self.scores}" if self.scores else ""
        return f"{memory} and {anchors:,} anchors{chosen}"


def load(settings: ModelChoice, like: AHNConfig | None = None) -> Loaded:
    """Loads a model by name and attaches its memory.

    Args:
        settings: The model, its adapter and its run. Without an adapter the one that ships for the model is taken, if
            there is one; "none" is an untrained memory. What is `None` is as it was saved, or as usual.
        like: Settings that the memory must have, such as those of a saved cache; they replace the usual ones.

    Raises:
        AHNError: Anything about the names, the files or the settings is wrong.
    """
    quiet()
    name = settings.model
    with notes().status(f"Loading {name} ..."):
        from ahn.checkpoint import from_pretrained
        from ahn.models import load_tokenizer, resolve

        resolve(name)  # first, because what follows takes seconds
        folder = _model_folder(name)
        chosen = _adapter(name, settings.adapter)
        saved = _saved(name, folder, chosen)
        config = like or (_config(saved) if saved else _USUAL)
        changes: dict[str, Any] = {
            key: getattr(settings, key) for key in ("window", "sinks", "sink_positions", "cache_dtype")
        }
        config = replace(config, **{key: value for key, value in changes.items() if value is not None})
        tokenizer = load_tokenizer(name)
        stored: dict[str, Any] = {} if settings.quantize is None else {"quantize": settings.quantize}
        model = from_pretrained(name, chosen, config, **stored)
    return Loaded(name, model, tokenizer, config, chosen or (name if saved else None), _scores(name, chosen, model))


def _scores(name: str, adapter: str | None, model: PreTrainedModel) -> str | None:
    """Where a model's weights of anchor scores come from: its adapter's folder, or those that ship for it."""
    from ahn.attachment import attachment_of
    from ahn.checkpoint.anchors import score_weights_for
    from ahn.checkpoint.files import locate

    if not any(layer.anchor_weights for layer in attachment_of(model).layers):
        return None
    usual = score_weights_for(None, name)
    ships = usual is not None and score_weights_for(None if adapter is None else locate(adapter), name) == usual
    return f"{name}/anchors" if ships else adapter or name


def quiet() -> None:
    """Silences what transformers and the hub's client say on their own; errors still reach the user as exceptions."""
    import huggingface_hub
    from transformers.utils import logging

    logging.set_verbosity_error()
    huggingface_hub.logging.set_verbosity_error()
    if not output().is_terminal:
        logging.disable_progress_bar()


def seed(number: int) -> None:
    """Makes the weights of an untrained memory the same every time."""
    import torch

    torch.manual_seed(number)


def _adapter(name: str, adapter: str | None) -> str | None:
    if adapter is not None:
        return None if adapter == "none" else adapter
    from ahn.checkpoint.files import shipped_for

    return shipped_for(name)


def _saved(name: str, folder: Path, adapter: str | None) -> Description | None:
    """What the memory's weights were saved with: those of the adapter, or those merged into the model."""
    from ahn.checkpoint import describe

    if adapter is not None:
        return describe(adapter)
    return describe(name) if _is_merged(name, folder) else None


def _model_folder(name: str) -> Path:
    """The folder of a model's config; for a model on the hub, the one that its config is downloaded to.

    Raises:
        CheckpointError: The hub has no such model or cannot be reached.
    """
    from ahn.checkpoint.files import HubSource, download, is_hub_id
    from ahn.checkpoint.published import CONFIG
    from ahn.models import KNOWN

    folder = Path(name).expanduser()
    is_remote = name not in KNOWN and not os.path.exists(folder) and is_hub_id(name)
    return download(name, HubSource(), [CONFIG]) if is_remote else folder


def _is_merged(name: str, folder: Path) -> bool:
    from ahn.checkpoint.files import read_json
    from ahn.checkpoint.published import CONFIG, is_published
    from ahn.models import KNOWN

    file = folder / CONFIG
    return name not in KNOWN and os.path.isfile(file) and is_published(read_json(file))


def _config(saved: Description) -> AHNConfig:
    names = ("memory", "window", "sinks", "layers", "sink_positions", "memory_positions")
    return AHNConfig.from_dict({name: getattr(saved, name) for name in names})
