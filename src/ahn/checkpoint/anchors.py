"""The weights of scores for anchors, in a folder of their own: they serve any memory of the same base."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ahn.anchors.base import Score
from ahn.anchors.scores import SCORES
from ahn.attachment import SAVERS, Attachment, attachment_of
from ahn.checkpoint.adapter import Pair, about, read_pair, storable, write_pair
from ahn.checkpoint.content import BaseInfo, check_base, check_keys, check_shapes, layer_of
from ahn.checkpoint.files import SHIPPED, HubOptions, HubSource, failure, locate, read_tensors, shipped
from ahn.config import USUAL_ANCHORS, RunSettings
from ahn.errors import ConfigError, ShapeError
from ahn.memories import MemoryShape
from ahn.surgery import set_score_weights

if TYPE_CHECKING:
    from typing_extensions import Unpack

ANCHORS = Pair("anchors_config.json", "anchors.safetensors")


def save_anchors(model: nn.Module, path: str | os.PathLike[str], dtype: str | torch.dtype | None = None) -> None:
    """Saves the weights of anchor scores that a model has, for `load_anchors`.

    Args:
        model: A model with a memory attached.
        path: The folder; made if it is not there. One that is there stays whole until the new one is complete.
        dtype: As for `save`.

    Raises:
        ModelError: No memory is attached.
        ConfigError: The model has none.
        CheckpointError: As for `save`.
    """
    tensors = {
        f"layers.{layer.index}.{name}": tensor
        for layer in attachment_of(model).layers
        for weights in (layer.anchor_weights or {}).values()
        for name, tensor in weights.state_dict().items()
    }
    if not tensors:
        raise ConfigError("this model has no weights of anchor scores to save; make some with `ahn train anchors`")
    write_pair(path, ANCHORS, about(BaseInfo.of_model(model)), storable(path, tensors, dtype))


def load_anchors(
    model: nn.Module,
    path_or_hub_id: str | os.PathLike[str],
    revision: str | None = None,
    **options: Unpack[HubOptions],
) -> None:
    """Gives a model weights of anchor scores, which `anchor_score="asked"` and `"learned"` then choose by.

    All is checked first: if anything is wrong, the model is what it was before. Weights that it had are replaced.

    Args:
        model: A model with a memory attached.
        path_or_hub_id: A folder that `save_anchors` wrote, a name that ships with the library, such as
            "smollm2-135m/anchors", or a hub id `owner/name`.
        revision: Branch, tag or commit on the hub.
        **options: As for `load`.

    Raises:
        ModelError: No memory is attached.
        CheckpointError: There is no such folder, it is damaged, or it does not fit the model.

    Warns:
        UserWarning: The weights were made for a base model of the same sizes but another name.
    """
    attachment, where = attachment_of(model), os.fspath(path_or_hub_id)
    folder = locate(where, HubSource(revision, **options), ANCHORS.config)
    weights = read_anchors(where, folder, attachment, BaseInfo.of_model(model))
    for layer in attachment.layers:
        if layer.memory is not None:
            set_score_weights(layer, weights.get(layer.index, {}))


def score_weights_for(adapter: Path | None, base: str | os.PathLike[str]) -> Path | None:
    """The folder of the weights of anchor scores that serve an adapter, or `None` if there are none.

    Args:
        adapter: The adapter's own folder, which comes first.
        base: Name of the base model, for which some may ship.
    """
    if adapter is not None and (adapter / ANCHORS.config).is_file():
        return adapter
    usual = f"{os.fspath(base)}/anchors"
    return SHIPPED / usual if usual in shipped(ANCHORS.config) else None


def usual_anchors(model: nn.Module) -> int:
    """How many anchors a run keeps if nobody names a number.

    Args:
        model: A model with a memory attached.

    Returns:
        `USUAL_ANCHORS` where the model has weights that choose them and its window is long enough for that, else 0.

    Raises:
        ModelError: No memory is attached.
    """
    attachment = attachment_of(model)
    if not any(layer.anchor_weights for layer in attachment.layers):
        return 0
    try:
        attachment.check(RunSettings.like(attachment.settings, anchors=USUAL_ANCHORS))
    except ConfigError:
        return 0
    return USUAL_ANCHORS


def read_anchors(where: str, folder: Path, attachment: Attachment, base: BaseInfo) -> dict[int, dict[str, nn.Module]]:
    """The weights of anchor scores in a folder, by layer and score.

    Args:
        where: The name that the user gave, for messages.
        folder: The folder.
        attachment: The memory whose layers they are for.
        base: Its base model.

    Raises:
        CheckpointError: There are none, or they are damaged or do not fit.
    """
    if not (folder / ANCHORS.config).is_file():
        raise failure(where, f"it holds no {ANCHORS.config}", "Give a folder that ahn.save_anchors wrote")
    values, stored = read_pair(where, folder, ANCHORS)
    made_for = BaseInfo.of_dict(values["base"] if isinstance(values.get("base"), dict) else {}, where)
    check_base(where, made_for, base, "its anchor scores were", stacklevel=4)
    scores_by_layer = {layer: _scores_in(stored, layer) for key in stored if (layer := layer_of(key)) is not None}
    served = {
        attention_layer.index: attention_layer.shape
        for attention_layer in attachment.layers
        if attention_layer.memory is not None
    }
    if missing := sorted(set(scores_by_layer) - set(served)):
        problem = f"it scores tokens in layer {missing[0]}, which has no memory here"
        raise failure(where, problem, "Attach a memory to that layer too")
    needed = scores_by_layer or {0: [SCORES["learned"]]}
    names = {
        f"layers.{layer}.{name}" for layer, scores in needed.items() for each in scores for name in each.weight_names
    }
    check_keys(where, stored, names)
    tensors = read_tensors(stored)
    weights: dict[int, dict[str, nn.Module]] = {}
    for layer, scores in scores_by_layer.items():
        for score in scores:
            own = {name: tensors[f"layers.{layer}.{name}"] for name in score.weight_names}
            weights.setdefault(layer, {})[score.name] = _loaded(where, score, own, served[layer])
    for score in SCORES.values():
        if reason := score.disagreement([own[score.name] for own in weights.values() if score.name in own]):
            raise failure(where, reason, "Make it anew with `ahn train anchors`")
    return weights


def _scores_in(stored: Mapping[str, object], layer: int) -> list[Score]:
    """Scores that some weights of a layer are for; all where none are, so that a check names what is missing."""
    weighted = [score for score in SCORES.values() if score.weight_names]
    return [
        score for score in weighted if any(f"layers.{layer}.{name}" in stored for name in score.weight_names)
    ] or weighted


def _loaded(where: str, score: Score, own: Mapping[str, torch.Tensor], shape: MemoryShape) -> nn.Module:
    """The weights of a score in one layer, from its tensors."""
    try:
        weights = score.build(own, hidden_size=shape.hidden_size, kv_heads=shape.kv_heads, key_size=shape.key_size)
    except ShapeError as error:
        problem = f"its weights of {score.name} cannot be used ({error})"
        raise failure(where, problem, "Use its own base model, or make it anew with `ahn train anchors`") from None
    check_shapes(where, own, {name: tuple(each.shape) for name, each in weights.state_dict().items()})
    weights.load_state_dict(own)
    return weights


def _save_if_any(model: nn.Module, path: str) -> None:
    if any(layer.anchor_weights for layer in attachment_of(model).layers):
        save_anchors(model, path)


SAVERS.append(_save_if_any)
