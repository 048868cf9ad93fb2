"""From a config of vLLM to a memory: what to load, with which settings, for which layers. Nothing here needs vLLM."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from ahn.attachment import Attachment
from ahn.checkpoint.anchors import ANCHORS, read_anchors
from ahn.checkpoint.content import BaseInfo, Content
from ahn.checkpoint.files import HubSource, locate
from ahn.checkpoint.loading import read
from ahn.config import AHNConfig, ExactTokens, RunSettings
from ahn.errors import ConfigError
from ahn.surgery import set_score_weights, survey

_FILES = ("adapter", "anchor_weights")
_SETTINGS = tuple(field.name for field in dataclasses.fields(ExactTokens))


@dataclasses.dataclass(frozen=True)
class ServedMemory:
    """A memory that is to be served.

    Attributes:
        content: Its weights, still in their files.
        config: Its settings, those of the overrides among them.
        anchor_weights: Name or folder of the weights of anchor scores, or `None`.
    """

    content: Content
    config: AHNConfig
    anchor_weights: str | None = None


def read_memory(overrides: Mapping[str, Any], model: str, revision: str | None = None) -> ServedMemory:
    """The memory of a model, by what its config and the overrides say.

    Args:
        overrides: Settings of a run by the names of `ExactTokens`, and the names of files: "adapter" for a base without
            a memory, "anchor_weights".
        model: A merged folder or hub id, or the base of the adapter.
        revision: Branch, tag or commit of `model` on the hub.

    Raises:
        ConfigError: A name is unknown or a value is out of range.
        CheckpointError: The memory is missing or damaged.
    """
    if unknown := sorted(set(overrides) - {*_FILES, *_SETTINGS}):
        known = ", ".join(f"ahn_{name}" for name in (*_FILES, *_SETTINGS))
        raise ConfigError(f"hf_overrides names ahn_{unknown[0]}; known are {known}")
    adapter = overrides.get("adapter")
    content = read(model, HubSource(revision)) if adapter is None else read(adapter)
    if adapter is None and content.kind != "merged":
        raise ConfigError(f"{model} holds a memory without a base; serve the base, with ahn_adapter in hf_overrides")
    changes = {name: overrides[name] for name in _SETTINGS if name in overrides}
    config = dataclasses.replace(content.config, **changes)
    return ServedMemory(content, config, overrides.get("anchor_weights"))


def survey_base(base: PreTrainedConfig, config: AHNConfig) -> Attachment:
    """The attention layers of a base model, found without its weights.

    Args:
        base: Its config.
        config: The memory that its layers are to get.

    Raises:
        ModelError: It cannot be given a memory.
        ConfigError: The settings do not fit it, or it would keep more of a text than a block of fixed size holds.
    """
    if base.get_text_config() is not base:
        raise ConfigError(
            f"{base.model_type} wraps a text model, and a memory is served for models of text alone; "
            "serve it by `ahn serve`, or its text model by itself"
        )
    _check_rotations(base)
    copied = copy.deepcopy(base)
    copied._attn_implementation = "eager"
    copied._experts_implementation = "batched_mm"  # the others look at values, which there are none of
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copied)
    attachment = survey(model, config)
    _check_constant(attachment)
    return attachment


def give_score_weights(attachment: Attachment, memory: ServedMemory, base: PreTrainedConfig) -> None:
    """Gives the layers of a base their weights of anchor scores, if there are any.

    Args:
        attachment: The layers.
        memory: The memory.
        base: The base model's config.

    Raises:
        CheckpointError: The weights are missing, damaged or do not fit.
        ConfigError: Anchors are asked for and cannot be chosen.
    """
    if memory.anchor_weights is not None:
        folder = locate(memory.anchor_weights, HubSource(), ANCHORS.config)
        info = BaseInfo.of_config(base.get_text_config())
        weights = read_anchors(memory.anchor_weights, folder, attachment, info)
        for layer in attachment.layers:
            set_score_weights(layer, weights.get(layer.index, {}))
    attachment.check(RunSettings.like(memory.config))


def own_heads(tensor: torch.Tensor, size: int, rank: int) -> torch.Tensor:
    """The part of a memory's parameter that belongs to the heads of one process; all of it where all have the same.

    Args:
        tensor: The parameter, those of all heads one after the other.
        size: Size of the part.
        rank: Number of the process.
    """
    return tensor if tensor.size(0) == size else tensor.narrow(0, rank * size, size)


def _check_constant(attachment: Attachment) -> None:
    """Checks that every layer keeps a number of bytes that does not depend on the text.

    Raises:
        ConfigError: One does not.
    """
    own = [layer.index for layer in attachment.layers if layer.memory is None]
    if own:
        raise ConfigError(
            f"layers {own} keep the base model's own attention, whose cache grows, and vLLM would need a second kind "
            "of block for them; serve this model by `ahn serve`, or give every layer a memory"
        )


def _check_rotations(base: PreTrainedConfig) -> None:
    """Checks that a token is rotated by its position alone.

    Raises:
        ConfigError: It is rotated by the length of the text too.
    """
    rope = getattr(base.get_text_config(), "rope_parameters", None) or {}
    kinds = [each.get("rope_type") for each in (rope, *rope.values()) if isinstance(each, dict)]
    if any(kind == "longrope" or "dynamic" in str(kind) for kind in kinds):
        raise ConfigError(
            "the rotary positions of this model change with the length of the text, and vLLM reads texts of different "
            "length together; serve it by `ahn serve`"
        )
