"""A single token of linearised attention, by kernels in C. Their torch form is that of the memory.

Shapes: L layers, B batch, D hidden size, H query heads, G kv heads, K key size, V value size.
"""

from __future__ import annotations

from torch import Tensor

from ahn import native
from ahn.native import linearized
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
