"""A single token of linearised attention, by kernels in C. Their torch form is that of the memory.

Shapes: L layers, B batch, D hidden size, H query heads, G kv heads, K key size, V value size.
"""

from __future__ import annotations

from torch import Tensor

from ahn import native
from ahn.native import linearized
from ahn.native.linearized import LinearizedWeights
from ahn.ops.step import state_places


def write_linearized_(
    k_LBGK: Tensor,
    v_LBGV: Tensor,
    gate_LBH: Tensor,
    mean_query_LHK: Tensor,
    state_LB: Tensor,
    rows_B: Tensor | None = None,
    former_LB: Tensor | None = None,
) -> bool:
    """Write one token into states of linearised attention, `S <- S + gate exp(u . k / sqrt(K)) [v; 1] [k; 1]^T`.

    Args:
        k_LBGK: Keys, `[L, B, G, K]`.
        v_LBGV: Values, `[L, B, G, V]`.
        gate_LBH: Write strengths before the exponential, `[L, B, H]`.
        mean_query_LHK: Mean queries u, `[L, H, K]`.
        state_LB: The states, `[L, B, H, V + 1, K + 1]`; with `rows_B` those of any rows.
        rows_B: Which of these rows is whose, int64; `None` where they are those of the batch.
        former_LB: The states before the token, which stay as they are; `None` where `state_LB` holds them.

    Returns:
        Whether the kernel takes these tensors; if not, nothing was changed.
    """
    sizes = k_LBGK.size(-1), v_LBGV.size(-1)
    if not native.ready(k_LBGK, v_LBGV, gate_LBH, mean_query_LHK, state_LB, sizes=sizes):
        return False
    if rows_B is not None:
        places_X = state_places(state_LB, rows_B, sizes)
        if places_X is None:
            return False
        linearized.write_(k_LBGK, v_LBGV, gate_LBH, mean_query_LHK, state_LB, places_X)
        return True
    if not state_LB.is_contiguous() or (former_LB is not None and not former_LB.is_contiguous()):
        return False
    linearized.write_(k_LBGK, v_LBGV, gate_LBH, mean_query_LHK, state_LB, None, former_LB)
    return True


def decode_add_linearized_(
    local_B1HV: Tensor,
    q_B1HK: Tensor,
    x_B1D: Tensor,
    state: Tensor,
    weights: LinearizedWeights,
    rows_B: Tensor | None = None,
) -> bool:
    """Add what linearised attention answers to one query per row, in place.

    Args:
        local_B1HV: Output of the attention over exact tokens, to which it is added.
        q_B1HK: Queries, as the attention layer has them.
        x_B1D: Input of the attention layer.
        state: `[B, H, V + 1, K + 1]`.
        weights: What the answer is computed from.
        rows_B: Which row of `state` is whose, int64; `None` where they are those of the batch.

    Returns:
        Whether the kernel takes these tensors; if not, nothing was changed.
    """
    is_dense = rows_B is None or state[0].is_contiguous()
    if not is_dense or not linearized.can_decode_add(local_B1HV, q_B1HK, x_B1D, state, weights):
        return False
    linearized.decode_add_(local_B1HV, q_B1HK, x_B1D, state, weights, rows_B)
    return True
