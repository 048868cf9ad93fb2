"""An attention layer as vLLM sees it: a layer with a state of constant size, and the backend that finds its requests.

Legend of shapes: T tokens of the batch, H query heads, V value size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from vllm.forward_context import ForwardContext, get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.attention.backend import AttentionBackend, AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.kv_cache_interface import MambaSpec

from ahn.serving.vllm.runtime import Rows, Runtime, ServedCall, ServedLayer
from ahn.serving.vllm.step import ServedStep


@dataclasses.dataclass
class RequestMetadata:
    """Whose the tokens of a step are.

    Attributes:
        rows: The tokens of each request.
    """

    rows: list[Rows]


class RequestMetadataBuilder(AttentionMetadataBuilder):  # type: ignore[misc]
    """Finds out whose the tokens of a step are."""

    reorder_batch_threshold = 1

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> RequestMetadata:
        """See vLLM's `AttentionMetadataBuilder.build`."""
        common = common_attn_metadata
        starts = common.query_start_loc_cpu.tolist()
        lengths = common.seq_lens_cpu_upper_bound.tolist()
        blocks = common.block_table_tensor[:, 0].tolist()
        return RequestMetadata(
            [
                Rows(block, length - (stop - start), start, stop)
                for block, length, start, stop in zip(blocks, lengths, starts, starts[1:])
                if stop > start
            ]
        )


class StateBackend(AttentionBackend):  # type: ignore[misc]
    """The backend of layers with a memory; the layer itself computes."""

    @staticmethod
    def get_name() -> str:
        """Its name."""
        return "AHN"

    @staticmethod
    def get_builder_cls() -> type[RequestMetadataBuilder]:
        """What makes its metadata."""
        return RequestMetadataBuilder

    @classmethod
    def is_ssm(cls) -> bool:
        """Whether it holds states rather than keys."""
        return True


class StepHolder:
    """The step that the layers of a process are in.

    Args:
        runtime: What all steps share.
        prefix: Name of one of these layers in vLLM; its metadata is that of all.
    """

    def __init__(self, runtime: Runtime, prefix: str) -> None:
        self.runtime = runtime
        self._prefix = prefix
        self._context: ForwardContext | None = None
        self._step: ServedStep | None = None

    def find(self) -> ServedStep | None:
        """The step of the current forward call, or `None` where vLLM only profiles."""
        context = get_forward_context()
        if context is not self._context:
            metadata = context.attn_metadata
            own = metadata.get(self._prefix) if isinstance(metadata, Mapping) else None
            self._context, self._step = context, None if own is None else ServedStep(self.runtime, own.rows)
        return self._step


class MemoryAttention(nn.Module, MambaBase):  # type: ignore[misc]
    """What stands in an attention module as `.attn`.

    Args:
        served: The layer.
        holder: The step that the layers are in.
        page_bytes: Bytes of the block of the largest layer.
        prefix: Name of the layer in vLLM.
        vllm_config: vLLM's settings.
    """

    def __init__(self, served: ServedLayer, holder: StepHolder, page_bytes: int, prefix: str, vllm_config: Any) -> None:
        super().__init__()
        self.served = served
        self.holder = holder
        self.kv_cache: tuple[torch.Tensor, ...] = ()
        self._page_bytes = page_bytes
        self._inputs: Mapping[str, Any] = {}
        vllm_config.compilation_config.static_forward_context[prefix] = self

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        """The name in vLLM of a kind of state: the one for kinds that it does not know."""
        return MambaAttentionBackendEnum.CUSTOM

    def get_state_shape(self) -> Iterable[tuple[int, ...]]:
        """Shapes of the tensors of a block."""
        return tuple(tensor.shape for tensor in self.served.tensors)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        """Their types."""
        return tuple(tensor.dtype for tensor in self.served.tensors)

    def get_attn_backend(self) -> type[StateBackend]:
        """The backend."""
        return StateBackend

    def get_kv_cache_spec(self, vllm_config: Any) -> MambaSpec:
        """What the scheduler knows of this layer."""
        return dataclasses.replace(super().get_kv_cache_spec(vllm_config), page_size_padded=self._page_bytes)

    def bind_kv_cache(self, kv_cache: torch.Tensor) -> None:
        """Takes over the pages that vLLM has allotted."""
        super().bind_kv_cache(kv_cache)
        self.served.pages = {tensor.name: page for tensor, page in zip(self.served.tensors, self.kv_cache, strict=True)}

    def note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The hook of the attention module: keeps what it is called with."""
        self._inputs = {**({"hidden_states": args[0]} if args else {}), **kwargs}

    def forward(
        self, module: nn.Module, projected: tuple[torch.Tensor, ...], options: Mapping[str, Any]
    ) -> torch.Tensor:
        """Attention of all tokens of the batch, `[1, T, H, V]`; see `ServedStep.attend`."""
        query, _, value = projected
        inputs, self._inputs = self._inputs, {}
        step = self.holder.find()
        if step is None:
            return value.new_zeros(1, query.size(2), query.size(1), value.size(3))
        return step.attend(ServedCall(self.served, module, projected, inputs, options))


def served_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers calls it, of a base that vLLM serves.

    Args:
        module: The attention module.
        query: Queries of the batch, `[1, H, T, K]`.
        key: Its keys, `[1, G, T, K]`.
        value: Its values, `[1, G, T, V]`.
        attention_mask: Nothing: whose the tokens are says vLLM's metadata.
        **options: As for `ahn.attention.function.attention_function`.
    """
    attention: Any = module.attn
    return attention(module, (query, key, value), options), None
