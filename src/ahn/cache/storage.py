"""Saved caches: one safetensors file with every tensor and, in its metadata, what is needed to go on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ahn._home import replaced_file
from ahn.attachment import Attachment
from ahn.config import RunSettings
from ahn.errors import CacheError, ConfigError, OutputError

FORMAT = 2
"""Format of saved caches. Since 2, `side` is called `record`, and Mamba2 keeps log decay and step of each token."""

_MOST = 2**40
"""Tokens that no text passes."""

_FACTS = 8
"""Facts of a layer in a fingerprint."""


class SavedCache(NamedTuple):
    """What a file holds of a cache.

    Attributes:
        settings: Mode, window and sinks.
        seen: Tokens that each layer has seen.
        tensors: Every tensor by name; those of a layer begin with its index and a dot.
    """

    settings: RunSettings
    seen: list[int]
    tensors: dict[str, torch.Tensor]

    @staticmethod
    def rows_of(tensors: Mapping[str, torch.Tensor]) -> int:
        """Rows of the batch; 0 without tensors."""
        return next((tensor.size(0) for tensor in tensors.values() if tensor.dim()), 0)

    def tensors_of(self, part: str, device: torch.device) -> dict[str, torch.Tensor]:
        """The tensors of a part, a layer for example, by their names within it, on a device."""
        prefix = f"{part}."
        return {name.removeprefix(prefix): t.to(device) for name, t in self.tensors.items() if name.startswith(prefix)}


def write_cache(saved: SavedCache, attachment: Attachment, path: str | os.PathLike[str]) -> None:
    """Writes a cache; see `HippocampalCache.save`."""
    header = {
        "format": FORMAT,
        "settings": saved.settings.to_dict(),
        "seen": saved.seen,
        "model": _fingerprint(attachment),
    }
    tensors = {name: tensor.detach().contiguous() for name, tensor in saved.tensors.items()}
    text = json.dumps(header)
    try:
        with replaced_file(path) as part:
            save_file(tensors, part, metadata={"ahn_cache": text, "sha256": _checksum(text, tensors)})
    except OutputError as error:
        raise CacheError(str(error)) from None


def read_cache(path: str | os.PathLike[str], attachment: Attachment) -> SavedCache:
    """What `write_cache` wrote, for the same kind of model; see `HippocampalCache.load`."""
    header, tensors = _read(Path(path))
    if header.model != _fingerprint(attachment):
        raise CacheError(
            f"{path} was saved with another model or memory ({_summary(header.model)}); this one is "
            f"{_summary(_fingerprint(attachment))}"
        )
    try:
        settings = RunSettings(**header.settings)
        attachment.check(settings)
    except (TypeError, ConfigError) as error:
        raise CacheError(f"{path} holds settings that this version or model cannot use: {error}") from None
    if settings.mode == "full":
        raise CacheError(f"{path} holds settings that no cache has; save it again")
    return SavedCache(settings, header.seen, tensors)


def describe_cache(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a saved cache holds, without a model.

    Returns:
        `settings`, `model`, `seen_tokens`, `rows` and `nbytes`.

    Raises:
        CacheError: The file is missing or no saved cache.
    """
    header, tensors = _read(Path(path))
    return {
        "settings": header.settings,
        "model": header.model,
        "seen_tokens": max(header.seen),
        "rows": SavedCache.rows_of(tensors),
        "nbytes": sum(tensor.nbytes for tensor in tensors.values()),
    }


class _Header(NamedTuple):
    """What a file says beside its tensors.

    Attributes:
        settings: Values of `RunSettings`.
        seen: Tokens that each layer has seen.
        model: Fingerprint of the model.
    """

    settings: dict[str, Any]
    seen: list[int]
    model: dict[str, Any]


def _read(path: Path) -> tuple[_Header, dict[str, torch.Tensor]]:
    """What a file holds, held against its checksum."""
    if not os.path.isfile(path):  # that of pathlib raises at a name that is too long
        raise CacheError(f"there is no saved cache at {path}")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            text, checksum = metadata.get("ahn_cache"), metadata.get("sha256")
            values = json.loads(text or "null")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise CacheError(f"{path} is damaged or no saved cache ({error}); save it again") from None
    if text is None or not isinstance(values, dict):
        raise CacheError(f"{path} is a safetensors file, but no saved cache; write one with HippocampalCache.save")
    if values.get("format") != FORMAT:
        raise CacheError(_other_format(path, values.get("format")))
    if checksum != _checksum(text, tensors):
        raise CacheError(f"{path} is damaged (its checksum differs); save it again")
    return _checked_header(path, values), tensors


def _checked_header(path: Path, values: dict[str, Any]) -> _Header:
    """What a file says, if it says all that it must."""
    settings, seen, model = (values.get(name) for name in _Header._fields)
    layers = model.get("layers") if isinstance(model, dict) else None
    right = (
        isinstance(settings, dict)
        and isinstance(seen, list)
        and isinstance(layers, list)
        and all(isinstance(layer, list) and len(layer) == _FACTS for layer in layers)
        and len(seen) == len(layers) > 0
        and all(type(count) is int and 0 <= count <= _MOST for count in seen)
    )
    if not right:
        raise CacheError(f"{path} is damaged or no saved cache (it does not say what it holds); save it again")
    return _Header(settings, seen, model)  # type: ignore[arg-type]


def _checksum(text: str, tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of what a file says and of its tensors, with their names, shapes and dtypes."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype} ".encode())
        if tensor.numel():
            numbers: Any = tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy()
            digest.update(memoryview(numbers))
    return digest.hexdigest()


def _other_format(path: Path, version: object) -> str:
    """What to say of a file of another format."""
    older = isinstance(version, int) and version < FORMAT
    remedy = "read the text again and save it anew" if older else "update ahn"
    return f"{path} has format {version}, this version of ahn reads {FORMAT}; {remedy}"


def _fingerprint(attachment: Attachment) -> dict[str, Any]:
    """What must be alike in the model that goes on reading."""
    return {
        "memory": attachment.config.memory,
        "memory_positions": attachment.config.memory_positions,
        "layers": [
            [*layer.shape, layer.sliding_window, layer.memory is not None, str(layer.dtype)]
            for layer in attachment.layers
        ],
    }


def _summary(fingerprint: dict[str, Any]) -> str:
    layers = fingerprint["layers"]
    hidden, heads, kv_heads, size, *_, dtype = layers[0]
    return (
        f"{fingerprint.get('memory')} on {sum(bool(layer[6]) for layer in layers)} of {len(layers)} layers, "
        f"hidden size {hidden}, {heads} heads, {kv_heads} kv heads of {size}, {str(dtype).removeprefix('torch.')}"
    )
