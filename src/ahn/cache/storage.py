"""Saved caches: one safetensors file with every tensor and, in its metadata, what is needed to go on."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ahn.attachment import Attachment, attachment_of
from ahn.cache.cache import HippocampalCache, layer_tensors, set_layer_tensors
from ahn.cache.layer import HippocampalLayer
from ahn.config import RunSettings
from ahn.errors import CacheError, ConfigError
from ahn.tokens import Padding

FORMAT = 2
Kind = TypeVar("Kind", bound=HippocampalCache)


def save_cache(cache: HippocampalCache, path: str | os.PathLike[str]) -> None:
    """Writes a cache; see `HippocampalCache.save`."""
    tensors = {
        f"{index}.{name}": tensor.detach().contiguous()
        for index, layer in enumerate(cache.layers)
        for name, tensor in layer_tensors(layer).items()
    }
    if cache.padding:
        tensors["padding"] = cache.padding.counts
    if cache.scoreboard:
        tensors |= {f"ballot.{name}": tensor for name, tensor in cache.scoreboard.held.items()}
    header = {
        "format": FORMAT,
        "settings": vars(cache.settings),
        "seen": [layer.get_seq_length() for layer in cache.layers],
        "model": _fingerprint(cache.attachment),
    }
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


def load_cache(kind: type[Kind], path: str | os.PathLike[str], model: nn.Module) -> Kind:
    """Reads a cache; see `HippocampalCache.load`."""
    attachment = attachment_of(model)
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
    cache = kind.__new__(kind)
    cache.begin(attachment, settings)
    devices = [next(site.module.parameters()).device for site in attachment.sites]
    for index, (layer, seen) in enumerate(zip(cache.layers, header["seen"], strict=True)):
        held = {
            name.partition(".")[2]: tensor.to(devices[index])
            for name, tensor in tensors.items()
            if name.startswith(f"{index}.")
        }
        _check_layer(layer, held, seen, path)
        set_layer_tensors(layer, held, seen)
    if cache.scoreboard:
        shared = {name: tensor for name, tensor in tensors.items() if name.startswith("ballot.")}
        cache.scoreboard.held = {name.partition(".")[2]: tensor.to(devices[0]) for name, tensor in shared.items()}
    if "padding" in tensors:
        counts = tensors["padding"].to(devices[0])
        cache.padding = Padding(counts, int(counts.max()))
    return cache


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
        raise CacheError(f"{path} has format {header.get('format')}, this version of ahn reads {FORMAT}; update ahn")
    return header, tensors


def _fingerprint(attachment: Attachment) -> dict[str, Any]:
    """What must be alike in the model that goes on reading."""
    return {
        "memory": attachment.config.memory,
        "memory_positions": attachment.config.memory_positions,
        "layers": [
            [*site.shape, site.sliding_window, site.memory is not None, str(next(site.module.parameters()).dtype)]
            for site in attachment.sites
        ],
    }


def _summary(fingerprint: dict[str, Any]) -> str:
    layers = fingerprint["layers"]
    hidden, heads, kv_heads, size, *_, dtype = layers[0]
    return (
        f"{fingerprint['memory']} on {sum(layer[6] for layer in layers)} of {len(layers)} layers, "
        f"hidden size {hidden}, {heads} heads, {kv_heads} kv heads of {size}, {dtype.removeprefix('torch.')}"
    )


def _check_layer(layer: Any, held: dict[str, torch.Tensor], seen: int, path: object) -> None:
    needed = {"keys", "values", "record"} if isinstance(layer, HippocampalLayer) else {"keys", "values"}
    if seen and not needed <= held.keys():
        raise CacheError(f"{path} lacks {', '.join(sorted(needed - held.keys()))} of a layer; save the cache again")
