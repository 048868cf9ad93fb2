"""What the cost model knows of a base model: sizes found on a model without weights, built from its config alone.

The model is made on torch's meta device, where tensors have shapes and no values, and surveyed as `attach` would.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import os
from collections.abc import Callable
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ahn.attachment import Attachment, AttentionLayer
from ahn.backbone.rotary import find_rotary
from ahn.backbone.survey import find_backbone
from ahn.checkpoint.published import clean_config, is_published
from ahn.config import AHNConfig
from ahn.errors import ModelError, one_line
from ahn.memories import Memory, MemoryShape, build_memory, memory_names
from ahn.models import as_dtype, load_config
from ahn.surgery import survey

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_COMMON = {"model_type": "qwen2", "max_position_embeddings": 32768, "dtype": "bfloat16"}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-3b": {
        **_COMMON, "hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2,
        "intermediate_size": 11008, "vocab_size": 151936, "tie_word_embeddings": True,
    },
    "qwen2.5-7b": {
        **_COMMON, "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        "intermediate_size": 18944, "vocab_size": 152064, "tie_word_embeddings": False,
    },
    "qwen2.5-14b": {
        **_COMMON, "hidden_size": 5120, "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8,
        "intermediate_size": 13824, "vocab_size": 152064, "tie_word_embeddings": False,
    },
    "qwen3-8b": {
        **_COMMON, "model_type": "qwen3", "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 12288, "vocab_size": 151936,
        "max_position_embeddings": 40960, "tie_word_embeddings": False,
    },
}  # fmt: skip
"""Configs of the models of the paper's tables and of Qwen3-8B, by name. Source: config.json of Qwen/Qwen2.5-3B, -7B,
-14B and Qwen/Qwen3-8B."""


@dataclasses.dataclass(frozen=True)
class Base:
    """A base model as the cost model sees it.

    Attributes:
        name: Its name, as given.
        family: Its family, as transformers names it.
        dtype: What its weights, keys and values are held in.
        attachment: Its layers as `attach` would serve them, on the meta device.
        layers: One of each kind of layer, and how many there are of it.
        memories: Every memory of the registry, by its name and the shape of its layer, on the meta device.
        parameters: Number of its parameters; tied ones count once.
        mixer_weights: Numbers in the matrices of its attention layers.
        other_weights: Numbers in its other matrices that a token passes: of experts, those that it is sent to; the
            vocabulary is counted apart.
        vocabulary_weights: Numbers in the matrix from hidden states to logits.
    """

    name: str
    family: str
    dtype: torch.dtype
    attachment: Attachment
    layers: tuple[tuple[AttentionLayer, int], ...]
    memories: dict[tuple[str, MemoryShape], Memory]
    parameters: int
    mixer_weights: int
    other_weights: int
    vocabulary_weights: int


def read_base(
    base: str | os.PathLike[str] | PreTrainedConfig,
    config: AHNConfig | None = None,
    dtype: str | torch.dtype | None = None,
) -> Base:
    """Finds a model's sizes from its config, without its weights.

    Args:
        base: A name in `SHAPES`, a name as for `ahn.models.resolve`, or a config of transformers.
        config: Window, sinks, and which layers get a memory; `AHNConfig()` if left out. Every memory is counted,
            whatever its `memory` is, and that itself where it joins several. The slots of the Compressive Transformer
            fill its state.
        dtype: Of the weights: a torch dtype or its name. Left out or "auto", what the config says, or float32.

    Raises:
        ModelError: There is no such model, or it cannot be given a memory.
        ConfigError: The settings do not fit this model.
    """
    config = config or AHNConfig()
    name, settings = _config(base)
    held_in = _dtype(settings, dtype)
    with torch.device("meta"):
        model = _build(name, settings)
        attachment = survey(model, config, rotations=_undoes_rotations(config))
        shapes = {layer.shape for layer in attachment.layers}
        memories = {(each, shape): build_memory(each, shape).to(held_in) for each in memory_names() for shape in shapes}
    backbone, head = find_backbone(model), model.get_output_embeddings()
    mixers = {id(parameter) for layer in attachment.layers for parameter in layer.module.parameters()}
    return Base(
        name=name,
        family=settings.model_type,
        dtype=held_in,
        attachment=attachment,
        layers=_kinds(attachment),
        memories=memories,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        mixer_weights=_passed(backbone, lambda parameter: id(parameter) in mixers),
        other_weights=_passed(backbone, lambda parameter: id(parameter) not in mixers),
        vocabulary_weights=0 if head is None else head.weight.numel(),
    )


def _config(base: Any) -> tuple[str, PreTrainedConfig]:
    """Name and config of a model."""
    from transformers import AutoConfig

    if not isinstance(base, str | os.PathLike):
        return str(base.model_type), base
    name = os.fspath(base)
    if name in SHAPES:
        return name, AutoConfig.for_model(**SHAPES[name])
    config = load_config(name, SHAPES)
    if is_published(values := config.to_dict()):  # its sliding window is the memory's, not the model's
        config = type(config).from_dict(clean_config(values))
    return name, config


def _dtype(config: Any, dtype: str | torch.dtype | None) -> torch.dtype:
    stored = getattr(config.get_text_config(), "dtype", None) or torch.float32
    chosen = as_dtype(None if dtype == "auto" else dtype, stored)
    return getattr(torch, chosen.removeprefix("torch.")) if isinstance(chosen, str) else chosen


def _undoes_rotations(config: AHNConfig) -> bool:
    return config.memory_positions == "none" or config.sink_positions == "bounded"


def _build(name: str, config: Any) -> Any:
    """The model without weights; to be called where the meta device is the default.

    It is in bfloat16, whatever is counted, because torch multiplies groups of experts without values only in that.
    """
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=torch.bfloat16, attn_implementation="eager"
        ).eval()
    except Exception as error:  # families and their configs check themselves with errors of several kinds
        text = one_line(error)
        raise ModelError(f"'{name}' cannot be built from its config: {text[:300]}. Check its config.json.") from None
    if (rotary := find_rotary(model)) is not None:
        # Frequencies that follow the length of the text would look at values; the innermost function does not.
        rotary.forward = MethodType(inspect.unwrap(type(rotary).forward), rotary)
    return model


def _kinds(attachment: Attachment) -> tuple[tuple[AttentionLayer, int], ...]:
    """Layers that cost the same, as one of them and their number."""
    kinds: dict[Any, list[AttentionLayer]] = {}
    for layer in attachment.layers:
        rotates = None if layer.rotation is None else layer.rotation.changes_with_length
        kinds.setdefault((layer.shape, layer.sliding_window, type(layer.memory), rotates), []).append(layer)
    return tuple((layers[0], len(layers)) for layers in kinds.values())


def _passed(backbone: nn.Module, wanted: Callable[[nn.Parameter], bool]) -> int:
    """Numbers in the matrices that every token is multiplied with."""
    total = 0
    for path, module in backbone.named_modules():
        if isinstance(module, nn.Embedding):
            continue  # a token is looked up there
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1 and not name.endswith("bias") and wanted(parameter):
                used, experts = _experts(backbone, path.split("."), parameter)
                total += parameter.numel() * used // experts
    return total


def _experts(backbone: Any, path: list[str], parameter: nn.Parameter) -> tuple[int, int]:
    """How many of a layer's experts a token is sent to, and how many there are; 1 of 1 for any other matrix."""
    if "experts" not in path:
        return 1, 1
    holder = backbone.get_submodule(".".join(path[: path.index("experts") + 1]))
    experts = len(holder) if isinstance(holder, nn.ModuleList) else parameter.size(0)
    return min(experts, getattr(backbone.config, "num_experts_per_tok", experts)), experts
