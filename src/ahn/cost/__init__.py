"""The cost model: parameters, FLOPs and cache bytes of a model with a memory, from its config alone."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal, get_args

from ahn.config import AHNConfig
from ahn.cost.actual import Actual
from ahn.cost.base import SHAPES, Base, read_base
from ahn.cost.counting import Cost, Counting
from ahn.cost.paper import Paper
from ahn.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

__all__ = ["SHAPES", "Base", "Convention", "Cost", "Counting", "cost_model", "read_base"]

Convention = Literal["actual", "paper"]
_COUNTINGS: dict[str, type[Counting]] = {"actual": Actual, "paper": Paper}


def cost_model(
    base: str | os.PathLike[str] | PreTrainedConfig,
    config: AHNConfig | None = None,
    convention: Convention = "actual",
    dtype: str | torch.dtype | None = None,
) -> Counting:
    """What reading with a model costs, by context.

    Args:
        base: A name in `SHAPES`, a name as for `ahn.models.resolve`, or a config of transformers.
        config: As for `read_base`.
        convention: "actual" counts what this library computes and holds, "paper" what arXiv 2510.07318 counts.
        dtype: As for `read_base`; the paper counts 4 bytes a number, whatever this is.

    Returns:
        The cost model: `cost_model(...).at(128_000)["gated_delta_net"].cache_bytes`.

    Raises:
        ModelError: There is no such model, or it cannot be given a memory.
        ConfigError: The settings do not fit this model, or the convention is unknown.
    """
    if convention not in _COUNTINGS:
        raise ConfigError(f"convention must be one of {', '.join(get_args(Convention))}, not {convention!r}")
    return _COUNTINGS[convention](read_base(base, config, dtype))
