"""A GGUF file as a model: its architecture, what it says of it, and which weight each tensor is."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ahn.errors import ModelError, one_line
from ahn.models.gguf_file import GGUFFile, TensorPlace, UnknownFormatError

UNREADABLE = (ValueError, IndexError, KeyError, OverflowError, TypeError, OSError)
"""What readers of damaged files raise."""
_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_FOUR_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


class Family(NamedTuple):
    """What is special about the files of an architecture.

    Attributes:
        model_type: Its name in transformers.
        pairs: Whether rows of queries and keys lie as pairs that are rotated together, instead of as two halves.
        shifted_norms: Whether 1 was added to the weights of norms.
        rms: Whether norms divide by the root mean square alone.
        partly_rotated: Whether only part of a head may be rotated.
        names: Names in transformers of parts that other architectures name differently.
    """

    model_type: str
    pairs: bool = False
    shifted_norms: bool = False
    rms: bool = True
    partly_rotated: bool = False
    names: Mapping[str, str] = {}


FAMILIES = {
    "llama": Family("llama", pairs=True),
    "mistral": Family("mistral", pairs=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "gemma": Family("gemma", shifted_norms=True),
    "gemma2": Family("gemma2", shifted_norms=True, names=_FOUR_NORMS),
    "gemma3": Family("gemma3_text", shifted_norms=True, names=_FOUR_NORMS),
    "phi2": Family(
        "phi",
        rms=False,
        partly_rotated=True,
        names={
            "output_norm": "model.final_layernorm",
            "attn_output": "self_attn.dense",
            "ffn_up": "mlp.fc1",
            "ffn_down": "mlp.fc2",
        },
    ),
    "phi3": Family("phi3", partly_rotated=True, names={"ffn_up": "mlp.gate_up_proj"}),
}
"""The architectures that can be read, by their name in GGUF files."""


class GGUFModel:
    """A GGUF file that was opened and checked.

    Args:
        path: The file.

    Raises:
        ModelError: It is damaged, cut off, part of a file, or of an architecture or form that cannot be read.

    Attributes:
        path: The file.
        file: What it says.
        architecture: Its architecture, a key of `FAMILIES`.
        family: The family of its architecture.
        tensors: Its tensors by name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.file = GGUFFile(path)
        except UnknownFormatError as error:
            raise ModelError(f"'{path}' {error}") from None
        except UNREADABLE as error:
            raise self._damaged(error) from None
        if (parts := self.field("split.count", 1)) != 1:
            raise ModelError(
                f"'{path}' is one of {parts} parts of a model, which are not read apart. "
                "Join them: llama-gguf-split --merge FIRST_PART WHOLE_FILE"
            )
        self.tensors = self.file.tensors
        self.architecture = str(self.field("general.architecture"))
        if self.architecture not in FAMILIES:
            raise ModelError(
                f"'{path}' is of the architecture {reprlib.repr(self.architecture)}, which is not read from GGUF; "
                f"those that are: {', '.join(FAMILIES)}. Give a folder of transformers instead."
            )
        self.family = FAMILIES[self.architecture]

    def _damaged(self, error: BaseException) -> ModelError:
        said = one_line(error)[:200]
        return ModelError(f"'{self.path}' is damaged, cut off or no GGUF file: {said}. Download it again.")

    def field(self, key: str, default: Any = None) -> Any:
        """The value of a key, or the default.

        Raises:
            ModelError: It cannot be read.
        """
        try:
            return self.file.value(key, default)
        except UNREADABLE as error:
            raise self._damaged(error) from None

    def own(self, key: str, default: Any = None) -> Any:
        """The value of a key of the architecture.

        Raises:
            ModelError: There is none, and no default.
        """
        value = self.field(f"{self.architecture}.{key}", default)
        if value is None:
            raise ModelError(f"'{self.path}' lacks {self.architecture}.{key}: the file is incomplete")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """A size that the architecture has.

        Raises:
            ModelError: There is none and no default, or it is no size, such as one for each layer.
        """
        value = self.own(key, default)
        if type(value) is not int or value < 1:
            raise ModelError(
                f"'{self.path}' has {reprlib.repr(value)} as {self.architecture}.{key}, which is read as one number "
                "above 0 only. Give the model's folder of transformers and quantize instead."
            )
        return value

    def tensor(self, name: str) -> TensorPlace:
        """A tensor by its name.

        Raises:
            ModelError: There is none.
        """
        if name not in self.tensors:
            raise ModelError(f"'{self.path}' has no tensor {name}: the file is incomplete")
        return self.tensors[name]

    def module(self, stem: str) -> str:
        """The module in transformers that a tensor is of.

        Args:
            stem: The tensor's name without its last part.

        Raises:
            ModelError: The architecture has no place for it.
        """
        top = {**_TOP_NAMES, **self.family.names}
        if stem in _TOP_NAMES:
            return top[stem]
        block, _, rest = stem.partition(".")
        layer, _, part = rest.partition(".")
        names = {**_LAYER_NAMES, **self.family.names}
        if block != "blk" or part not in names:
            raise ModelError(f"'{self.path}' has a tensor {stem} that a {self.architecture} model has no place for")
        return f"model.layers.{layer}.{names[part]}"
