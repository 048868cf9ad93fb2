"""A model that gets its weights one by one, each quantised before the next one is read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ahn.errors import ModelError
from ahn.quantization import Quantize, Slot, StoredWeight, is_quantized, quantize_model, refuse_saving, slots, store

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_DOWNLOAD_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")


class _WithoutMemory(TorchFunctionMode):
    """Weights that a module makes room for take none; what it computes, such as tables of positions, is real."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Puts `torch.empty` on the meta device."""
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def build(config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    """A float32 model whose large weights are on the meta device, in evaluation mode.

    Args:
        config: Its config.
        **options: For `AutoModelForCausalLM.from_config`.
    """
    from transformers import AutoModelForCausalLM

    with _WithoutMemory():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **options)
    model.eval()
    return model


def fill(
    model: nn.Module, tensors: Iterable[tuple[str, Tensor | StoredWeight]], quantize: Quantize | None
) -> list[str]:
    """Gives a model its weights.

    Args:
        model: A model that `build` made.
        tensors: The weights by name, in any order and dtype; those that are stored in few bits stay so.
        quantize: The format of those that can be quantised, or `None` to keep the others in float32.

    Returns:
        Names of the weights that are still missing.

    Raises:
        ModelError: A weight has another shape than the model's.
    """
    slot_of = {id(slot.parameter): slot for slot in slots(model)}
    shared: dict[int, list[str]] = {}
    waiting = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in waiting.items():
        shared.setdefault(id(parameter), []).append(name)
    for name, weight in tensors:
        asked = waiting.get(name)
        if asked is None:
            continue  # such as tables of positions that older files hold
        shape = tuple((weight.facts if isinstance(weight, StoredWeight) else weight).shape)
        if shape != tuple(asked.shape):
            raise ModelError(f"{name} is {list(shape)} in the file, but config.json asks for {list(asked.shape)}")
        _put(model, slot_of.get(id(asked)), shared[id(asked)], weight, quantize)
        for alias in shared[id(asked)]:
            waiting.pop(alias, None)
    if is_quantized(model):
        model.__dict__["save_pretrained"] = refuse_saving
    return sorted(waiting)


def load_folder(
    source: str, config: PreTrainedConfig, quantize: Quantize, options: Mapping[str, Any]
) -> PreTrainedModel:
    """A model of safetensors, quantised weight by weight as its files are read.

    Args:
        source: A folder, or a hub id.
        config: The model's config.
        quantize: The format.
        options: As for `AutoModelForCausalLM.from_pretrained`.

    Raises:
        ModelError: An option does not go with it, or weights are missing or of another shape.
        OSError: The files cannot be read.
    """
    from transformers import AutoModelForCausalLM

    if clash := sorted({"device_map", "quantization_config"} & set(options)):
        raise ModelError(f"quantize and {clash[0]} exclude each other: leave one of them out")
    folder = _folder(source, options)
    files = sorted(folder.glob("*.safetensors"))
    own = {name: options[name] for name in ("attn_implementation", "trust_remote_code") if name in options}
    model = build(config, **own)
    names = {name for file in files for name in _names(file)}
    if not names or not names >= {name for name, _ in model.named_parameters()}:
        # The file's names are not the model's: transformers renames or joins them.
        model = AutoModelForCausalLM.from_pretrained(source, config=config, dtype="auto", **options).eval()
        quantize_model(model, quantize)
        model.float()
    else:
        fill(model, _tensors(files), quantize)
        _finish(model, folder)
    model.config._name_or_path = model.name_or_path = source
    return model


def _put(
    model: nn.Module, slot: Slot | None, names: list[str], weight: Tensor | StoredWeight, quantize: Quantize | None
) -> None:
    """Puts a weight where it belongs: in few bits where that is wanted and possible, else in float32."""
    if slot is not None and quantize is not None and isinstance(weight, Tensor):
        weight = store(weight, quantize, slot.of_words)
    if slot is not None and isinstance(weight, StoredWeight):
        slot.fill(weight)
        return
    tensor = weight.dequantize() if isinstance(weight, StoredWeight) else weight
    parameter = nn.Parameter(tensor.float().contiguous())
    for name in names:
        parent, _, leaf = name.rpartition(".")
        model.get_submodule(parent)._parameters[leaf] = parameter


def _folder(source: str, options: Mapping[str, Any]) -> Path:
    if not Path(source).is_dir():
        from huggingface_hub import snapshot_download

        own = {name: options[name] for name in _DOWNLOAD_OPTIONS if options.get(name) is not None}
        source = snapshot_download(source, allow_patterns=["*.safetensors", "*.json"], **own)
    return Path(source) / os.fspath(options.get("subfolder") or "")


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())


def _tensors(files: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    """Each file is opened for each tensor anew: what was read of it is mapped, and stays in memory as long as that."""
    for file in files:
        for name in _names(file):
            with safe_open(file, framework="pt") as opened:
                yield name, opened.get_tensor(name)


def _finish(model: PreTrainedModel, folder: Path) -> None:
    from transformers import GenerationConfig

    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
