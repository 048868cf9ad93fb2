"""Tiny random models of every family in the test matrix, and reference ways of reading a text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn

import ahn
from ahn import memories
from ahn.anchors.learned import AnchorGate
from ahn.anchors.queries import AnchorQueries
from ahn.attachment import attachment_of
from ahn.backbone.compat import CACHE
from ahn.surgery import set_score_weights

SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama:wide": {"head_dim": 16},  # the kernels in C take heads of a multiple of 16; the others run in torch
    "qwen2": {"head_dim": None},
    "qwen3": {},
    "qwen3_moe": {**EXPERTS, "decoder_sparse_step": 1},
    "mistral": {"sliding_window": None},
    "mixtral": {**EXPERTS, "sliding_window": None},
    "gemma2": {"sliding_window": 12, "query_pre_attn_scalar": 8},
    "gemma3_text": {
        "sliding_window": 12,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    },
    "phi3": {"head_dim": None, "sliding_window": None},
    "smollm3": {"head_dim": None, "no_rope_layers": [1, 0, 1]},
    "olmo2": {"head_dim": None},
    "granite": {"head_dim": None, "attention_multiplier": 0.3, "residual_multiplier": 0.7},
    "gpt_oss": {
        **EXPERTS,
        "sliding_window": 12,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    },
    "glm4": {"partial_rotary_factor": 0.5},
    "cohere2": {
        "head_dim": None,
        "sliding_window": 12,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    },
    "starcoder2": {"head_dim": None, "sliding_window": None},
    "deepseek_v3": {
        **EXPERTS,
        "head_dim": None,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "first_k_dense_replace": 1,
    },
    "gpt2": {
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 512,
        "vocab_size": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}
if CACHE == "cache":  # since transformers 5.24 these two go through the attention interface
    FAMILIES |= {family: {"head_dim": None, "rotary_dim": 4} for family in ("gptj", "codegen")}
_CHAT = (
    "{% for turn in messages %}<{{ turn['role'] }}>{{ turn['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CONTRIBUTING = Path(__file__).parents[1] / "CONTRIBUTING.md"
MEMORIES = memories.memory_names()
DOCUMENTED = "retention"
"""Name of the memory that CONTRIBUTING shows."""


def tiny(family: str = "llama", **changes: Any) -> Any:
    """A tiny random causal language model in float32, in evaluation mode."""
    own = FAMILIES.get(family, {})
    sizes = own if family == "gpt2" else {**SIZES, **own}
    settings = {key: value for key, value in {**sizes, **changes}.items() if value is not None}
    if family in ("mistral", "mixtral", "phi3", "starcoder2") and settings.get("sliding_window") is None:
        settings["sliding_window"] = None
    config = transformers.AutoConfig.for_model(family.partition(":")[0], **settings)
    torch.manual_seed(7)
    # Before transformers 5.23, sdpa silently left out Gemma 2's softcap.
    implementation = {"attn_implementation": "eager"} if family == "gemma2" else {}
    model = transformers.AutoModelForCausalLM.from_config(config, **implementation).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.15)
    return model.requires_grad_(False)


@cache
def documented_memory() -> type[memories.Memory]:
    """The memory of CONTRIBUTING, from the very code that stands there."""
    code = re.findall(r"^```python\n(.*?)^```", CONTRIBUTING.read_text(), re.DOTALL | re.MULTILINE)[0]
    module: dict[str, Any] = {"__name__": f"ahn.memories.{DOCUMENTED}"}
    exec(compile(code, str(CONTRIBUTING), "exec"), module)
    kind: type[memories.Memory] = module[DOCUMENTED.title()]
    return kind


@contextmanager
def registered(name: str) -> Iterator[str]:
    """The name of a memory, which is one of the registry inside the block."""
    if name == DOCUMENTED:
        memories.MEMORIES[name] = documented_memory()
    yield name
    if name == DOCUMENTED:
        del memories.MEMORIES[name]


def with_memory(family: str = "llama", memory: str = "gated_delta_net", **settings: Any) -> Any:
    """A tiny model with a memory whose weights are random, so that it changes what the model says."""
    changes = settings.pop("model", {})
    model = tiny(family, **changes)
    ahn.attach(model, ahn.AHNConfig(memory=memory, **{"window": 16, "sinks": 5, **settings}))
    awaken(model)
    return model


def state_size(memory: str, size: int) -> int:
    """Rows, and columns, of a head's state where keys and values have this size."""
    return size + 1 if memory == "linearized_attention" else size


def awaken(model: nn.Module) -> None:
    """Random weights for the attached memories, drawn from a fixed seed."""
    generator = torch.Generator().manual_seed(11)
    for layer in attachment_of(model).layers:
        if layer.memory is None:
            continue
        for name, parameter in layer.memory.named_parameters():
            if parameter.dim() > 1 or name.endswith("_weight"):
                parameter.data.normal_(std=0.4, generator=generator)
            if name == layer.memory.log_rate:
                parameter.data.uniform_(-3, 0, generator=generator)


def give_score_weights(model: nn.Module, layers: tuple[int, ...] = (0, 2)) -> None:
    """Random weights of every anchor score that takes some, for some layers."""
    torch.manual_seed(17)
    for layer in attachment_of(model).layers:
        if layer.index in layers:
            counts = [5, 0 if layer.index else 3]
            queries = AnchorQueries(counts, layer.shape.kv_heads, layer.shape.key_size, long=[True, False])
            queries.queries.normal_()
            for row, offsets in enumerate(queries.offsets):
                offsets[row % len(offsets)].normal_()
            set_score_weights(layer, {"learned": AnchorGate(layer.shape.hidden_size, 4), "asked": queries})


def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of single bytes with a chat template; a model for it has 259 words."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>"])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    fast.chat_template = _CHAT
    return fast


def text(batch: int = 1, tokens: int = 75, seed: int = 3) -> torch.Tensor:
    """Random token ids, `[batch, tokens]`, without special tokens."""
    return torch.randint(3, 128, (batch, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def read(model: Any, ids: torch.Tensor, chunks: list[int] | int | None = None, **kwargs: Any) -> torch.Tensor:
    """Logits of a text read in chunks on one cache, `[batch, tokens, vocabulary]`; in one go if `chunks` is None."""
    if chunks is None:
        return model(ids, **kwargs).logits
    sizes = chunks if isinstance(chunks, list) else [chunks] * -(-ids.size(1) // chunks)
    cache, mask = kwargs.pop("cache", None) or ahn.HippocampalCache(model), kwargs.pop("attention_mask", None)
    logits, start = [], 0
    for size in sizes:
        stop = min(start + size, ids.size(1))
        part = {} if mask is None else {"attention_mask": mask[:, :stop]}
        if "position_ids" in kwargs:
            part["position_ids"] = kwargs["position_ids"][:, start:stop]
        logits.append(model(ids[:, start:stop], cache=cache, **part).logits)
        start = stop
    assert start == ids.size(1), "the chunks do not cover the text"
    return torch.cat(logits, dim=1)
