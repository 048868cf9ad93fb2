"""Saved caches: one safetensors file with every tensor and, in its metadata, what is needed to go on."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ahn.attachment import Attachment
from ahn.config import RunSettings
from ahn.errors import CacheError, ConfigError

FORMAT = 2
"""Format of saved caches. Since 2, Mamba2 keeps log decay and step of each token instead of the step alone."""


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

    def of(self, part: str, device: torch.device) -> dict[str, torch.Tensor]:
        """The tensors of a part, a layer for example, by their names within it, on a device."""
        start = f"{part}."
        return {name.removeprefix(start): t.to(device) for name, t in self.tensors.items() if name.startswith(start)}


def write_cache(saved: SavedCache, attachment: Attachment, path: str | os.PathLike[str]) -> None:
    """Writes a cache; see `HippocampalCache.save`."""
    header = {
        "format": FORMAT,
        "settings": vars(saved.settings),
        "seen": saved.seen,
        "model": _fingerprint(attachment),
    }
    tensors = {name: tensor.detach().contiguous() for name, tensor in saved.tensors.items()}
    target = Path(path)
    try:
        handle, part = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        os.close(handle)
        try:
            save_file(tensors, part, metadata={"ahn_cache": json.dumps(header)})
            os.replace(part, target)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(part)
    except OSError as error:
        raise CacheError(f"cannot write the cache to {target}: {error.strerror}") from None


def read_cache(path: str | os.PathLike[str], attachment: Attachment) -> SavedCache:
    """What `write_cache` wrote, for the same kind of model; see `HippocampalCache.load`."""
    header, tensors = _read(Path(path))
    if header["model"] != _fingerprint(attachment):
        raise CacheError(
            f"{path} was saved with another model or memory ({_summary(header['model'])}); this one is "
            f"{_summary(_fingerprint(attachment))}"
        )
    try:
        settings = RunSettings(**header["settings"])
    except (TypeError, ConfigError) as error:
        raise CacheError(f"{path} holds settings that this version cannot use: {error}") from None
    for site, seen in zip(attachment.sites, header["seen"], strict=True):
        needed = {"keys", "values", "record"} if site.memory is not None else {"keys", "values"}
        if seen and (missing := {name for name in needed if f"{site.index}.{name}" not in tensors}):
            raise CacheError(f"{path} lacks {', '.join(sorted(missing))} of a layer; save the cache again")
    return SavedCache(settings, header["seen"], tensors)


def describe_cache(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a saved cache holds, without a model.

    Returns:
        `settings`, `model`, `seen_tokens`, `rows` and `nbytes`.

    Raises:
        CacheError: The file is missing or no saved cache.
    """
    header, tensors = _read(Path(path))
    rows = {tensor.size(0) for tensor in tensors.values()}
    return {
        "settings": header["settings"],
        "model": header["model"],
        "seen_tokens": max(header["seen"]),
        "rows": rows.pop() if rows else 0,
        "nbytes": sum(tensor.nbytes for tensor in tensors.values()),
    }


def _read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    if not path.is_file():
        raise CacheError(f"there is no saved cache at {path}")
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get("ahn_cache", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise CacheError(f"{path} is damaged or no saved cache ({error}); save it again") from None
    if header is None:
        raise CacheError(f"{path} is a safetensors file, but no saved cache; write one with HippocampalCache.save")
    if header.get("format") != FORMAT:
        raise CacheError(_other_format(path, header.get("format")))
    return header, tensors


def _other_format(path: Path, found: object) -> str:
    """What to say of a file of another format."""
    older = isinstance(found, int) and found < FORMAT
    remedy = "read the text again and save it anew" if older else "update ahn"
    return f"{path} has format {found}, this version of ahn reads {FORMAT}; {remedy}"


def _fingerprint(attachment: Attachment) -> dict[str, Any]:
    """What must be alike in the model that goes on reading."""
    return {
        "memory": attachment.config.memory,
        "memory_positions": attachment.config.memory_positions,
        "layers": [
            [*site.shape, site.sliding_window, site.memory is not None, str(site.dtype)] for site in attachment.sites
        ],
    }


def _summary(fingerprint: dict[str, Any]) -> str:
    layers = fingerprint["layers"]
    hidden, heads, kv_heads, size, *_, dtype = layers[0]
    return (
        f"{fingerprint['memory']} on {sum(layer[6] for layer in layers)} of {len(layers)} layers, "
        f"hidden size {hidden}, {heads} heads, {kv_heads} kv heads of {size}, {dtype.removeprefix('torch.')}"
    )
