"""What vLLM is told before it builds a base with a memory, and what is refused there by one clear line each."""

from __future__ import annotations

from typing import Any

from ahn.errors import ConfigError
from ahn.serving.vllm.memory import read_memory
from ahn.serving.vllm.parsing import ARCHITECTURE, FIELD


def check(vllm_config: Any) -> None:
    """Checks vLLM's settings for a base with a memory, and completes them.

    Args:
        vllm_config: vLLM's settings; the size of a block and, with anchors, the longest chunk are set.

    Raises:
        ConfigError: They ask for something that a memory cannot do.
        CheckpointError: The memory is missing or damaged.
    """
    model, cache = vllm_config.model_config, vllm_config.cache_config
    require(
        not cache.enable_prefix_caching,
        "prefix caching needs states at the ends of blocks, and a block here holds a whole request",
        "leave --enable-prefix-caching out",
    )
    require(
        vllm_config.speculative_config is None,
        "speculative decoding takes tokens back, which a memory cannot do",
        "leave --speculative-config out",
    )
    model.enforce_eager = True  # a step looks at whose tokens it reads, which no graph can
    cache.mamba_cache_mode = "none"
    cache.mamba_block_size = model.max_model_len
    read_memory(getattr(model.hf_config, FIELD, {}), model.model, model.revision)


def register_checks() -> None:
    """Tells vLLM to call `check` for our model."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    class MemoryChecks(VerifyAndUpdateConfig):  # type: ignore[misc]
        """The hook of our model in vLLM's configuration."""

        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            """See vLLM's `VerifyAndUpdateConfig`."""
            check(vllm_config)

    MODELS_CONFIG_MAP[ARCHITECTURE] = MemoryChecks


def require(condition: bool, problem: str, remedy: str) -> None:
    """Refuses what cannot be served.

    Args:
        condition: What must hold.
        problem: What is wrong where it does not.
        remedy: What to do then.

    Raises:
        ConfigError: It does not hold.
    """
    if not condition:
        raise ConfigError(f"{problem}; {remedy}")
