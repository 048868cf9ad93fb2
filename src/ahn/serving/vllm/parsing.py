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
FIELD = "ahn"
"""Name of the overrides in a config: a mapping with the settings of a run, `adapter` and `anchor_weights`."""


def with_memory(values: Mapping[str, Any], overrides: Any, name: str) -> PreTrainedConfig | None:
    """The base model's config of a model with a memory, or `None` for a model without one.

    Args:
        values: What its config.json holds.
        overrides: The `hf_overrides` that vLLM was given.
        name: Name or folder of the model.

    Raises:
        ConfigError: The overrides are not a mapping.
    """
    own = overrides.get(FIELD) if isinstance(overrides, Mapping) else None
    if not is_published(values) and own is None:
        return None
    if own is not None and not isinstance(own, Mapping):
        raise ConfigError(
            f'hf_overrides names "{FIELD}" as {own!r}; give settings, as {{"{FIELD}": {{"window": 256}}}}'
        )
    kind = str(values.get("model_type"))
    if kind not in CONFIG_MAPPING:
        raise ConfigError(f"transformers has no model {kind!r}; serve {name} by `ahn serve`, or update transformers")
    base = clean_config(values) if is_published(values) else dict(values)
    config: PreTrainedConfig = CONFIG_MAPPING[kind].from_dict({**base, "name_or_path": name})
    setattr(config, FIELD, dict(own or {}))
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
