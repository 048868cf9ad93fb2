"""The weights of scores for anchors, in a folder of their own: they serve any memory of the same base."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from ahn.anchors.scores import AnchorGate, AnchorQueries
from ahn.attachment import SAVERS, Attachment, attachment_of
from ahn.checkpoint.adapter import Pair, about, read_pair, storable, write_pair
from ahn.checkpoint.content import Base, check_base, check_keys, check_shapes, layer_of
from ahn.checkpoint.files import Source, failure, locate, read_tensors
from ahn.errors import ConfigError
from ahn.memories import MemoryShape
from ahn.surgery import set_score_weights

ANCHORS = Pair("anchors_config.json", "anchors.safetensors")

_NAMES = {"learned": tuple(AnchorGate(1, 1).state_dict()), "asked": tuple(AnchorQueries((1,), 1, 1).state_dict())}
"""Names of the weights of each score."""


def save_anchors(model: nn.Module, path: str | os.PathLike[str], dtype: str | torch.dtype | None = None) -> None:
    """Saves the weights for votes on anchors that a model has, of all scores, for `load_anchors`.

    Args:
        model: A model with a memory attached.
        path: The folder; made if it is not there. One that is there stays whole until the new one is complete.
        dtype: As for `save`.

    Raises:
        ModelError: No memory is attached.
        ConfigError: The model has no weights for votes.
        CheckpointError: As for `save`.
    """
    tensors = {
        f"layers.{site.index}.{name}": tensor
        for site in attachment_of(model).sites
        for votes in (site.anchor_weights or {}).values()
        for name, tensor in votes.state_dict().items()
    }
    if not tensors:
        raise ConfigError("this model has no weights for votes on anchors to save; make some with `ahn train anchors`")
    write_pair(path, ANCHORS, about(Base.of_model(model)), storable(path, tensors, dtype))


def load_anchors(
    model: nn.Module,
    path_or_hub_id: str | os.PathLike[str],
    revision: str | None = None,
    *,
    subfolder: str = "",
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> None:
    """Gives a model weights for votes on anchors, which `anchor_score="asked"` and `"learned"` then choose by.

    All is checked first: if anything is wrong, the model is what it was before. Votes that it had are replaced.

    Args:
        model: A model with a memory attached.
        path_or_hub_id: A folder that `save_anchors` wrote, a name that ships with the library, such as
            "smollm2-135m/anchors", or a hub id `owner/name`.
        revision: Branch, tag or commit on the hub.
        subfolder: As for `load`.
        token: As for `load`.
        cache_dir: As for `load`.
        local_files_only: As for `load`.

    Raises:
        ModelError: No memory is attached.
        CheckpointError: There is no such folder, it is damaged, or it does not fit the model.

    Warns:
        UserWarning: The votes were made for a base model of the same sizes but another name.
    """
    attachment, where = attachment_of(model), os.fspath(path_or_hub_id)
    source = Source(revision, subfolder, token, cache_dir, local_files_only)
    folder = locate(where, source, ANCHORS.config)
    votes = _read(where, folder, attachment, Base.of_model(model))
    for site in attachment.sites:
        if site.memory is not None:
            set_score_weights(site, votes.get(site.index, {}))


def _read(where: str, folder: Path, attachment: Attachment, base: Base) -> dict[int, dict[str, nn.Module]]:
    """The votes in a folder, by layer and score."""
    if not (folder / ANCHORS.config).is_file():
        raise failure(where, f"it holds no {ANCHORS.config}", "Give a folder that ahn.save_anchors wrote")
    values, stored = read_pair(where, folder, ANCHORS)
    made_for = values.get("base")
    check_base(
        where, Base.of_dict(made_for if isinstance(made_for, dict) else {}, where), base, "its votes were", stacklevel=4
    )
    found = {layer: _scores(stored, layer) for key in stored if (layer := layer_of(key)) is not None}
    served = {site.index: site for site in attachment.sites if site.memory is not None}
    if missing := sorted(set(found) - set(served)):
        raise failure(
            where, f"it votes in layer {missing[0]}, which has no memory here", "Attach a memory to that layer too"
        )
    needed = found or {0: ["learned"]}
    check_keys(
        where,
        stored,
        {f"layers.{layer}.{name}" for layer, scores in needed.items() for score in scores for name in _NAMES[score]},
    )
    tensors = read_tensors(stored)
    votes: dict[int, dict[str, nn.Module]] = {}
    for layer, scores in found.items():
        for score in scores:
            own = {name: tensors[f"layers.{layer}.{name}"] for name in _NAMES[score]}
            made = _empty(score, served[layer].shape, own)
            check_shapes(where, own, {name: tuple(each.shape) for name, each in made.state_dict().items()})
            made.load_state_dict(own)
            votes.setdefault(layer, {})[score] = made
    if len({tensors[f"layers.{layer}.kinds"].size(1) for layer, scores in found.items() if "asked" in scores}) > 1:
        raise failure(where, "its layers vote by different kinds of facts", "Make it anew with `ahn train anchors`")
    return votes


def _scores(stored: Mapping[str, object], layer: int) -> list[str]:
    """Scores that some weights of a layer are for."""
    return [
        score for score, names in _NAMES.items() if any(f"layers.{layer}.{name}" in stored for name in names)
    ] or list(_NAMES)


def _empty(score: str, shape: MemoryShape, own: Mapping[str, torch.Tensor]) -> nn.Module:
    """Weights of a score as a layer of this shape has them, of the count that is stored."""
    if score == "learned":
        return AnchorGate(shape.hidden_size, own["inner.bias"].numel())
    kinds = own["kinds"] if own["kinds"].dim() == 2 else torch.ones(1, 1)  # shapes are checked later
    return AnchorQueries(kinds.float().sum(0).clamp(min=0).long().tolist(), shape.kv_heads, shape.key_size)


def _save_if_any(model: nn.Module, path: str) -> None:
    if any(site.anchor_weights for site in attachment_of(model).sites):
        save_anchors(model, path)


SAVERS.append(_save_if_any)
