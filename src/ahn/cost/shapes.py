"""Models whose sizes are known without a file or a download: those that the paper's tables are about."""

from __future__ import annotations

from typing import Any

_COMMON = {"model_type": "qwen2", "max_position_embeddings": 32768, "dtype": "bfloat16"}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-3b": {
        **_COMMON, "hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2,
        "intermediate_size": 11008, "vocab_size": 151936, "tie_word_embeddings": True,
    },
    "qwen2.5-7b": {
        **_COMMON, "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        "intermediate_size": 18944, "vocab_size": 152064, "tie_word_embeddings": False,
    },
    "qwen2.5-14b": {
        **_COMMON, "hidden_size": 5120, "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8,
        "intermediate_size": 13824, "vocab_size": 152064, "tie_word_embeddings": False,
    },
}  # fmt: skip
"""Configs by name. Source: the config.json of Qwen/Qwen2.5-3B, -7B and -14B."""
