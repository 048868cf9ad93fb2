"""Models of GGUF files: their blocks are kept as they are, and nothing becomes float32 but norms and biases."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from ahn.errors import ModelError, one_line
from ahn.models.filling import build, fill
from ahn.models.gguf_file import GGUFFile, TensorPlace
from ahn.quantization import GroupedWeight, HalfWeight, StoredWeight, round_to_groups
from ahn.quantization.blocks import BLOCKS, groups_of
from ahn.quantization.groups import spans

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_UNREADABLE = (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError, TypeError, OSError)
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
_NUMBERS_AT_ONCE = 2**21  # of a tensor that are unpacked at the same time
_ROPE_TENSORS = ("rope_freqs", "rope_factors_long", "rope_factors_short")


class Family(NamedTuple):
    """What is special about the files of an architecture.

    Attributes:
        model_type: Its name in transformers.
        pairs: Whether rows of queries and keys lie as pairs that are rotated together, instead of as two halves.
        joined: Whether gate and up projection are one tensor.
        shifted_norms: Whether 1 was added to the weights of norms.
    """

    model_type: str
    pairs: bool = False
    joined: bool = False
    shifted_norms: bool = False


FAMILIES = {
    "llama": Family("llama", pairs=True),
    "mistral": Family("mistral", pairs=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "gemma": Family("gemma", shifted_norms=True),
    "phi3": Family("phi3", joined=True),
}
"""The architectures that can be read, by their name in GGUF files."""


class GGUFModel:
    """A GGUF file that was opened and checked.

    Args:
        path: The file.

    Raises:
        ModelError: It is damaged or cut off, or of an architecture that cannot be read.

    Attributes:
        path: The file.
        file: What it says.
        family: The family of its architecture.
        tensors: Its tensors by name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.file = GGUFFile(path)
            self.architecture = self.field("general.architecture")
        except _UNREADABLE as error:
            said = one_line(error)[:200]
            raise ModelError(f"'{path}' is damaged, cut off or no GGUF file: {said}. Download it again.") from None
        self.tensors = self.file.tensors
        if self.architecture not in FAMILIES:
            raise ModelError(
                f"'{path}' is of the architecture {self.architecture!r}, which is not read from GGUF; "
                f"those that are: {', '.join(FAMILIES)}. Give a folder of transformers instead."
            )
        self.family = FAMILIES[self.architecture]

    def field(self, key: str, default: Any = None) -> Any:
        """The value of a key, or the default."""
        return self.file.value(key, default)

    def own(self, key: str, default: Any = None) -> Any:
        """The value of a key of the architecture.

        Raises:
            ModelError: There is none, and no default.
        """
        value = self.field(f"{self.architecture}.{key}", default)
        if value is None:
            raise ModelError(f"'{self.path}' lacks {self.architecture}.{key}: the file is incomplete")
        return value

    def config(self) -> PreTrainedConfig:
        """The config of the model.

        Raises:
            ModelError: The file lacks part of it, or its positions are scaled in a way that is not read from GGUF.
        """
        from transformers import AutoConfig

        self._refuse_scaled_positions()
        heads, hidden = self.own("attention.head_count"), self.own("embedding_length")
        self._tensor(f"blk.{self.own('block_count') - 1}.attn_norm.weight")  # so that a damaged count makes no layers
        values: dict[str, Any] = {
            "vocab_size": int(self._tensor("token_embd.weight").shape[0]),
            "hidden_size": hidden,
            "intermediate_size": self.own("feed_forward_length"),
            "num_hidden_layers": self.own("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self.own("attention.head_count_kv", heads),
            "head_dim": self.own("attention.key_length", hidden // heads),
            "max_position_embeddings": self.own("context_length"),
            "rms_norm_eps": self.own("attention.layer_norm_rms_epsilon"),
            "rope_parameters": {"rope_type": "default", "rope_theta": self.own("rope.freq_base", 10000.0)},
            "tie_word_embeddings": "output.weight" not in self.tensors,
            "dtype": "float32",
        }
        if self.family.model_type == "llama":
            values["attention_bias"] = "blk.0.attn_q.bias" in self.tensors
        if self.family.model_type in ("mistral", "phi3"):
            values["sliding_window"] = self.own("attention.sliding_window", 0) or None
        ids = {name: self.field(f"tokenizer.ggml.{key}_token_id") for name, key in _IDS.items()}
        config: PreTrainedConfig = AutoConfig.for_model(self.family.model_type, **values, **ids)
        return config

    def _refuse_scaled_positions(self) -> None:
        scaled = self.field(f"{self.architecture}.rope.scaling.type", "none") != "none"
        if scaled or any(name.startswith(_ROPE_TENSORS) for name in self.tensors):
            raise ModelError(
                f"'{self.path}' scales its positions, which is not read from GGUF. "
                "Give the model's folder of transformers and quantize instead."
            )

    def _tensor(self, name: str) -> TensorPlace:
        if name not in self.tensors:
            raise ModelError(f"'{self.path}' has no tensor {name}: the file is incomplete")
        return self.tensors[name]

    def weights(self) -> Iterator[tuple[str, torch.Tensor | StoredWeight]]:
        """The weights by their names in transformers, one after the other.

        Raises:
            ModelError: A tensor has no place in the architecture, or is of a type that cannot be read.
        """
        for name, tensor in self.tensors.items():
            data = self.file.read(tensor)
            stem, _, kind = name.rpartition(".")
            if self.family.pairs and stem.rpartition(".")[2] in ("attn_q", "attn_k"):
                data = halves_from_pairs(data, self._heads(stem))
            weight = self._weight(data, tensor)
            if self.family.shifted_norms and stem.endswith("norm") and isinstance(weight, torch.Tensor):
                weight = weight - 1
            yield f"{self._name(stem)}.{kind}", weight

    def _heads(self, stem: str) -> int:
        heads = self.own("attention.head_count")
        return int(heads if stem.endswith("attn_q") else self.own("attention.head_count_kv", heads))

    def _name(self, stem: str) -> str:
        if stem in _TOP_NAMES:
            return _TOP_NAMES[stem]
        block, _, rest = stem.partition(".")
        layer, _, part = rest.partition(".")
        if block != "blk" or part not in _LAYER_NAMES:
            raise ModelError(f"'{self.path}' has a tensor {stem} that a {self.architecture} model has no place for")
        own = "mlp.gate_up_proj" if self.family.joined and part == "ffn_up" else _LAYER_NAMES[part]
        return f"model.layers.{layer}.{own}"

    def _weight(self, data: Any, tensor: TensorPlace) -> torch.Tensor | StoredWeight:
        kind = tensor.kind
        if kind in BLOCKS:
            rows = spans(tensor.shape[0], tensor.shape[1], _NUMBERS_AT_ONCE)
            return GroupedWeight((groups_of(data[span], kind) for span in rows), BLOCKS[kind].bits)
        if kind == "BF16":
            bits = torch.from_numpy(data).view(torch.int16)
            return HalfWeight(bits.view(torch.bfloat16)) if bits.dim() == 2 else bits.view(torch.bfloat16).float()
        try:
            weight = torch.from_numpy(dequantize(data, kind))
        except (NotImplementedError, *_UNREADABLE):
            raise ModelError(f"'{self.path}' holds {tensor.name} as {kind}, a type that cannot be read") from None
        plain = kind in ("F32", "F16", "F64") or weight.size(-1) % 32
        return weight if plain else GroupedWeight(round_to_groups(weight, 8), 8)


_IDS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}


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


def load_gguf(path: Path, config: PreTrainedConfig | None = None) -> PreTrainedModel:
    """A model of a GGUF file, in evaluation mode, its blocks kept.

    Args:
        path: The file.
        config: Its config, where it is known better than the file says.

    Raises:
        ModelError: The file is damaged, incomplete, or of a kind that cannot be read.
    """
    opened = GGUFModel(path)
    try:
        model = build(config or opened.config())
        missing = fill(model, opened.weights(), None)
    except _UNREADABLE as error:
        said = one_line(error)[:200]
        raise ModelError(f"'{path}' does not hold the weights of the model that it describes: {said}") from None
    if missing:
        raise ModelError(f"'{path}' lacks {len(missing)} weights, {missing[0]} among them: the file is incomplete")
    model.config._name_or_path = model.name_or_path = str(path)
    return model
