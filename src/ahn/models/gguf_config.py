"""Configs of the models of GGUF files, from what a file says of its architecture."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ahn.errors import ModelError, one_line
from ahn.models.gguf_model import UNREADABLE, GGUFModel

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ROPE_FACTORS = "rope_freqs.weight"
"""The tensor by which the frequencies of rotations are divided."""
_REMEDY = "Give the model's folder of transformers and quantize instead."
_IDS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What Llama 3.1, 3.2 and 3.3 have in common; files say it as divisors of frequencies only."""
_LARGEST_GEMMAS = {"gemma2": 46, "gemma3": 62}
"""Layers of those Gemmas that scale queries by the mean size of a head instead of by its size."""


def read_config(opened: GGUFModel) -> PreTrainedConfig:
    """The config of a model.

    Args:
        opened: Its file.

    Raises:
        ModelError: The file lacks part of it, or says what is not read from GGUF.
    """
    from transformers import AutoConfig

    layers, hidden = opened.size("block_count"), opened.size("embedding_length")
    opened.tensor(f"blk.{layers - 1}.attn_norm.weight")  # so that a damaged count makes no layers
    heads = opened.size("attention.head_count")
    values: dict[str, Any] = {
        "vocab_size": int(opened.tensor("token_embd.weight").shape[0]),
        "hidden_size": hidden,
        "intermediate_size": opened.size("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": opened.size("attention.head_count_kv", heads),
        "head_dim": opened.size("attention.key_length", max(1, hidden // heads)),
        "max_position_embeddings": opened.size("context_length"),
        "tie_word_embeddings": "output.weight" not in opened.tensors,
        "dtype": "float32",
    }
    values |= _norms(opened) | {"rope_parameters": _rotations(opened, values["head_dim"])}
    values |= _EXTRAS.get(opened.architecture, _nothing)(opened, values)
    ids = {name: opened.field(f"tokenizer.ggml.{key}_token_id") for name, key in _IDS.items()}
    try:
        config: PreTrainedConfig = AutoConfig.for_model(opened.family.model_type, **values, **ids)
    except Exception as error:  # configs check themselves with errors of several libraries
        raise ModelError(f"'{opened.path}' does not describe a model: {one_line(error)[:200]}") from None
    return config


def _norms(opened: GGUFModel) -> dict[str, Any]:
    if opened.family.rms:
        return {"rms_norm_eps": opened.own("attention.layer_norm_rms_epsilon")}
    return {"layer_norm_eps": opened.own("attention.layer_norm_epsilon")}


def _rotations(opened: GGUFModel, head_dim: int) -> dict[str, Any]:
    """How positions rotate queries and keys."""
    values: dict[str, Any] = {"rope_type": "default", "rope_theta": float(opened.own("rope.freq_base", 10000.0))}
    rotated = opened.size("rope.dimension_count", head_dim)
    if rotated != head_dim:
        if not opened.family.partly_rotated or rotated > head_dim:
            raise ModelError(f"'{opened.path}' rotates {rotated} numbers of {head_dim}, which is not read. {_REMEDY}")
        values["partial_rotary_factor"] = rotated / head_dim
    scaling = opened.own("rope.scaling.type", "none")
    if scaling == "linear":
        return {**values, "rope_type": "linear", "factor": float(opened.own("rope.scaling.factor"))}
    if scaling != "none" or any(name.startswith("rope_factors") for name in opened.tensors):
        raise ModelError(f"'{opened.path}' scales its positions, which is not read from GGUF. {_REMEDY}")
    if ROPE_FACTORS in opened.tensors:
        return values | _llama3_rotations(opened, rotated, values["rope_theta"])
    return values


def _llama3_rotations(opened: GGUFModel, rotated: int, theta: float) -> dict[str, Any]:
    """The scaling of Llama 3.1 and later, if its divisors are those of the file.

    Source: the model's own code, https://github.com/meta-llama/llama-models (`apply_scaling`).
    """
    try:
        factors = opened.file.read(opened.tensors[ROPE_FACTORS]).astype(np.float64)
    except UNREADABLE as error:
        raise ModelError(f"'{opened.path}' is damaged: {one_line(error)[:200]}. Download it again.") from None
    factor = float(factors.max())
    turns = _LLAMA3_ROPE["original_max_position_embeddings"] / (
        2 * math.pi * theta ** (np.arange(0, rotated, 2) / rotated)
    )
    low, high = _LLAMA3_ROPE["low_freq_factor"], _LLAMA3_ROPE["high_freq_factor"]
    share = np.clip((turns - low) / (high - low), 0, 1)
    expected = 1 / ((1 - share) / factor + share)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise ModelError(f"'{opened.path}' scales its positions in a way that is not known here. {_REMEDY}")
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3_ROPE}


def _nothing(opened: GGUFModel, values: Mapping[str, Any]) -> dict[str, Any]:
    return {}


def _llama(opened: GGUFModel, values: Mapping[str, Any]) -> dict[str, Any]:
    return {"attention_bias": "blk.0.attn_q.bias" in opened.tensors}


def _slides_or_not(opened: GGUFModel, values: Mapping[str, Any]) -> dict[str, Any]:
    return {"sliding_window": opened.own("attention.sliding_window", 0) or None}


def _gemma2(opened: GGUFModel, values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **_gemma_queries(opened, values),
        "sliding_window": opened.size("attention.sliding_window", 4096),
        "attn_logit_softcapping": opened.own("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": opened.own("final_logit_softcapping", 30.0),
    }


def _gemma3(opened: GGUFModel, values: Mapping[str, Any]) -> dict[str, Any]:
    """Sliding layers have frequencies of their own, which are never scaled."""
    local = {"rope_type": "default", "rope_theta": float(opened.own("rope.freq_base_swa", 10000.0))}
    return {
        **_gemma_queries(opened, values),
        "sliding_window": opened.size("attention.sliding_window"),
        "sliding_window_pattern": opened.size("attention.sliding_window_pattern", 6),
        "final_logit_softcapping": opened.field("gemma3.final_logit_softcapping"),
        "rope_parameters": {"full_attention": values["rope_parameters"], "sliding_attention": local},
    }


def _gemma_queries(opened: GGUFModel, values: Mapping[str, Any]) -> dict[str, Any]:
    largest = values["num_hidden_layers"] == _LARGEST_GEMMAS[opened.architecture]
    mean = values["hidden_size"] // values["num_attention_heads"]
    return {"query_pre_attn_scalar": mean if largest else values["head_dim"]}


_EXTRAS: Mapping[str, Callable[[GGUFModel, Mapping[str, Any]], dict[str, Any]]] = {
    "llama": _llama,
    "mistral": _slides_or_not,
    "phi3": _slides_or_not,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
}
