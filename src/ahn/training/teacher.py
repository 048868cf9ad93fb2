"""The teacher's hidden states on disk: each text is read once and serves every pass and every memory.

Legend of shapes: B rows, T tokens, R real tokens of a row, D hidden size.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ahn._home import replaced_file
from ahn.attachment import attachment_of
from ahn.checkpoint.content import memory_tensors
from ahn.checkpoint.files import write_tensors
from ahn.errors import ConfigError, OutputError

_STATES = "states"
_SAMPLED = 4096  # elements of each weight that tell one base model from another


class TeacherCache:
    """A folder with the last hidden states of texts that a base model has read with full attention.

    Each text is a file with D values per token in the model's dtype. The names of the files depend on the tokens and on
    the base model's weights, so one folder can serve several models. Reading returns the written values exactly.

    Args:
        folder: The folder; made if it is not there.
        model: A model with a memory attached, whose base is the teacher.

    Raises:
        ConfigError: The folder cannot be written.
    """

    def __init__(self, folder: str | os.PathLike[str], model: nn.Module) -> None:
        self.folder = Path(folder).expanduser() / _fingerprint(model)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{folder} cannot hold the teacher's states ({error.strerror}); name another") from None

    def states(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, read: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """Last hidden states of the real tokens of a batch, `[B, T, D]`; zeros at padding.

        Args:
            input_ids: `[B, T]`.
            attention_mask: `[B, T]`, 0 at padding.
            read: Lets the teacher read the batch, `[B, T, D]`; not called if all its rows were read before.

        Raises:
            ConfigError: The folder cannot be written.
        """
        real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        files = [self._file(ids[is_real]) for ids, is_real in zip(input_ids, real)]
        rows = [_load(file, input_ids.device) for file in files]
        if any(row is None for row in rows):
            states = read()
            for file, row, is_real in zip(files, states, real):
                self._keep(file, row[is_real])
            return states
        found_RD = torch.cat([row for row in rows if row is not None])
        states = found_RD.new_zeros(*input_ids.shape, found_RD.size(-1))
        states[real] = found_RD
        return states

    def _file(self, ids_R: torch.Tensor) -> Path:
        tokens = ids_R.to("cpu", torch.int64).contiguous().numpy().tobytes()
        return self.folder / f"{hashlib.sha256(tokens).hexdigest()[:32]}.safetensors"

    def _keep(self, file: Path, states_RD: torch.Tensor) -> None:
        try:
            with replaced_file(file) as part:
                write_tensors({_STATES: states_RD}, part)
        except OutputError as error:
            raise ConfigError(
                f"{self.folder} cannot hold the teacher's states ({error}); make room, or train without teacher_cache"
            ) from None


def _load(file: Path, device: torch.device) -> torch.Tensor | None:
    """A row's states, or `None` if they are not there (whole)."""
    try:
        return load_file(file, device=str(device))[_STATES]
    except (OSError, SafetensorError, KeyError):
        return None


def _fingerprint(model: nn.Module) -> str:
    """A name for the base model that depends on its weights, not on its name."""
    ours = {id(tensor) for tensor in memory_tensors(model).values()}
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, parameter in model.named_parameters():
        if id(parameter) not in ours:
            some = parameter.detach().flatten()[:_SAMPLED].to("cpu", torch.float64)
            digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
            digest.update(some.numpy().tobytes())
    digest.update(attachment_of(model).base_implementation.encode())
    return digest.hexdigest()[:16]
