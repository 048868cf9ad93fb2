"""The names of vLLM that `ahn.serving.vllm` imports, with as little behind them as its tests need."""

from __future__ import annotations

import dataclasses
import math
import sys
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from transformers import AutoConfig


@dataclasses.dataclass(frozen=True)
class MambaSpec:
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    block_size: int
    mamba_type: str
    page_size_padded: int | None = None


class MambaBase:
    """As vLLM's: cuts a page of bytes into the tensors of a state."""

    kv_cache: tuple[torch.Tensor, ...]

    def bind_kv_cache(self: Any, kv_cache: torch.Tensor) -> None:
        pages, offset, states = kv_cache.squeeze(dim=(1, 2)), 0, []
        for shape, dtype in zip(self.get_state_shape(), self.get_state_dtype(), strict=True):
            size = math.prod(shape) * dtype.itemsize
            states.append(pages[:, offset : offset + size].view(dtype).view(-1, *shape))
            offset += size
        self.kv_cache = tuple(states)

    def get_kv_cache_spec(self: Any, vllm_config: Any) -> MambaSpec:
        shapes, dtypes = tuple(self.get_state_shape()), self.get_state_dtype()
        return MambaSpec(shapes, dtypes, vllm_config.cache_config.mamba_block_size, self.mamba_type)


class HFConfigParser:
    """As vLLM's: what transformers says."""

    def parse(self, model: Any, trust_remote_code: bool, revision: str | None = None, **kwargs: Any) -> Any:
        config = AutoConfig.from_pretrained(model)
        return config.to_dict(), config


class Stub:
    """A stand-in for vLLM in `sys.modules`.

    Attributes:
        parsers: Config parsers that were registered, by format.
        models: Models that were registered, by architecture.
        checks: Hooks of configs, by architecture.
        context: The forward context.
    """

    def __init__(self, version: str) -> None:
        self.parsers: dict[str, Any] = {}
        self.models: dict[str, str] = {}
        self.checks: dict[str, Any] = {}
        self.context = SimpleNamespace(attn_metadata=None)
        self.version = version

    def names(self) -> dict[str, dict[str, Any]]:
        """The names of each module."""

        def register_config_parser(name: str) -> Any:
            return lambda parser: self.parsers.setdefault(name, parser)

        return {
            "vllm": {"__version__": self.version, "ModelRegistry": SimpleNamespace(register_model=self.register)},
            "vllm.transformers_utils.config": {
                "HFConfigParser": HFConfigParser,
                "register_config_parser": register_config_parser,
            },
            "vllm.model_executor.models.config": {
                "MODELS_CONFIG_MAP": self.checks,
                "VerifyAndUpdateConfig": type("VerifyAndUpdateConfig", (), {}),
            },
            "vllm.forward_context": {"get_forward_context": lambda: self.context, "ForwardContext": SimpleNamespace},
            "vllm.model_executor.layers.mamba.abstract": {"MambaBase": MambaBase},
            "vllm.v1.attention.backend": {
                "AttentionBackend": type("AttentionBackend", (), {}),
                "AttentionMetadataBuilder": type("AttentionMetadataBuilder", (), {}),
                "CommonAttentionMetadata": SimpleNamespace,
            },
            "vllm.v1.attention.backends.registry": {"MambaAttentionBackendEnum": SimpleNamespace(CUSTOM="custom")},
            "vllm.v1.kv_cache_interface": {"MambaSpec": MambaSpec},
        }

    def register(self, architecture: str, path: str) -> None:
        self.models[architecture] = path

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Puts it in place of vLLM until the test ends."""
        for name, values in self.names().items():
            parts = name.split(".")
            for count in range(1, len(parts) + 1):
                part = ".".join(parts[:count])
                if not isinstance(sys.modules.get(part), _Fake):
                    monkeypatch.setitem(sys.modules, part, _Fake(part))
            vars(sys.modules[name]).update(values)
        monkeypatch.delitem(sys.modules, "ahn.serving.vllm.layer", raising=False)


class _Fake(ModuleType):
    """A module of the stand-in."""

    __path__: ClassVar[list[str]] = []
