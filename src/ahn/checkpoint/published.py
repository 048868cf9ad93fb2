"""The published format: `config.json` and safetensors with keys `model.layers.N.ahn.fn.*`, alone or beside the base.

In a config of this format `sliding_window` is the memory's window at inference, sinks not counted, and says nothing
about the base model. `fa_layer_ids` names the layers that keep full attention.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ahn.checkpoint.content import BaseInfo, Content, Kind, layer_of, memory_config, require_published_positions
from ahn.checkpoint.files import Stored, failure, read_json, stored_tensors, weight_files
from ahn.config import AHNConfig

CONFIG = "config.json"
MARK = "_ahn_implementation"
_KEY = re.compile(r"model\.layers\.(\d{1,5})\.ahn\.fn\.(.+)", re.ASCII)
_AGAIN = "Copy or download the folder again, or correct its config.json"


@dataclasses.dataclass(frozen=True)
class _Names:
    """How the published format names a memory.

    Attributes:
        memory: Its name in the config.
        renamed: Parameters by our name that are called otherwise there.
        unused: Parameters that are stored but never read, `[heads]`, all ones.
    """

    memory: str
    renamed: Mapping[str, str]
    unused: tuple[str, ...] = ()


PUBLISHED = {
    "gated_delta_net": _Names("GatedDeltaNet", {"o_norm": "o_norm.weight", "o_proj": "o_proj.weight"}, ("D",)),
    "delta_net": _Names("DeltaNet", {"o_norm": "o_norm.weight", "o_proj": "o_proj.weight"}),
    "mamba2": _Names("Mamba2", {"norm": "norm.weight", "o_proj": "o_proj.weight"}),
}
LAYERS = {"qwen2": "Qwen2MemDecoderLayer", "qwen3": "Qwen3MemDecoderLayer"}
"""Families that the published implementation has, with the name of their layer there."""

_ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_FIXED = {
    "ahn_position": "prefix",
    "sliding_window_type": "fixed",
    "use_ahn_router": False,
    "use_q_proj": False,
}
_TRAINING = ("loss_type", "save_ahn_only", "use_layerwise_decay", "use_normalized_l2")
_WINDOW = ("sliding_window", "num_attn_sinks", "fa_layer_ids")


def is_published(values: Mapping[str, Any]) -> bool:
    """Whether a model's config is one of this format."""
    return MARK in values


def read_published(where: str, folder: Path) -> Content:
    """What a folder of the published format holds.

    Args:
        where: The name that the user gave, for messages.
        folder: The folder.

    Raises:
        CheckpointError: A file is missing or damaged, or holds what this library does not have.

    Warns:
        UserWarning: It holds weights for layers that keep full attention; they are left out.
    """
    values = read_json(folder / CONFIG)
    if not is_published(values):
        raise failure(
            where, f"its config.json has no {MARK}, so it holds no memory", "Name a folder with an adapter instead"
        )
    for option in ("use_ahn_router", "use_q_proj"):
        if values.get(option):
            raise failure(where, f"it was trained with {option}, which this library does not have", "Train without it")
    base = _base(where, values)
    _require_sizes(where, base, _AGAIN)
    config = memory_config(where, _settings(where, values, base))
    stored, kind = _memory_keys(where, config.memory, stored_tensors(weight_files(folder)))
    return Content(where, kind, config, base, _of_served_layers(where, stored, config.layers))


def _of_served_layers(where: str, stored: dict[str, Stored], layers: tuple[int, ...] | None) -> dict[str, Stored]:
    """The tensors without those of layers that keep full attention, which released files hold too."""
    if layers is None:
        return stored
    idle = sorted({layer for key in stored if (layer := layer_of(key)) is not None and layer not in layers})
    if idle:
        warnings.warn(
            f"{where}: it holds a memory for layers {idle} too, which keep full attention by its fa_layer_ids; "
            "that memory is left out",
            stacklevel=5,
        )
    return {key: tensor for key, tensor in stored.items() if layer_of(key) in layers}


def clean_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """The base model's own config, out of that of a merged folder."""
    ours = {MARK, "_layer_implementation", *_FIXED, *_TRAINING, *_WINDOW}
    clean = {key: value for key, value in values.items() if key not in ours and key != "auto_map"}
    # Left out, some families would fall back to a window of their own.
    clean["sliding_window"] = None
    if "use_sliding_window" in clean:
        clean["use_sliding_window"] = False
    if clean.get("model_type") in LAYERS:
        clean.pop("layer_types", None)
    return clean


def published_config(content: Content, base_values: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The config of a folder in the published format.

    Args:
        content: The memory.
        base_values: The base model's config; what the memory knows about its base if left out.

    Raises:
        CheckpointError: The published format has no such memory.
    """
    require_published_positions(content)
    names = published_names(content)
    family = content.base.model_type or ""
    if base_values is None:
        _require_sizes(content.where, content.base, "Name the base model, too")
        known = {key: value for key, value in vars(content.base).items() if value is not None and key != "revision"}
        base_values = {("_name_or_path" if key == "name" else key): value for key, value in known.items()}
        if family in _ARCHITECTURES:
            base_values["architectures"] = [_ARCHITECTURES[family]]
    exact = sorted(set(range(content.base.num_hidden_layers or 0)) - set(content.layers))
    ours = {
        MARK: names.memory,
        **({"_layer_implementation": LAYERS[family]} if family in LAYERS else {}),
        **_FIXED,
        "fa_layer_ids": ",".join(map(str, exact)),
        "num_attn_sinks": content.config.sinks,
        "sliding_window": content.config.window,
        "use_sliding_window": False,
    }
    return {**_older_names(base_values), **ours}


def published_tensors(content: Content) -> dict[str, torch.Tensor]:
    """All tensors under their published names, the unused ones among them.

    Raises:
        CheckpointError: They cannot be read, or the published format has no such memory.
    """
    names = published_names(content)
    tensors: dict[str, torch.Tensor] = {}
    for key, tensor in content.tensors().items():
        _, layer, parameter = key.split(".", 2)
        prefix = f"model.layers.{layer}.ahn.fn."
        tensors[prefix + names.renamed.get(parameter, parameter)] = tensor
        if parameter == "A_log":
            tensors.update({prefix + unused: torch.ones_like(tensor) for unused in names.unused})
    return tensors


def published_names(content: Content) -> _Names:
    """How the published format names this memory.

    Raises:
        CheckpointError: It does not know it.
    """
    return _names_of(content.where, content.config.memory, "Keep it as an adapter and load it with ahn.load")


def _names_of(where: str, memory: str, remedy: str) -> _Names:
    if memory not in PUBLISHED:
        problem = f"the published format has no memory {memory!r}, only {', '.join(PUBLISHED)}"
        raise failure(where, problem, remedy)
    return PUBLISHED[memory]


def _settings(where: str, values: Mapping[str, Any], base: BaseInfo) -> dict[str, Any]:
    """A published config as the values of an `AHNConfig`."""
    name = values[MARK]
    memory = next((ours for ours, names in PUBLISHED.items() if names.memory == name), name)
    defaults = AHNConfig()
    return {
        "memory": memory,
        "window": values.get("sliding_window", defaults.window),
        "sinks": values.get("num_attn_sinks", defaults.sinks),
        "layers": _layers(where, values.get("fa_layer_ids"), base.num_hidden_layers),
    }


def _layers(where: str, exact: Any, count: int | None) -> tuple[int, ...] | None:
    """The layers with a memory, from those that keep full attention; `None` for all."""
    parts = exact.split(",") if isinstance(exact, str) else exact if isinstance(exact, list) else [exact]
    try:
        indices = {int(part) for part in parts if part is not None and str(part).strip()}
    except (TypeError, ValueError):
        indices = {-1}
    if not indices:
        return None
    layers = tuple(layer for layer in range(count or 0) if layer not in indices)
    if not layers or min(indices) < 0 or max(indices) >= (count or 0):
        raise failure(where, f"fa_layer_ids {exact!r} does not name some of its {count} layers", _AGAIN)
    return layers


def _require_sizes(where: str, base: BaseInfo, remedy: str) -> None:
    """Checks that the sizes are known without which no memory can be made."""
    needed = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads")
    if lacking := [name for name in needed if getattr(base, name) is None]:
        raise failure(where, f"its config does not say the base model's {', '.join(lacking)}", remedy)


def _older_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """A base model's config with the names of transformers 4, which the published implementation reads, beside ours."""
    rope, older = values.get("rope_parameters"), {}
    if isinstance(rope, dict) and "rope_theta" in rope:
        scaled = rope.get("rope_type", "default") != "default"
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"} if scaled else None
        older = {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}
    if "dtype" in values:
        older["torch_dtype"] = values["dtype"]
    return {**older, **values}


def _base(where: str, values: Mapping[str, Any]) -> BaseInfo:
    """The base model that a published config describes."""
    base = BaseInfo.of_dict({**values, "name": values.get("_name_or_path")}, where)
    heads, hidden = base.num_attention_heads, base.hidden_size
    head_dim = base.head_dim or (hidden // heads if heads and hidden else None)
    return dataclasses.replace(base, num_key_value_heads=base.num_key_value_heads or heads, head_dim=head_dim)


def _memory_keys(where: str, memory: str, tensors: Mapping[str, Stored]) -> tuple[dict[str, Stored], Kind]:
    """The memory's tensors by our names, and whether those of the base model lie beside them."""
    names = _names_of(where, memory, _AGAIN)
    ours = {theirs: our for our, theirs in names.renamed.items()}
    theirs = {key: stored for key, stored in tensors.items() if ".ahn." in key}
    if not theirs:
        raise failure(where, "its weights hold no memory (no key model.layers.N.ahn.fn.*)", _AGAIN)
    stored: dict[str, Stored] = {}
    for key, tensor in theirs.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise failure(where, f"{key} belongs to no memory that this library has", _AGAIN)
        if match[2] not in names.unused:
            stored[f"layers.{int(match[1])}.{ours.get(match[2], match[2])}"] = tensor
    return stored, "merged" if len(theirs) < len(tensors) else "published"
