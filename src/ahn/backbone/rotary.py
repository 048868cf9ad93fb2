"""Rotary positions from the outside: undo and redo a model's own rotation, whatever its layout or scaling.

No rotation is written here. Each family's own function is called with the tables that the model computed, and with
their sine negated to go back. `surgery` verifies on the model that this recovers the unrotated tensors.
Legend of shapes: B batch, T tokens, H heads (of queries or keys), K head size, R rotated size of the tables.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

Tables = tuple[torch.Tensor, torch.Tensor]
"""Cosine and sine as the model passes them on, `[B or 1, T, R]` each, scaled as the rope type asks."""


class Rotation:
    """The rotation of one attention layer.

    Args:
        module: The attention module; its family's `apply_rotary_pos_emb` is looked up beside its class.
        rotary: The model's module that turns positions into tables.
        layer_type: Passed on to a rotary module that has tables per layer type.
        trained_context: Positions that the base model was trained on.

    Raises:
        LookupError: The family has no such function, or one with arguments of its own.
    """

    def __init__(self, module: nn.Module, rotary: nn.Module, layer_type: str | None, trained_context: int) -> None:
        family = sys.modules[type(module).__module__]
        rotate = getattr(family, "apply_rotary_pos_emb", None)
        if rotate is None:
            raise LookupError(f"{family.__name__} has no apply_rotary_pos_emb")
        if list(inspect.signature(rotate).parameters)[2:4] != ["cos", "sin"]:  # gptj and codegen rotate one at a time
            raise LookupError(f"apply_rotary_pos_emb of {family.__name__} does not take queries, keys, cos and sin")
        self._rotate: Callable[..., tuple[torch.Tensor, torch.Tensor]] = rotate
        self._rotary = rotary
        takes_type = "layer_type" in inspect.signature(_innermost_forward(rotary)).parameters
        self._layer = {"layer_type": layer_type} if takes_type else {}
        self.trained_context = trained_context
        self.changes_with_length = _changes_with_length(rotary, layer_type)

    def tables(self, positions: torch.Tensor) -> Tables:
        """Tables of any positions, `[B, T]`, float32, with the frequencies that the model uses now."""
        like = torch.zeros((), device=positions.device, dtype=torch.float32)
        with torch.no_grad():
            cos, sin = _innermost_forward(self._rotary)(self._rotary, like, positions, **self._layer)
        return cos, sin

    def apply(self, x_BHTK: torch.Tensor, tables: Tables) -> torch.Tensor:
        """`x` rotated, `[B, H, T, K]` in its own dtype."""
        cos, sin = tables
        rotated, _ = self._rotate(x_BHTK.float(), x_BHTK[:, :1].float(), cos.float(), sin.float())
        return rotated.to(x_BHTK.dtype)

    def unrotate(self, x_BHTK: torch.Tensor, tables: Tables) -> torch.Tensor:
        """`x` as it was before the rotation with these tables, scaling undone too; `[B, H, T, K]`."""
        cos, sin = (table.float() for table in tables)
        squared_scale = cos.square() + sin.square()
        return self.apply(x_BHTK, (cos / squared_scale, -sin / squared_scale))

    def clamped(self, tables: Tables, positions: torch.Tensor) -> Tables:
        """Tables that turn queries as if they came from no further than the last trained position.

        Args:
            tables: Tables of their positions.
            positions: Their positions, `[B or 1, T]`.
        """
        cos, sin = (table.float() for table in tables)
        near_cos, near_sin = self.tables(positions.clamp(max=self.trained_context - 1))
        squared_scale = cos.square() + sin.square()
        return (near_cos * cos + near_sin * sin) / squared_scale, (near_sin * cos - near_cos * sin) / squared_scale

    def position_record(self, tables: Tables, positions: torch.Tensor, batch: int) -> torch.Tensor:
        """What must be kept of each token to undo its rotation later, `[B, T, 1]` or `[B, T, 2R]` float32.

        The position itself, or the tables where their frequencies change with the length of the text.
        """
        record = torch.cat(tables, dim=-1) if self.changes_with_length else positions[..., None]
        return record.float().expand(batch, -1, -1)

    def unrotate_recorded(self, k_BHTK: torch.Tensor, record_BTR: torch.Tensor) -> torch.Tensor:
        """Keys as they were before their rotation, from what `record` kept."""
        if self.changes_with_length:
            cos, sin = record_BTR.chunk(2, dim=-1)
            return self.unrotate(k_BHTK, (cos, sin))
        return self.unrotate(k_BHTK, self.tables(record_BTR.squeeze(-1)))


class Rotary(NamedTuple):
    """The rotation of the new tokens of a call.

    Attributes:
        rotation: How to undo and redo it.
        tables: The model's tables for the new tokens.
        positions: Their positions, `[B or 1, T]`.
        unrotates: Whether the memory takes queries and keys as they were before their rotation.
    """

    rotation: Rotation
    tables: Tables
    positions: torch.Tensor
    unrotates: bool


def find_rotary(backbone: nn.Module) -> nn.Module | None:
    """The module of a model that turns positions into tables, or `None` for a model without rotary positions."""
    return next((m for name, m in backbone.named_modules() if name.rpartition(".")[2] == "rotary_emb"), None)


def _innermost_forward(rotary: nn.Module) -> Callable[..., Tables]:
    """How a rotary module computes its tables: the decorators of `forward` may change frequencies as a side effect."""
    compute: Callable[..., Tables] = inspect.unwrap(type(rotary).forward)
    return compute


def _changes_with_length(rotary: nn.Module, layer_type: str | None) -> bool:
    kind = getattr(rotary, "rope_type", "default")
    if isinstance(kind, dict):
        kind = kind.get(layer_type, "default")
    return "dynamic" in kind or kind == "longrope"
