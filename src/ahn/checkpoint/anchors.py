"""The weights of a learned score for anchors, in a folder of their own: they serve any memory of the same base."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

from ahn.attachment import attachment_of
from ahn.checkpoint.adapter import Pair, about, read_pair, storable, write_pair
from ahn.checkpoint.content import Base, check_base, check_keys, check_shapes, inner_model, layer_of
from ahn.checkpoint.files import failure, locate, read_tensors
from ahn.errors import ConfigError
from ahn.scores import AnchorGate
from ahn.surgery import remove_gate, set_gate

ANCHORS = Pair("anchors_config.json", "anchors.safetensors")


def save_anchors(model: nn.Module, path: str | os.PathLike[str], dtype: str | torch.dtype | None = None) -> None:
    """Saves the learned votes on anchors that a model has, for `load_anchors`.

    Args:
        model: A model with a memory attached.
        path: The folder; made if it is not there. One that is there stays whole until the new one is complete.
        dtype: As for `save`.

    Raises:
        ModelError: No memory is attached.
        ConfigError: The model has no learned votes.
        CheckpointError: As for `save`.
    """
    gates = {site.index: site.anchor_gate for site in attachment_of(model).sites if site.anchor_gate is not None}
    if not gates:
        raise ConfigError("this model has no learned votes on anchors to save; train some with `ahn train anchors`")
    tensors = {
        f"layers.{index}.{name}": each for index, gate in gates.items() for name, each in gate.state_dict().items()
    }
    write_pair(path, ANCHORS, about(Base.of_model(inner_model(model))), storable(path, tensors, dtype))


def load_anchors(model: nn.Module, path_or_hub_id: str | os.PathLike[str], revision: str | None = None) -> None:
    """Gives a model learned votes on anchors, which `anchor_score="learned"` then chooses by.

    All is checked first: if anything is wrong, the model is what it was before. Votes that it had are replaced.

    Args:
        model: A model with a memory attached.
        path_or_hub_id: A folder that `save_anchors` wrote, a name that ships with the library, such as
            "smollm2-135m/anchors", or a hub id `owner/name`.
        revision: Branch, tag or commit on the hub.

    Raises:
        ModelError: No memory is attached.
        CheckpointError: There is no such folder, it is damaged, or it does not fit the model.

    Warns:
        UserWarning: The votes were trained for a base model of the same sizes but another name.
    """
    attachment, where = attachment_of(model), os.fspath(path_or_hub_id)
    base = Base.of_model(inner_model(model))
    gates = _read(where, locate(where, revision, ANCHORS.config), base)
    served = {site.index: site for site in attachment.sites if site.memory is not None}
    if missing := sorted(set(gates) - set(served)):
        raise failure(
            where, f"it votes in layer {missing[0]}, which has no memory here", "Attach a memory to that layer too"
        )
    for index, site in served.items():
        remove_gate(site)
        if index in gates:
            set_gate(site, gates[index])


def _read(where: str, folder: Path, base: Base) -> dict[int, AnchorGate]:
    """The votes in a folder, by layer."""
    if not (folder / ANCHORS.config).is_file():
        raise failure(where, f"it holds no {ANCHORS.config}", "Give a folder that ahn.save_anchors wrote")
    values, stored = read_pair(where, folder, ANCHORS)
    made_for = values.get("base")
    check_base(
        where, Base.of_dict(made_for if isinstance(made_for, dict) else {}), base, "its votes were", stacklevel=4
    )
    layers = sorted({layer for key in stored if (layer := layer_of(key)) is not None})
    names = tuple(AnchorGate(1, 1).state_dict())
    check_keys(where, stored, {f"layers.{layer}.{name}" for layer in layers or [0] for name in names})
    tensors = read_tensors(stored)
    gates = {}
    for layer in layers:
        own = {name: tensors[f"layers.{layer}.{name}"] for name in names}
        gate = AnchorGate(base.hidden_size or 0, own["inner.weight"].size(0))
        check_shapes(where, own, {name: tuple(each.shape) for name, each in gate.state_dict().items()})
        gate.load_state_dict(own)
        gates[layer] = gate
    return gates
