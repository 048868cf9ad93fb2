"""Models of GGUF files: their blocks are kept as they are, and nothing becomes float32 but norms and biases."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ahn.errors import ModelError, one_line
from ahn.models.filling import build, fill
from ahn.models.gguf_config import ROPE_FACTORS, read_config
from ahn.models.gguf_file import TensorPlace
from ahn.models.gguf_model import UNREADABLE, GGUFModel
from ahn.models.heap import trim_heap
from ahn.quantization import GroupedWeight, HalfWeight, StoredWeight, round_to_groups
from ahn.quantization.blocks import BLOCKS, groups_of
from ahn.quantization.groups import fits, spans

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_NUMBERS_AT_ONCE = 2**17  # of a tensor that are read and unpacked at the same time
_FLOATS = ("F32", "F16", "F64", "BF16")


def load_gguf(path: Path, config: PreTrainedConfig | None = None) -> PreTrainedModel:
    """A model of a GGUF file, in evaluation mode, its blocks kept.

    Args:
        path: The file.
        config: Its config, where it is known better than the file says.

    Raises:
        ModelError: The file is damaged, incomplete, or of a kind that cannot be read.
    """
    opened = GGUFModel(path)
    config = config or read_config(opened)
    try:
        model = build(config)
        missing = fill(model, weights(opened), None)
    except UNREADABLE as error:
        said = one_line(error)[:200]
        raise ModelError(f"'{path}' does not hold the weights of the model that it describes: {said}") from None
    if missing:
        raise ModelError(f"'{path}' lacks {len(missing)} weights, {missing[0]} among them: the file is incomplete")
    model.config._name_or_path = model.name_or_path = str(path)
    trim_heap()
    return model


def weights(opened: GGUFModel) -> Iterator[tuple[str, torch.Tensor | StoredWeight]]:
    """The weights of a model by their names in transformers, one after the other.

    Args:
        opened: Its file.

    Raises:
        ModelError: A tensor has no place in the architecture, or is of a type that cannot be read.
    """
    for name, entry in opened.tensors.items():
        if name == ROPE_FACTORS:
            continue  # the config has them
        stem, _, kind = name.rpartition(".")
        for module, rows in _modules(opened, stem, entry):
            weight = _Rows(opened, entry, rows, _paired_heads(opened, stem)).weight()
            if opened.family.shifted_norms and stem.endswith("norm") and isinstance(weight, torch.Tensor):
                weight = weight - 1
            yield f"{module}.{kind}", weight


def _modules(opened: GGUFModel, stem: str, entry: TensorPlace) -> Iterator[tuple[str, slice]]:
    """The modules that a tensor is of, and their rows of it. Phi-2's first files join queries, keys and values."""
    module = opened.module(stem)
    if opened.architecture != "phi2" or not stem.endswith("attn_qkv"):
        yield module, slice(0, entry.shape[0])
        return
    third = entry.shape[0] // 3
    for number, part in enumerate(("q_proj", "k_proj", "v_proj")):
        yield module.replace("qkv_proj", part), slice(number * third, (number + 1) * third)


def _paired_heads(opened: GGUFModel, stem: str) -> int:
    """Heads whose rows lie in pairs in a tensor, 0 if they do not."""
    part = stem.rpartition(".")[2]
    if not opened.family.pairs or part not in ("attn_q", "attn_k"):
        return 0
    heads = opened.size("attention.head_count")
    return heads if part == "attn_q" else opened.size("attention.head_count_kv", heads)


class _Rows:
    """Rows of a tensor, in the order of transformers.

    Args:
        opened: The file.
        entry: The tensor.
        rows: A span of its rows.
        paired_heads: Heads whose rows lie in pairs, or 0.
    """

    def __init__(self, opened: GGUFModel, entry: TensorPlace, rows: slice, paired_heads: int) -> None:
        self.opened, self.entry, self.rows, self.paired_heads = opened, entry, rows, paired_heads

    def weight(self) -> torch.Tensor | StoredWeight:
        """The weight: in few bits, or float32 where the file has plain numbers or rows do not fill groups."""
        kind, shape = self.entry.kind, self.entry.shape
        if kind == "BF16" and len(shape) == 2:
            return HalfWeight(torch.from_numpy(self._read(self.rows)).view(torch.bfloat16))
        if kind in _FLOATS or len(shape) != 2 or not (kind in BLOCKS or fits(shape[1])):
            return self._float32(self.rows)
        height = self.rows.stop - self.rows.start
        parts = (
            slice(self.rows.start + span.start, self.rows.start + span.stop)
            for span in spans(height, shape[1], _NUMBERS_AT_ONCE)
        )
        if self.paired_heads:
            whole = self._read(self.rows)
            data = (whole[part] for part in parts)
        else:
            data = (self._read(part) for part in parts)
        if kind in BLOCKS:
            return GroupedWeight((groups_of(rows, kind) for rows in data), BLOCKS[kind].bits, height)
        return GroupedWeight((round_to_groups(self._numbers(rows), 8) for rows in data), 8, height)

    def _read(self, rows: slice) -> np.ndarray[Any, Any]:
        data = self.opened.file.read(self.entry, rows)
        return halves_from_pairs(data, self.paired_heads) if self.paired_heads else data

    def _float32(self, rows: slice) -> torch.Tensor:
        return self._numbers(self._read(rows)).view(rows.stop - rows.start, *self.entry.shape[1:])

    def _numbers(self, data: np.ndarray[Any, Any]) -> torch.Tensor:
        try:
            return torch.from_numpy(dequantize(data, self.entry.kind))
        except (NotImplementedError, *UNREADABLE):
            name, kind = self.entry.name, self.entry.kind
            raise ModelError(f"'{self.opened.path}' holds {name} as {kind}, a type that cannot be read") from None


def dequantize(data: np.ndarray[Any, Any], kind: str) -> np.ndarray[Any, Any]:
    """What `GGUFFile.read` gives, as float32.

    Args:
        data: Numbers, or bytes of blocks.
        kind: The type of its tensor.

    Raises:
        NotImplementedError: The type is none that can be dequantised.
    """
    import gguf

    return np.array(gguf.dequantize(data, gguf.GGMLQuantizationType[kind]), dtype=np.float32)


def halves_from_pairs(rows: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Undoes the row order of GGUF: llama.cpp rotates neighbouring rows, transformers the two halves of a head.

    Args:
        rows: Rows of numbers or of blocks, `[N, ...]`, or a bias, `[N]`.
        heads: Heads that the rows belong to.
    """
    return rows.reshape(heads, len(rows) // heads // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape)
