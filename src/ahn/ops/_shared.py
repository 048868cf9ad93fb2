"""What every backend of the recurrences needs: checks of shapes, the compute type, the first state.

Shapes: B batch, T tokens, H query heads, G kv heads (H = r * G; query head h uses kv head h // r), K key size,
V value size.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ahn.errors import ShapeError


def check_shapes(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, gates: Mapping[str, Tensor], state: Tensor | None, value_first: bool
) -> None:
    """Check that the tensors of one call fit together.

    Args:
        q_BTHK: Queries, `[B, T, H, K]`.
        k_BTGK: Keys, `[B, T, G, K]`.
        v_BTGV: Values, `[B, T, G, V]`.
        gates: Gates by name, each `[B, T, H]`.
        state: State before the first token, or None.
        value_first: Whether the state is `[B, H, V, K]` rather than `[B, H, K, V]`.

    Raises:
        ShapeError: Two of them disagree; the message names the tensor, its shape and what was expected.
    """
    for name, x in (("q", q_BTHK), ("k", k_BTGK), ("v", v_BTGV)):
        if x.dim() != 4:
            raise ShapeError(f"{name} must have 4 dimensions [batch, tokens, heads, size], got {list(x.shape)}")
    B, T, H, K = q_BTHK.shape
    G, V = v_BTGV.shape[2:]
    if G == 0 or H % G:
        raise ShapeError(f"q has {H} heads, which is no multiple of the {G} kv heads of v")
    if k_BTGK.shape != (B, T, G, K):
        raise ShapeError(f"k must be {[B, T, G, K]} to fit q and v, got {list(k_BTGK.shape)}")
    if v_BTGV.shape[:2] != (B, T):
        raise ShapeError(f"v must be {[B, T, G, V]} to fit q, got {list(v_BTGV.shape)}")
    for name, gate in gates.items():
        if gate.shape != (B, T, H):
            raise ShapeError(f"{name} must be {[B, T, H]} (one value per token and query head), got {list(gate.shape)}")
    expected = (B, H, V, K) if value_first else (B, H, K, V)
    if state is not None and state.shape != expected:
        layout = "[batch, heads, value, key]" if value_first else "[batch, heads, key, value]"
        raise ShapeError(f"state must be {list(expected)} ({layout}), got {list(state.shape)}")


def compute_dtype(q: Tensor) -> torch.dtype:
    """Return the type of all arithmetic: float64 for float64 queries, float32 for everything else."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def at_least_float32(x: Tensor) -> Tensor:
    """Return `x` in float32, or in float64 if it is that already."""
    return x.to(compute_dtype(x))


def in_compute_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors in the compute type of the first one; those that have it already are returned as they are."""
    dtype = compute_dtype(tensors[0])
    return tuple(x.to(dtype) for x in tensors)


def first_state(state: Tensor | None, like: Tensor, rows: int, columns: int) -> Tensor:
    """Return `state` in the compute type, or zeros `[B, H, rows, columns]`.

    Args:
        state: State before the first token, `[B, H, rows, columns]`, or None for zeros.
        like: Queries `[B, T, H, K]`, already in the compute type.
        rows: Third size of the state.
        columns: Fourth size of the state.

    Returns:
        The state `[B, H, rows, columns]`; it may share memory with the argument, so callers never write to it.
    """
    if state is None:
        return like.new_zeros(like.shape[0], like.shape[2], rows, columns)
    return state.to(like.dtype)


def clamp_log_decay(g: Tensor) -> Tensor:
    """Raise log decays to the largest value whose exp() is exactly 0, in g's own type (float32 or float64).

    No decay changes by it. Running sums gain: -inf cannot become inf - inf, and they stay small enough for their
    differences to keep the mild decays that follow a hard reset.
    """
    return g.clamp(min=-746.0 if g.dtype == torch.float64 else -104.0)
