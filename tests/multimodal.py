"""Tiny random models that also see images: wrappers around a text decoder, with one image for each that is tried."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

WORDS: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
HEADS = {"head_dim": 8}
SIGHT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
TOKEN_NAMES = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
IMAGE = 127
"""Id of an image's tokens."""


def gemma3() -> Any:
    layers = ["sliding_attention", "full_attention", "full_attention"]
    words = {**WORDS, **HEADS, "sliding_window": 12, "query_pre_attn_scalar": 8, "layer_types": layers}
    tokens = {"mm_tokens_per_image": 4, "image_token_id": IMAGE, "boi_token_id": 125, "eoi_token_id": 126}
    config = transformers.Gemma3Config(text_config=words, vision_config=SIGHT, **tokens)
    return transformers.Gemma3ForConditionalGeneration(config)


def gemma4(**changes: Any) -> Any:
    words = {
        **WORDS,
        **HEADS,
        "global_head_dim": 8,
        "sliding_window": 12,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "vocab_size_per_layer_input": 128,
        "hidden_size_per_layer_input": 8,
        **changes,
    }
    tokens = {"image_token_id": IMAGE, "boi_token_id": 125, "eoi_token_id": 126, "video_token_id": 124}
    sound = {"audio_token_id": 123, "boa_token_id": 122, "eoa_token_index": 121}
    config = transformers.Gemma4Config(text_config=words, vision_config=None, audio_config=None, **tokens, **sound)
    return transformers.Gemma4ForConditionalGeneration(config)


def gemma4_with_shared_layers() -> Any:
    return gemma4(num_kv_shared_layers=1)


def smolvlm() -> Any:
    words = {**WORDS, **HEADS, "model_type": "llama"}
    config = transformers.SmolVLMConfig(
        text_config=words, vision_config=SIGHT, image_token_id=IMAGE, scale_factor=2, pad_token_id=0
    )
    return transformers.SmolVLMForConditionalGeneration(config)


def idefics() -> Any:
    sight = {**SIGHT, "embed_dim": 32}
    config = transformers.IdeficsConfig(**WORDS, vision_config=sight, cross_layer_interval=2, use_resampler=False)
    return transformers.IdeficsForVisionText2Text(config)


def idefics2() -> Any:
    perceiver = {"hidden_size": 32, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2}
    perceiver |= {"resampler_head_dim": 16, "num_key_value_heads": 1}
    config = transformers.Idefics2Config(
        text_config={**WORDS, **HEADS, "model_type": "mistral"},
        vision_config=SIGHT,
        perceiver_config=perceiver,
        image_token_id=IMAGE,
    )
    return transformers.Idefics2ForConditionalGeneration(config)


def idefics3() -> Any:
    config = transformers.Idefics3Config(
        text_config={**WORDS, **HEADS, "model_type": "llama"},
        vision_config=SIGHT,
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=0,
    )
    return transformers.Idefics3ForConditionalGeneration(config)


def _qwen(family: str, sight: dict[str, Any], head_dim: dict[str, int]) -> Any:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    words = {**WORDS, **head_dim, "rope_parameters": rope}
    tokens = dict(zip(TOKEN_NAMES, (IMAGE, 126, 125, 124)))
    kinds = {"depth": 1, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
    config = getattr(transformers, f"{family}Config")(text_config=words, vision_config={**kinds, **sight}, **tokens)
    return getattr(transformers, f"{family}ForConditionalGeneration")(config)


def qwen2_vl() -> Any:
    return _qwen("Qwen2VL", {"embed_dim": 32, "hidden_size": 32}, {})


def qwen2_5_vl() -> Any:
    sight = {"hidden_size": 32, "intermediate_size": 32, "out_hidden_size": 32, "window_size": 8}
    return _qwen("Qwen2_5_VL", {**sight, "fullatt_block_indexes": [0]}, {})


def qwen3_vl() -> Any:
    sight = {"hidden_size": 32, "intermediate_size": 32, "out_hidden_size": 32, "num_position_embeddings": 16}
    return _qwen("Qwen3VL", {**sight, "deepstack_visual_indexes": [0]}, HEADS)


def llava() -> Any:
    config = transformers.LlavaConfig(
        text_config={**WORDS, **HEADS, "model_type": "llama"},
        vision_config={**SIGHT, "model_type": "clip_vision_model"},
        image_token_index=IMAGE,
        vision_feature_layer=-1,
    )
    return transformers.LlavaForConditionalGeneration(config)


def mllama() -> Any:
    words = {**WORDS, "cross_attention_layers": [1], "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    sight = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_global_layers": 1}
    sight |= {"attention_heads": 2, "image_size": 16, "patch_size": 4, "vision_output_dim": 32}
    sight |= {"intermediate_layers_indices": [], "supported_aspect_ratios": [[1, 1]]}
    config = transformers.MllamaConfig(text_config=words, vision_config=sight, image_token_index=IMAGE)
    return transformers.MllamaForConditionalGeneration(config)


def _square(count: int) -> dict[str, torch.Tensor]:
    """One square image for families that take pixels, and its tokens in a text of 30."""
    return {"pixel_values": torch.rand(1, 3, 16, 16), "input_ids": with_image(count)}


def _patches() -> dict[str, torch.Tensor]:
    """One image of 4 x 4 patches for Qwen's families, in 4 tokens."""
    ids = with_image(4)
    return {
        "pixel_values": torch.rand(16, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (ids == IMAGE).long(),
        "input_ids": ids,
    }


def with_image(count: int) -> torch.Tensor:
    """A text of 30 tokens, some of which are an image's, `[1, 30]`."""
    ids = torch.arange(3, 33)[None].clone()
    ids[0, 5 : 5 + count] = IMAGE
    return ids


def _with_types() -> dict[str, torch.Tensor]:
    ids = with_image(4)
    return {"pixel_values": torch.rand(1, 3, 16, 16), "token_type_ids": (ids == IMAGE).long(), "input_ids": ids}


def _stacked() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.rand(1, 1, 3, 16, 16), "input_ids": with_image(4)}


MAKERS: dict[str, Callable[[], Any]] = {
    "gemma3": gemma3,
    "gemma4": gemma4,
    "gemma4, shared layers": gemma4_with_shared_layers,
    "smolvlm": smolvlm,
    "idefics": idefics,
    "idefics2": idefics2,
    "idefics3": idefics3,
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "llava": llava,
    "mllama": mllama,
}
if not hasattr(transformers, "Gemma4Config"):  # in the oldest transformers that this library takes
    MAKERS = {name: make for name, make in MAKERS.items() if not name.startswith("gemma4")}
IMAGES: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
    "gemma3": _with_types,
    "smolvlm": _stacked,
    "idefics2": _stacked,
    "idefics3": _stacked,
    "qwen2_vl": _patches,
    "qwen2_5_vl": _patches,
    "qwen3_vl": _patches,
    "llava": lambda: _square(16),
}
"""Arguments of a call with one image."""

REFUSED: dict[str, str] = {
    "gemma4, shared layers": "read the keys and values of earlier layers",
    "idefics": "does not read four tokens of text itself",
    "mllama": "2 calls of the attention function for 3 layers",
}
"""What takes no memory, and what it is told."""

TWO_WAYS = ("gemma3",)
"""What reads the tokens of an image in both directions."""


def multimodal(name: str) -> Any:
    """A tiny random model in evaluation mode: one of `MAKERS`."""
    torch.manual_seed(1)
    model = MAKERS[name]()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.15)
    return model.eval().requires_grad_(False)
