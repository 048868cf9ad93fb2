"""How vLLM's config of a model says that it has a memory: a merged folder, or what `hf_overrides` names."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from ahn.checkpoint.published import clean_config, is_published
from ahn.errors import ConfigError

ARCHITECTURE, WITH_EXPERTS = "AHNForCausalLM", "AHNMoEForCausalLM"
"""The model classes, by the names that vLLM finds them under."""
FIELD = "ahn_settings"
"""Name under which a config holds what the overrides say of a memory."""
PREFIX = "ahn_"
"""How the names of such overrides begin. They are plain values: vLLM shows its parsers no others."""


def with_memory(values: Mapping[str, Any], overrides: Any, name: str) -> PreTrainedConfig | None:
    """The base model's config of a model with a memory, or `None` for a model without one.

    Args:
        values: What its config.json holds.
        overrides: The `hf_overrides` that vLLM was given.
        name: Name or folder of the model.

    Raises:
        ConfigError: The overrides name settings of a memory and no memory.
    """
    named = overrides.items() if isinstance(overrides, Mapping) else ()
    own = {key.removeprefix(PREFIX): value for key, value in named if key.startswith(PREFIX)}
    if not is_published(values) and not own:
        return None
    if not is_published(values) and "adapter" not in own:
        raise ConfigError(
            f"hf_overrides names {PREFIX}{min(own)}, but {name} has no memory; name one by {PREFIX}adapter, or serve a "
            "folder that `ahn merge` wrote"
        )
    kind = str(values.get("model_type"))
    if kind not in CONFIG_MAPPING:
        raise ConfigError(f"transformers has no model {kind!r}; serve {name} by `ahn serve`, or update transformers")
    base = clean_config(values) if is_published(values) else dict(values)
    config: PreTrainedConfig = CONFIG_MAPPING[kind].from_dict({**base, "name_or_path": name})
    setattr(config, FIELD, own)
    config.architectures = [WITH_EXPERTS if _has_experts(config) else ARCHITECTURE]
    return config


def _has_experts(config: PreTrainedConfig) -> bool:
    """Whether a model has experts, by the names that vLLM looks for."""
    names = ("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts")
    return any(getattr(config.get_text_config(), name, None) for name in names)


def register_parser(problem: str | None) -> None:
    """Teaches vLLM to see a memory in a config; configs without one are parsed as before.

    Args:
        problem: Why a memory cannot be served by this vLLM, or `None` if it can.
    """
    from vllm.transformers_utils.config import HFConfigParser, register_config_parser

    class MemoryConfigParser(HFConfigParser):  # type: ignore[misc]
        """vLLM's own parser, and what a memory adds."""

        def parse(self, model: Any, trust_remote_code: bool, revision: str | None = None, **kwargs: Any) -> Any:
            """See vLLM's `ConfigParserBase.parse`."""
            values: dict[str, Any] = {}
            with contextlib.suppress(OSError):  # the parser of vLLM says what is wrong
                values, _ = PreTrainedConfig.get_config_dict(model, revision=revision)
            config = with_memory(values, kwargs.get("hf_overrides"), str(model))
            if config is None:
                return super().parse(model, trust_remote_code, revision=revision, **kwargs)
            if problem is not None:
                raise ConfigError(problem)
            return values, config

    with _without_warnings("vllm"):  # that the parser "hf" is replaced is meant
        register_config_parser("hf")(MemoryConfigParser)


@contextlib.contextmanager
def _without_warnings(name: str) -> Any:
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
