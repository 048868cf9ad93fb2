"""The model that vLLM builds: its own Transformers backend, with a memory in place of each attention layer's cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from transformers.modeling_utils import AttentionInterface
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.distributed.utils import get_pp_indices
from vllm.model_executor.models.interfaces import HasInnerState, IsAttentionFree
from vllm.model_executor.models.transformers.base import VLLM_ATTN_ATTR, Base
from vllm.model_executor.models.transformers.causal import CausalMixin
from vllm.model_executor.models.transformers.moe import MoEMixin

from ahn.attachment import MODULE, SCORE_WEIGHTS, Attachment, AttentionLayer
from ahn.backbone.rotary import Rotation, find_rotary
from ahn.config import RunSettings
from ahn.memories import build_memory, memory_kinds
from ahn.serving.vllm.decoder import leave_to_kernels
from ahn.serving.vllm.layer import MemoryAttention, StepHolder, served_attention
from ahn.serving.vllm.layout import block_bytes, block_tensors, empty_cache
from ahn.serving.vllm.linear import ServedReader, keep_weights
from ahn.serving.vllm.memory import ServedMemory, give_score_weights, own_heads, read_memory, survey_base
from ahn.serving.vllm.parsing import FIELD
from ahn.serving.vllm.runtime import Runtime, ServedLayer

IMPLEMENTATION = "ahn_vllm"
"""Name under which the attention function is registered with transformers."""


class MemoryMixin(Base):  # type: ignore[misc]
    """What a memory changes of vLLM's Transformers backend."""

    memory: ServedMemory
    attachment: Attachment
    runtime: Runtime
    holder: StepHolder

    def _patch_config(self) -> None:
        """As the backend does, and looks at the base before its modules are replaced."""
        super()._patch_config()
        self.memory = read_memory(getattr(self.config, FIELD, {}), self.model_config.model, self.model_config.revision)
        self.attachment = survey_base(self.config, self.memory.config)

    def _decorate_for_torch_compile(self) -> None:
        """Compiles nothing: the layers look at whose tokens they are given."""

    def _create_attention_instances(self, prefix: str = "") -> None:
        """Gives the attention modules of this process their memories, in place of vLLM's attention."""
        start, end = get_pp_indices(
            self.text_config.num_hidden_layers, self.pp_group.rank_in_group, self.pp_group.world_size
        )
        layers = list(self.attachment.layers)
        for index in range(start, end):
            layers[index] = self._local_layer(index)
        self.attachment.layers = tuple(layers)
        give_score_weights(self.attachment, self.memory, self.config)
        settings = RunSettings.like(self.memory.config)
        cache = empty_cache(self.attachment, settings)
        served = {i: ServedLayer(layers[i], block_tensors(cache, i)) for i in range(start, end)}
        self.runtime = Runtime(self.attachment, settings, served)
        names = {i: f"{prefix}.{self.attention_fusers[i][0]}.{VLLM_ATTN_ATTR}".lstrip(".") for i in served}
        self.holder = StepHolder(self.runtime, names[start])
        page_bytes = max(block_bytes(each.tensors) for each in served.values())
        for each in served.values():
            attention = MemoryAttention(each, self.holder, page_bytes, names[each.layer.index], self.vllm_config)
            setattr(each.layer.module, VLLM_ATTN_ATTR, attention)
            each.layer.module.register_forward_pre_hook(attention.note, with_kwargs=True)
        AttentionInterface.register(IMPLEMENTATION, served_attention)
        self.text_config._attn_implementation = IMPLEMENTATION

    def _local_layer(self, index: int) -> AttentionLayer:
        """A layer of this process, with the heads that are its share."""
        attention = self.attachment.layers[index]
        module = self.get_submodule(self.attention_fusers[index][0])
        ranks, device = get_tensor_model_parallel_world_size(), self.device_config.device
        shape = attention.shape._replace(
            query_heads=attention.shape.query_heads // ranks, kv_heads=max(1, attention.shape.kv_heads // ranks)
        )
        kinds = memory_kinds(self.memory.config.memory, len(self.attachment.layers))
        memory = build_memory(kinds[index], shape).to(device, self.model_config.dtype)
        module.add_module(MODULE, memory.requires_grad_(False).eval())
        rotation, rotary = None, find_rotary(self.model)
        if attention.rotation is not None and rotary is not None:
            types = getattr(self.text_config, "layer_types", None)
            rotation = Rotation(
                attention.module, rotary, types[index] if types else None, self.attachment.trained_context
            )
        return dataclasses.replace(
            attention,
            module=module,
            shape=shape,
            found_dtype=self.model_config.dtype,
            found_device=device,
            built=memory,
            rotation=rotation,
        )

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Loads the base model's weights as the backend does, and the memory's; then the kernels look at the layers."""
        loaded: set[str] = super().load_weights((name, tensor) for name, tensor in weights if ".ahn." not in name)
        tensors, rank = self.memory.content.tensors(), get_tensor_model_parallel_rank()
        for served in self.runtime.layers.values():
            for name, parameter in served.memory.state_dict(keep_vars=True).items():
                parameter.data.copy_(own_heads(tensors[f"layers.{served.layer.index}.{name}"], parameter.size(0), rank))
        fast = leave_to_kernels(self.model, self.runtime, self.holder.find, ServedReader())
        keep_weights(fast, getattr(self, "lm_head", None))
        ours = (f".{MODULE}.", f".{SCORE_WEIGHTS}.")
        return loaded | {name for name, _ in self.named_parameters() if any(mark in name for mark in ours)}


class AHNForCausalLM(MemoryMixin, CausalMixin, HasInnerState, IsAttentionFree):  # type: ignore[misc]
    """A base model with a memory, served by vLLM."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)


class AHNMoEForCausalLM(MemoryMixin, MoEMixin, CausalMixin, HasInnerState, IsAttentionFree):  # type: ignore[misc]
    """The same for a base model with experts."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
