"""The recurrences and their gradients by the kernels in C: float32 on a CPU. See `ahn.native`.

Shapes: B batch, T tokens, H query heads, G kv heads (H = r * G; query head h uses kv head h // r), K key size,
V value size.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ahn import native
from ahn.native import recurrence
from ahn.ops._shared import first_state


def available(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, *others: Tensor | None) -> bool:
    """Tell whether the kernels can work on these tensors; the others are gates and the state, if there is one."""
    there = [x for x in others if x is not None]
    return native.ready(q_BTHK, k_BTGK, v_BTGV, *there, sizes=(v_BTGV.shape[-1],))


def gated_delta_rule(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, g_BTH: Tensor, beta_BTH: Tensor, state_BHKV: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gated delta rule in C; see `ahn.ops.gated_delta_rule` for the arguments."""
    return _delta(q_BTHK, k_BTGK, v_BTGV, g_BTH, beta_BTH, state_BHKV)


def delta_rule(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, beta_BTH: Tensor, state_BHKV: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Delta rule in C; see `ahn.ops.delta_rule` for the arguments."""
    return _delta(q_BTHK, k_BTGK, v_BTGV, None, beta_BTH, state_BHKV)


def state_space(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, g_BTH: Tensor, dt_BTH: Tensor, state_BHVK: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """State space recurrence in C; see `ahn.ops.state_space` for the arguments."""
    S_BHVK = first_state(state_BHVK, q_BTHK, v_BTGV.shape[3], q_BTHK.shape[3])
    return recurrence.scan_state_space(q_BTHK, k_BTGK, v_BTGV, g_BTH, dt_BTH, S_BHVK)


def backward(
    rule: str, inputs: Sequence[Tensor], state: Tensor, to_out_BTHV: Tensor, to_state: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of a recurrence in C.

    Args:
        rule: Name of its function here.
        inputs: Its arguments but the state.
        state: State before the first token.
        to_out_BTHV: Gradient of the outputs, `[B, T, H, V]`.
        to_state: Gradient of the state after the last token.

    Returns:
        Gradients of the inputs and of the state.
    """
    q_BTHK, k_BTGK, v_BTGV, *log_decay, write_BTH = inputs
    g_BTH, is_delta = log_decay[0] if log_decay else None, rule != "state_space"
    slopes = recurrence.scan_back(
        q_BTHK, k_BTGK, v_BTGV, g_BTH, write_BTH, state, to_out_BTHV, to_state, is_delta=is_delta
    )
    return tuple(slope for slope in slopes if slope is not None)


def _delta(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, g_BTH: Tensor | None, beta_BTH: Tensor, state_BHKV: Tensor | None
) -> tuple[Tensor, Tensor]:
    S_BHKV = first_state(state_BHKV, q_BTHK, q_BTHK.shape[3], v_BTGV.shape[3])
    return recurrence.scan(q_BTHK, k_BTGK, v_BTGV, g_BTH, beta_BTH, S_BHKV)
