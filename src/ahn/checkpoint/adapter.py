"""The library's own format: a folder with a JSON file and a safetensors file, which belong together by a checksum.

A memory is `ahn_config.json` and `ahn.safetensors`; the weights of a learned score go by other names, see `Pair`.

Writing is one atomic step, the replacing of the config: it names the checksum of its weights, which lie ready under a
name of their own until then and take the place of the old ones right after.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ahn.attachment import SAVERS, attachment_of
from ahn.checkpoint.card import write_card
from ahn.checkpoint.content import BaseInfo, Content, memory_config, memory_tensors
from ahn.checkpoint.files import Stored, failure, read_json, stored_tensors, write_json, write_tensors, writing
from ahn.config import AHNConfig
from ahn.errors import CheckpointError


class Pair(NamedTuple):
    """Names of the two files of a folder that belong together.

    Attributes:
        config: The JSON file, whose replacing makes the folder new.
        weights: The safetensors file.
    """

    config: str
    weights: str


MEMORY = Pair("ahn_config.json", "ahn.safetensors")
CONFIG = MEMORY.config
FORMAT_VERSION = 1
_TEMPORARY = ".ahn-"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def save(model: nn.Module, path: str | os.PathLike[str], dtype: str | torch.dtype | None = None) -> None:
    """Saves the memory's weights, and nothing of the base model, as an adapter.

    The folder gets `ahn_config.json` (format version, library version, the base model's name, revision and sizes, the
    memory's settings), `ahn.safetensors` (keys `layers.N.<parameter>`) and a model card, README.md, unless somebody
    wrote one. An adapter that is there already stays whole until the new one is complete, at whatever moment the
    process dies.

    Args:
        model: A model with a memory attached.
        path: The folder; made if it is not there.
        dtype: "float32", "bfloat16" or "float16" to store the weights in; as they are if left out.

    Raises:
        ModelError: No memory is attached.
        CheckpointError: The folder cannot be written, the dtype is none of the three, or a weight is not finite (in
            this dtype).
    """
    attachment = attachment_of(model)
    tensors, base = storable(path, memory_tensors(model), dtype), BaseInfo.of_model(model)
    write_adapter(path, attachment.config, base, tensors)
    parameters = sum(tensor.numel() for tensor in tensors.values())
    write_card(Path(path).expanduser(), attachment.config, base, parameters=parameters, source=str(path))


def storable(
    path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], dtype: str | torch.dtype | None
) -> dict[str, torch.Tensor]:
    """Copies of weights on the CPU in the dtype that they are to be stored in.

    Args:
        path: Where they are to go, for messages.
        tensors: The weights.
        dtype: As for `save`.

    Raises:
        CheckpointError: The dtype is none that is stored, or a weight is not finite in it.
    """
    wanted = _dtype(dtype)
    copies: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        copies[key] = tensor.detach().to(device="cpu", dtype=wanted or tensor.dtype)
        if not bool(copies[key].isfinite().all()):
            raise failure(
                path,
                f"nothing was saved: {key} is not finite in {_name(copies[key].dtype)}",
                "The training has diverged (lower its learning rate), or float16 is too small for it (use bfloat16)",
            )
    return copies


def write_adapter(
    path: str | os.PathLike[str], config: AHNConfig, base: BaseInfo, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Writes an adapter's folder in one atomic step.

    Args:
        path: The folder.
        config: Settings of the memory.
        base: The base model.
        tensors: Weights by our names, on the CPU.

    Raises:
        CheckpointError: It cannot be written.
    """
    write_pair(path, MEMORY, {**about(base), "config": config.to_dict()}, tensors)


def about(base: BaseInfo) -> dict[str, Any]:
    """What every folder of ours says: version of the format and of the library, and the base model."""
    try:
        library = importlib.metadata.version("ahn")
    except importlib.metadata.PackageNotFoundError:
        library = None
    return {
        "format_version": FORMAT_VERSION,
        "ahn_version": library,
        "base": {key: value for key, value in vars(base).items() if value is not None},
    }


def write_pair(
    path: str | os.PathLike[str], pair: Pair, values: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Writes both files of a folder in one atomic step.

    Args:
        path: The folder.
        pair: Names of the files.
        values: What the JSON file says, beside the checksum of the weights.
        tensors: The weights, on the CPU.

    Raises:
        CheckpointError: The folder cannot be written.
    """
    folder = Path(path).expanduser()
    part = folder / f"{_TEMPORARY}{uuid.uuid4().hex}.tmp"
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        try:
            write_tensors(tensors, part)
            checksum = _checksum(part)
            ready = folder / _ready_name(checksum)
            os.replace(part, ready)
            write_json({**values, "weights": {"file": pair.weights, "sha256": checksum}}, part)
            os.replace(part, folder / pair.config)  # from here on the folder is the new one
        finally:
            part.unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):  # another process wrote the same weights and was faster
            os.replace(ready, folder / pair.weights)


def read_adapter(where: str, folder: Path) -> Content:
    """What an adapter's folder holds.

    Args:
        where: The name that the user gave, for messages.
        folder: The folder.

    Raises:
        CheckpointError: A file is missing or damaged, the two do not belong together, the format is unknown.
    """
    values, stored = read_pair(where, folder, MEMORY)
    base = values.get("base")
    return Content(
        where,
        "adapter",
        memory_config(where, values.get("config")),
        BaseInfo.of_dict(base if isinstance(base, dict) else {}, where),
        stored,
        values["format_version"],
        str(values.get("ahn_version") or "") or None,
    )


def read_pair(where: str, folder: Path, pair: Pair) -> tuple[dict[str, Any], dict[str, Stored]]:
    """What the JSON file of a folder says, and the weights that it names.

    Args:
        where: The name that the user gave, for messages.
        folder: The folder.
        pair: Names of the files.

    Raises:
        CheckpointError: A file is missing or damaged, the two do not belong together, the format is unknown.
    """
    values = read_json(folder / pair.config)
    version = values.get("format_version")
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise failure(
            where,
            f"its format version is {version!r}, and this library reads {FORMAT_VERSION}",
            "Upgrade this library if the adapter is newer, or download the adapter again",
        )
    stored = _matching_weights(where, folder, pair, values)
    if stored is None and (again := read_json(folder / pair.config)) != values:  # it was saved anew while we looked
        values, stored = again, _matching_weights(where, folder, pair, again)
    if stored is None:
        raise failure(
            where,
            f"{pair.weights} is damaged or not the one that {pair.config} was saved with (the checksums differ)",
            "Copy or save both files together",
        )
    return values, stored


def _matching_weights(where: str, folder: Path, pair: Pair, values: Mapping[str, Any]) -> dict[str, Stored] | None:
    """The weights that the config names, or `None` if others lie in their place."""
    weights = values.get("weights")
    checksum = weights.get("sha256") if isinstance(weights, dict) else None
    if not isinstance(checksum, str) or not checksum.isalnum():
        raise failure(where, f"{pair.config} names no checksum of the weights", "Copy or download the folder again")
    # A process that died while saving may have left the weights where they lay ready.
    files = [file for name in (pair.weights, _ready_name(checksum)) if (file := folder / name).is_file()]
    if not files:
        raise failure(where, f"{pair.weights} is missing", "Copy or download the folder again, weights included")
    stored_tensors(files[:1])  # that a file is cut off says more than that its checksum differs
    return next((stored_tensors([file]) for file in files if _checksum(file) == checksum), None)


def _ready_name(checksum: str) -> str:
    return f"{_TEMPORARY}{checksum[:16]}.safetensors"


def _remove_leftovers(folder: Path) -> None:
    """Removes what processes left that died while they saved, once it is too old to be in use."""
    for file in folder.glob(f"{_TEMPORARY}*"):
        with contextlib.suppress(OSError):
            if time.time() - file.stat().st_mtime > 3600:
                file.unlink()


def _checksum(file: Path) -> str:
    digest = hashlib.sha256()
    try:
        with file.open("rb") as handle:
            while block := handle.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise failure(file, f"it cannot be read ({error.strerror})", "Check its permissions") from None
    return digest.hexdigest()


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None:
        return None
    torch_dtype = _DTYPES.get(_name(dtype))
    if torch_dtype is None:
        raise CheckpointError(f"An adapter cannot be stored in {dtype}. Use {', '.join(_DTYPES)}.")
    return torch_dtype


def _name(dtype: str | torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


SAVERS.append(save)
