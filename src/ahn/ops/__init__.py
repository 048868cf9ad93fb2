"""The recurrences of the memories as pure functions of tensors.

Every call picks its backend from its tensors. One token takes a short path for decoding. CUDA tensors go to the kernels
of flash-linear-attention, if it is installed. Float32 on a CPU without gradients goes to the kernels in C, if these can
be compiled. Gradients on a CPU go to groups of tokens, of which little is kept. Everything else takes the chunked form
in plain torch.

Shapes: B batch, T tokens, H query heads, G kv heads (H = r * G; query head h uses kv head h // r), K key size,
V value size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Protocol

import torch
from torch import Tensor

from ahn.errors import ConfigError
from ahn.native import OutputWeights
from ahn.native.linearized import LinearizedWeights
from ahn.ops import chunked, compiled, cuda, grouped, naive, step
from ahn.ops._shared import at_least_float32, check_shapes
from ahn.ops.linearized import write_linearized_
from ahn.ops.norms import rms_norm, unit
from ahn.ops.step import decode_add_, linear_each, state_places, write_delta_, write_state_space_

__all__ = [
    "LinearizedWeights",
    "OutputWeights",
    "at_least_float32",
    "backend",
    "decode_add_",
    "delta_rule",
    "gated_delta_rule",
    "is_automatic",
    "linear_each",
    "rms_norm",
    "state_places",
    "state_space",
    "unit",
    "write_delta_",
    "write_linearized_",
    "write_state_space_",
]

_NAMES = ("auto", "naive", "chunked", "grouped", "compiled", "cuda")
_chosen: ContextVar[str] = ContextVar("ahn_ops_backend", default="auto")


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every recurrence of this thread or task with one backend; meant for tests and comparisons.

    Args:
        name: "auto" (pick per call), "naive" (the loop, the ground truth), "chunked", "grouped" (chunked, with a
            backward pass that keeps little), "compiled" (C) or "cuda".

    Raises:
        ConfigError: There is no such backend.

    Example:
        >>> with backend("naive"):
        ...     o, state = gated_delta_rule(q, k, v, g, beta)
    """
    if name not in _NAMES:
        raise ConfigError(f"there is no backend {name!r}; choose one of {', '.join(_NAMES)}")
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def is_automatic() -> bool:
    """Tell whether the backend is picked per call, as it is outside of every `backend` block."""
    return _chosen.get() == "auto"


def gated_delta_rule(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, g_BTH: Tensor, beta_BTH: Tensor, state_BHKV: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Write tokens into a state that decays and corrects itself, and read it at every token.

    Per query head and token: `S <- exp(g) S`, `S <- S + k (beta (v - S^T k))^T`, `o = S^T q`: a token is read after
    it was written. Nothing is normalised or scaled. Where g = 0 and beta = 0 the state stays exactly as it is.
    Differentiable in every argument. Arithmetic is float32 (float64 for float64 queries), under autocast too; only
    CUDA kernels multiply in half precision, and only if q is in half precision.

    Args:
        q_BTHK: Queries, `[B, T, H, K]`.
        k_BTGK: Keys, `[B, T, G, K]`; stable for beta in [0, 1] if their norm is at most 1.
        v_BTGV: Values, `[B, T, G, V]`.
        g_BTH: Log decay per token, `[B, T, H]`, natural log, <= 0; -inf clears the state.
        beta_BTH: Writing strength per token, `[B, T, H]`.
        state_BHKV: State before the first token, `[B, H, K, V]`; None for zeros. It is not changed.

    Returns:
        The outputs `[B, T, H, V]` and the state after the last token `[B, H, K, V]`, both float32 (float64).

    Raises:
        ShapeError: The tensors do not fit together.

    Source: Gated DeltaNet (arXiv 2412.06464), equation 10, as used by AHN (arXiv 2510.07318).
    """
    check_shapes(q_BTHK, k_BTGK, v_BTGV, {"g": g_BTH, "beta": beta_BTH}, state_BHKV, value_first=False)
    with full_precision(q_BTHK):
        return _pick(q_BTHK, k_BTGK, v_BTGV, g_BTH, beta_BTH, state_BHKV).gated_delta_rule(
            q_BTHK, k_BTGK, v_BTGV, g_BTH, beta_BTH, state_BHKV
        )


def delta_rule(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, beta_BTH: Tensor, state_BHKV: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Write tokens into a state that corrects itself but never decays: `gated_delta_rule` with g = 0.

    Args:
        q_BTHK: Queries, `[B, T, H, K]`.
        k_BTGK: Keys, `[B, T, G, K]`; stable for beta in [0, 1] if their norm is at most 1.
        v_BTGV: Values, `[B, T, G, V]`.
        beta_BTH: Writing strength per token, `[B, T, H]`.
        state_BHKV: State before the first token, `[B, H, K, V]`; None for zeros. It is not changed.

    Returns:
        The outputs `[B, T, H, V]` and the state after the last token `[B, H, K, V]`, both float32 (float64).

    Raises:
        ShapeError: The tensors do not fit together.

    Source: DeltaNet (arXiv 2406.06484), section 2.2, as used by AHN (arXiv 2510.07318).
    """
    check_shapes(q_BTHK, k_BTGK, v_BTGV, {"beta": beta_BTH}, state_BHKV, value_first=False)
    with full_precision(q_BTHK):
        return _pick(q_BTHK, k_BTGK, v_BTGV, beta_BTH, state_BHKV).delta_rule(
            q_BTHK, k_BTGK, v_BTGV, beta_BTH, state_BHKV
        )


def state_space(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, g_BTH: Tensor, dt_BTH: Tensor, state_BHVK: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Write tokens into a state that decays, and read it at every token.

    Per query head and token: `S <- exp(g) S + dt v k^T`, `o = S q`: a token is read after it was written. The state is
    [value, key], transposed against the delta rules. Where g = 0 and dt = 0 it stays exactly as it is.

    Args:
        q_BTHK: Queries (C of the paper), `[B, T, H, K]`.
        k_BTGK: Keys (B of the paper), `[B, T, G, K]`.
        v_BTGV: Values (x of the paper), `[B, T, G, V]`.
        g_BTH: Log decay per token (A dt of the paper), `[B, T, H]`, natural log, <= 0; -inf clears the state.
        dt_BTH: Step size per token, `[B, T, H]`, >= 0.
        state_BHVK: State before the first token, `[B, H, V, K]`; None for zeros. It is not changed.

    Returns:
        The outputs `[B, T, H, V]` and the state after the last token `[B, H, V, K]`, both float32 (float64).

    Raises:
        ShapeError: The tensors do not fit together.

    Source: Mamba2 (arXiv 2405.21060), section 2, as used by AHN (arXiv 2510.07318).
    """
    check_shapes(q_BTHK, k_BTGK, v_BTGV, {"g": g_BTH, "dt": dt_BTH}, state_BHVK, value_first=True)
    with full_precision(q_BTHK):
        return _pick(q_BTHK, k_BTGK, v_BTGV, g_BTH, dt_BTH, state_BHVK).state_space(
            q_BTHK, k_BTGK, v_BTGV, g_BTH, dt_BTH, state_BHVK
        )


class _Backend(Protocol):
    """What a module has to offer to be a backend."""

    def gated_delta_rule(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None, /
    ) -> tuple[Tensor, Tensor]: ...

    def delta_rule(
        self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor | None, /
    ) -> tuple[Tensor, Tensor]: ...

    def state_space(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, dt: Tensor, state: Tensor | None, /
    ) -> tuple[Tensor, Tensor]: ...


def _pick(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, *others: Tensor | None) -> _Backend:
    """Choose the backend of one call."""
    name = _chosen.get()
    if name == "naive":
        return naive
    if name in ("chunked", "grouped"):
        return chunked if name == "chunked" else grouped
    if name == "cuda":
        if not q_BTHK.is_cuda:
            raise ConfigError(f"backend 'cuda' needs tensors on a CUDA device, got {q_BTHK.device}; use 'auto'")
        if not cuda.available():
            raise ConfigError("backend 'cuda' needs flash-linear-attention: pip install 'ahn[cuda]', or use 'auto'")
        return cuda
    if name == "compiled":
        if not compiled.available(q_BTHK, k_BTGK, v_BTGV, *others):
            raise ConfigError(
                "backend 'compiled' needs float32 on a CPU without gradients, values of a multiple of 16 numbers and a "
                "C compiler; use 'auto'"
            )
        return compiled
    if q_BTHK.shape[1] == 1:
        return step
    if q_BTHK.is_cuda:
        return cuda if cuda.available() else chunked
    if grouped.serves(q_BTHK, k_BTGK, v_BTGV, *others):
        return grouped
    return compiled if compiled.available(q_BTHK, k_BTGK, v_BTGV, *others) else chunked


def full_precision(q_BTHK: Tensor) -> AbstractContextManager[object]:
    """Switch autocast off where it is on: it would turn products, and with them a state, into half precision.

    Args:
        q_BTHK: A tensor of the device.
    """
    return torch.autocast(q_BTHK.device.type, enabled=False) if in_autocast(q_BTHK) else nullcontext()


def in_autocast(tensor: Tensor) -> bool:
    """Whether autocast is on where a tensor is."""
    device = tensor.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
