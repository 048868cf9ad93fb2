"""What vLLM is told before it builds a base with a memory, and what is refused there by one clear line each."""

from __future__ import annotations

from typing import Any

from ahn.config import RunSettings
from ahn.errors import ConfigError
from ahn.serving.vllm.layout import empty_cache
from ahn.serving.vllm.memory import give_score_weights, read_memory, survey_base
from ahn.serving.vllm.parsing import ARCHITECTURE, FIELD, WITH_EXPERTS


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
        not hasattr(model.hf_config, "ahn"),
        'hf_overrides names "ahn" as a mapping, which vLLM does not show to plugins',
        'name each setting by itself, as in {"ahn_window": 1024}',
    )
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
    # A step looks at whose tokens it reads, which no graph can. Yet vLLM 0.32 on a CPU gives the stages of a pipeline
    # room for what they hand on only where it compiles (`CPUModelRunner.warming_up_model`).
    model.enforce_eager = vllm_config.parallel_config.pipeline_parallel_size == 1
    cache.mamba_cache_mode = "none"
    cache.mamba_block_size = model.max_model_len
    memory = read_memory(getattr(model.hf_config, FIELD, {}), model.model, model.revision)
    attachment = survey_base(model.hf_config, memory.config)
    norms = all(each.norm_per_head for each in attachment.memories)
    require(
        vllm_config.parallel_config.tensor_parallel_size == 1 or norms,
        f"the memory {memory.config.memory} takes a norm over all heads, which lie in several processes",
        "leave --tensor-parallel-size out, or use --pipeline-parallel-size",
    )
    require(
        vllm_config.parallel_config.pipeline_parallel_size == 1 or len(set(map(type, attachment.memories))) == 1,
        f"the layers of {memory.config.memory} keep states of several sizes, which give wrong tokens in a pipeline",
        "leave --pipeline-parallel-size out, or use --tensor-parallel-size",
    )
    give_score_weights(attachment, memory, model.hf_config)
    scoreboard = empty_cache(attachment, RunSettings.like(memory.config)).scoreboard
    if scoreboard is not None:
        _bound_chunks(vllm_config, scoreboard.longest_call)


def _bound_chunks(vllm_config: Any, longest: int) -> None:
    """Lets no chunk be so long that a token leaves the window before all layers have scored it.

    Raises:
        ConfigError: The layers are in several processes, none of which sees the scores of all.
    """
    parallel, scheduler = vllm_config.parallel_config, vllm_config.scheduler_config
    require(
        parallel.pipeline_parallel_size == 1 and parallel.tensor_parallel_size == 1,
        "anchors are chosen by scores of layers and heads that lie in several processes",
        "serve anchors from one process for each copy of the model, or leave anchors out",
    )
    known = scheduler.long_prefill_token_threshold
    scheduler.long_prefill_token_threshold = min(longest, known) if known else longest
    scheduler.long_prefill_token_threshold_adaptive = False


def register_checks() -> None:
    """Tells vLLM to call `check` for our model."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    class MemoryChecks(VerifyAndUpdateConfig):  # type: ignore[misc]
        """The hook of our model in vLLM's configuration."""

        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            """See vLLM's `VerifyAndUpdateConfig`."""
            check(vllm_config)

    MODELS_CONFIG_MAP.update(dict.fromkeys((ARCHITECTURE, WITH_EXPERTS), MemoryChecks))


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
