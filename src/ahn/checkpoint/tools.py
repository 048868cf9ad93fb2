"""Between the formats: converting, merging and describing checkpoints without a model in memory."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from ahn.checkpoint import adapter as own
from ahn.checkpoint import published
from ahn.checkpoint.content import BaseInfo, Content, Kind
from ahn.checkpoint.files import (
    DTYPES,
    INDEX,
    SINGLE,
    HubSource,
    Stored,
    brief,
    download,
    failure,
    new_folder,
    read_json,
    stored_tensors,
    weight_files,
    write_json,
    write_tensors,
)
from ahn.checkpoint.loading import read
from ahn.errors import CheckpointError
from ahn.models import KNOWN, resolve
from ahn.models.loading import is_gguf

Format = Literal["adapter", "published"]
_BESIDE = (
    *("generation_config.json", "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template*", "LICENSE*", "NOTICE*"),
)
_BASE_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "LICENSE*", "NOTICE*")


@dataclasses.dataclass(frozen=True)
class Description:
    """What a checkpoint holds.

    Attributes:
        kind: "adapter" (this library's format), "published" (the memory alone) or "merged" (with the base weights).
        memory: Name of the memory.
        layers: Indices of the layers that have one.
        parameters: Number of the memory's parameters.
        weight_bytes: Bytes of its tensors.
        dtype: What they are stored in, such as "bfloat16"; several are joined by commas.
        window: Tokens of the window that it was saved with; a setting of a run, which any run may change.
        sinks: Number of sinks that it was saved with; also a setting of a run.
        sink_positions: See `AHNConfig`.
        memory_positions: See `AHNConfig`.
        base: Name of the base model, or `None` if the checkpoint does not say.
        base_revision: Its commit on the hub.
        base_sizes: Its family and sizes, as far as the checkpoint says.
        format_version: Version of an adapter's format; 0 for the published ones.
        library_version: Version of the library that wrote an adapter.
    """

    kind: Kind
    memory: str
    layers: tuple[int, ...]
    parameters: int
    weight_bytes: int
    dtype: str
    window: int
    sinks: int
    sink_positions: str
    memory_positions: str
    base: str | None
    base_revision: str | None
    base_sizes: Mapping[str, str | int]
    format_version: int
    library_version: str | None


def describe(path_or_hub_id: str | os.PathLike[str], revision: str | None = None) -> Description:
    """Says what an adapter or a published checkpoint holds, without loading it.

    Args:
        path_or_hub_id: As for `load`.
        revision: As for `load`.

    Raises:
        CheckpointError: There is no such checkpoint, or it is damaged.
    """
    content = read(path_or_hub_id, HubSource(revision))
    config, base, stored = content.config, content.base, list(content.stored.values())
    sizes = {key: value for key, value in vars(base).items() if value is not None and key not in ("name", "revision")}
    return Description(
        kind=content.kind,
        memory=config.memory,
        layers=content.layers,
        parameters=sum(each.elements for each in stored),
        weight_bytes=sum(each.bytes for each in stored),
        dtype=", ".join(sorted({DTYPES.get(each.dtype, each.dtype) for each in stored})),
        window=config.window,
        sinks=config.sinks,
        sink_positions=config.sink_positions,
        memory_positions=config.memory_positions,
        base=base.name,
        base_revision=base.revision,
        base_sizes=sizes,
        format_version=content.format_version,
        library_version=content.library_version,
    )


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    to: Format | None = None,
    base: str | os.PathLike[str] | None = None,
    revision: str | None = None,
) -> None:
    """Converts a memory between this library's format and the published one; its tensors stay what they are to the bit.

    The published format also stores a `D` that nothing reads: it is dropped here and written there as ones.

    Args:
        source: As for `load`. Of a merged folder only the memory is taken.
        target: Folder to write. A published one must be new or empty; an adapter replaces the adapter that is there.
        to: "adapter" or "published"; the other format than the source's if left out.
        base: The base model's folder, hub id or name, to be noted in the target; what the source knows if left out.
        revision: Branch, tag or commit of the source on the hub.

    Raises:
        CheckpointError: The source is damaged or cannot be expressed in this format; the target cannot be written.
        ModelError: There is no such base model.
    """
    content = read(source, HubSource(revision))
    content.check_sizes()
    wanted = to or ("published" if content.kind == "adapter" else "adapter")
    if wanted not in ("adapter", "published"):
        raise CheckpointError(f"There is no format {wanted!r}. Use adapter or published.")
    if wanted == content.kind:
        raise failure(content.where, f"it has the {wanted} format already", "Copy the folder, or choose another format")
    values = None
    if base is not None:
        values, known = _base_of(base, _base_folder(base, ["*.json"]))
        content.check_base(known)
        content = dataclasses.replace(content, base=known)
    if wanted == "published":
        _write_published(content, values, target)
    elif (Path(target).expanduser() / published.CONFIG).exists():
        raise failure(target, "a model lies there, with a config.json of its own", "Choose another folder")
    else:
        own.write_adapter(target, content.config, content.base, content.tensors())


def merge(base: str | os.PathLike[str], adapter: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Writes a folder of the published merged format: base weights, memory and tokenizer, ready for `from_pretrained`.

    The base weights are copied file by file and never lie in memory.

    Args:
        base: The base model's folder, hub id or name, with safetensors whose layers are named `model.layers.N`.
        adapter: The memory, as for `load`.
        target: A new or empty folder.

    Raises:
        CheckpointError: The adapter is damaged or does not fit, the base model cannot be expressed in this format,
            or the target cannot be written.
        ModelError: There is no such base model.

    Warns:
        UserWarning: The adapter was made for a base model of the same sizes but another name.
    """
    content = read(adapter)
    folder = _base_folder(base, _BASE_FILES)
    values, known = _base_of(base, folder)
    content.check_base(known)
    content = dataclasses.replace(content, base=known)
    content.check_sizes()
    config, tensors = published.published_config(content, values), published.published_tensors(content)
    files = weight_files(folder)
    stored = stored_tensors(files)
    _check_mergeable(os.fspath(base), stored, content)
    with new_folder(target) as folder_path:
        _write_shards(files, stored, tensors, folder_path)
        for pattern in _BESIDE:
            for file in folder.glob(pattern):
                if file.is_file():
                    shutil.copyfile(file, folder_path / file.name)
        write_json(config, folder_path / published.CONFIG)


def _write_published(content: Content, base_values: dict[str, Any] | None, target: str | os.PathLike[str]) -> None:
    config, tensors = published.published_config(content, base_values), published.published_tensors(content)
    with new_folder(target) as folder:
        write_tensors(tensors, folder / SINGLE)
        write_json(config, folder / published.CONFIG)


def _write_shards(
    files: list[Path], stored: Mapping[str, Stored], tensors: Mapping[str, torch.Tensor], folder_path: Path
) -> None:
    """The base model's weight files as they are, one more for the memory, and an index of all."""
    names = [f"model-{number:05d}-of-{len(files) + 1:05d}.safetensors" for number in range(1, len(files) + 2)]
    renamed = dict(zip(files, names, strict=False))
    for file, name in renamed.items():
        shutil.copyfile(file, folder_path / name)
    write_tensors(tensors, folder_path / names[-1])
    weight_map = {key: renamed[each.file] for key, each in stored.items()} | dict.fromkeys(tensors, names[-1])
    size = sum(each.bytes for each in stored.values())
    size += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(index, folder_path / INDEX)


def _check_mergeable(where: str, stored: Mapping[str, Stored], content: Content) -> None:
    """Checks that the published format can hold this base model's weights beside the memory's."""
    if any(".ahn." in key for key in stored):
        raise failure(where, "it is merged with a memory already", "Name the base model itself")
    bare = [layer for layer in content.layers if not any(key.startswith(f"model.layers.{layer}.") for key in stored)]
    if bare:
        raise failure(
            where,
            f"its weights do not name their layers model.layers.N (there is no model.layers.{bare[0]})",
            "Keep base model and adapter apart: ahn.from_pretrained(base, adapter=...)",
        )


def _base_folder(base: str | os.PathLike[str], patterns: tuple[str, ...] | list[str]) -> Path:
    source = resolve(base)
    if is_gguf(source):
        remedy = "Name the model's folder of safetensors, or keep base model and memory apart"
        raise failure(
            os.fspath(base), "the weights of a GGUF file are quantised, which this format cannot hold", remedy
        )
    return Path(source) if Path(source).is_dir() else download(source, HubSource(), patterns)


def _base_of(base: str | os.PathLike[str], folder: Path) -> tuple[dict[str, Any], BaseInfo]:
    """A base model's config as it is and what it says about sizes."""
    from transformers import AutoConfig

    where = os.fspath(base)
    values = read_json(folder / "config.json")
    if published.is_published(values):
        raise failure(where, "it is a checkpoint of a memory, not a base model", "Name the base model itself")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # configs check themselves with errors of several libraries
        raise failure(
            where, f"its config.json is not one that transformers can use ({brief(error)})", "Download it again"
        ) from None
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    slides = "sliding_attention" in kinds if kinds else getattr(text, "sliding_window", None) is not None
    if slides:
        raise failure(
            where,
            "its own layers slide over a window, for which the published format has no place",
            "Keep base model and adapter apart: ahn.from_pretrained(base, adapter=...)",
        )
    return values, BaseInfo.of_config(
        text, where if where in KNOWN else str(getattr(config, "_name_or_path", "")) or where
    )
