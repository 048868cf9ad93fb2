"""What a training keeps on disk: adapters of a few megabytes, and checkpoints that are complete or absent."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ahn._home import flush
from ahn.attachment import attachment_of
from ahn.checkpoint.adapter import write_adapter
from ahn.checkpoint.content import BaseInfo, check_keys, check_shapes, memory_tensors
from ahn.checkpoint.loading import read
from ahn.errors import CheckpointError, one_line

_STAGING = ".saving"
_CHECKPOINT = re.compile(r"checkpoint-(\d{1,15})", re.ASCII)


def save_adapter(model: nn.Module, path: str | os.PathLike[str], write: bool = True) -> None:
    """Saves the memories alone, also of a model that is sharded over several processes.

    Args:
        model: A model with a memory attached.
        path: The folder.
        write: Whether this process writes. Where the model is sharded every process has to call, because each has a
            part of the weights.

    Raises:
        CheckpointError: The folder cannot be written, or a weight is not finite.
    """
    tensors = {key: _whole(tensor.detach()).cpu() for key, tensor in memory_tensors(model).items()}
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise CheckpointError(f"{os.fspath(path)}: nothing was saved, for the training has diverged. Lower its lr.")
    if write:
        write_adapter(path, attachment_of(model).config, BaseInfo.of_model(model), tensors)


@torch.no_grad()
def load_adapter(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Loads what `save_adapter` wrote onto a model that has the same memory attached, sharded or not.

    Args:
        model: The model; its memories keep their dtype, device and placement.
        path: The folder.

    Raises:
        CheckpointError: It is damaged or of another memory.
    """
    content, parameters = read(path), memory_tensors(model)
    tensors = content.tensors()
    check_keys(content.where, tensors, set(parameters))
    check_shapes(content.where, tensors, {key: tuple(parameter.shape) for key, parameter in parameters.items()})
    for key, parameter in parameters.items():
        tensor = tensors[key].to(parameter.device, parameter.dtype)
        if isinstance(parameter, DTensor):
            tensor = distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
        parameter.copy_(tensor)


def last_whole_checkpoint(folder: Path, say: Callable[[str], None] = lambda words: None) -> str | None:
    """The newest checkpoint of a run that can be read, or `None` where there is none.

    Args:
        folder: Folder of the run.
        say: Is told of those that are damaged and left out.
    """
    by_step = {
        int(match[1]): path for path in folder.glob("checkpoint-*") if (match := _CHECKPOINT.fullmatch(path.name))
    }
    for step in sorted(by_step, reverse=True):
        if (reason := _damage(by_step[step])) is None:
            return str(by_step[step])
        say(f"checkpoint-{step} is damaged and left out ({reason})")
    return None


def _damage(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be read, or `None`."""
    try:
        read(checkpoint).tensors()
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        for file in [*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")]:
            with zipfile.ZipFile(file) as content:
                if (part := content.testzip()) is not None:
                    return f"{part} in {file.name} has another checksum"
    except (CheckpointError, OSError, ValueError, RecursionError, zipfile.BadZipFile) as error:
        return one_line(error)
    return None


@contextlib.contextmanager
def staged(folder: Path, name: str, write: bool) -> Iterator[Path]:
    """A temporary folder for `folder/name`, renamed in one step when everything is on the disk.

    Args:
        folder: Folder of the run.
        name: Name of the checkpoint.
        write: Whether this process moves it; the others only learn the place.

    Yields:
        The folder in which to write `name`. Leftovers of a process that died are removed first.
    """
    staging = folder / _STAGING
    if write:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    yield staging
    if not write:
        return
    _flush(staging / name)
    if (folder / name).exists():
        os.replace(folder / name, staging / "replaced")
    os.replace(staging / name, folder / name)
    _flush_entry(folder)
    shutil.rmtree(staging, ignore_errors=True)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _flush(folder: Path) -> None:
    """Waits until a folder and all in it are on the disk."""
    for path in [*folder.rglob("*"), folder]:
        _flush_entry(path)


def _flush_entry(path: Path) -> None:
    """As `flush`; Windows has no such thing for folders."""
    if not (path.is_dir() and os.name == "nt"):
        flush(path)
