"""A decoded token of linearised attention: written into the states of several layers, and answered from one of them.

Legend of shapes: L layers, B batch, H query heads, G key/value heads, K key size, V value size, D hidden size.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ahn import native
from ahn.native.checks import check_groups, check_shapes


def write_(
    k_LBGK: Tensor,
    v_LBGV: Tensor,
    gate_LBH: Tensor,
    mean_query_LHK: Tensor,
    state_LB: Tensor,
    places_X: Tensor | None = None,
    former_LB: Tensor | None = None,
) -> None:
    """Writes one token into states of linearised attention; see `ahn.ops.write_linearized_`.

    Args:
        k_LBGK: Keys.
        v_LBGV: Values.
        gate_LBH: Write strengths before the tilt.
        mean_query_LHK: Mean queries.
        state_LB: The states, `[L, B, H, V + 1, K + 1]`, dense; with `places_X` of any rows, and each of them dense.
        places_X: Where each state begins, in numbers from the first of `state_LB`, `[L * B * H]` int64.
        former_LB: The states before the token, of the shape of `state_LB`, dense; `None` where `state_LB` holds them.
    """
    L, B, G, K = k_LBGK.shape
    H, V = gate_LBH.size(-1), v_LBGV.size(-1)
    check_groups(H, G)
    check_shapes((v_LBGV, (L, B, G, V)), (gate_LBH, (L, B, H)), (mean_query_LHK, (L, H, K)))
    if places_X is None:
        check_shapes((state_LB, (L, B, H, V + 1, K + 1)), (former_LB, (L, B, H, V + 1, K + 1)))
    else:
        check_shapes((places_X, (L * B * H,)), (state_LB, (*state_LB.shape[:-2], V + 1, K + 1)))
    k, v, gate, mean_query = (x.contiguous() for x in (k_LBGK, v_LBGV, gate_LBH, mean_query_LHK))
    native._run("ahn_write_linearized", L, B, H, G, K, V, k, v, gate, mean_query, places_X, former_LB, state_LB)


class LinearizedWeights(NamedTuple):
    """What an answer of linearised attention is computed from, dense; see `ahn.memories.linearized_attention`.

    Attributes:
        mean_query_HK: Mean query of each head, `[H, K]`.
        share_key_HK: A key that raises the share where a query matches it, `[H, K]`.
        gate_HD: Weight of the share of the evicted tokens, `[H, D]`.
        gate_bias_H: Its bias, `[H]`, or `None`.
        size_weight_H: Weight of the logarithm of the sum of weights, `[H]`.
        match_weight_H: Weight of the mean score, `[H]`.
        exact_weight_H: Weight of the log-sum of the exact tokens' scores, `[H]`, which is subtracted.
        o_proj_HVV: Output projection, `[H, V, V]`.
    """

    mean_query_HK: Tensor
    share_key_HK: Tensor
    gate_HD: Tensor
    gate_bias_H: Tensor | None
    size_weight_H: Tensor
    match_weight_H: Tensor
    exact_weight_H: Tensor
    o_proj_HVV: Tensor


def decode_add_(
    local_B1HV: Tensor,
    q_B1HK: Tensor,
    x_B1D: Tensor,
    state: Tensor,
    log_sum_B1H: Tensor,
    weights: LinearizedWeights,
    rows_B: Tensor | None = None,
) -> None:
    """Adds what the memory answers to one query per row, in place; see `ahn.ops.decode_add_`.

    Args:
        local_B1HV: Output of the attention over exact tokens, dense.
        q_B1HK: Queries.
        x_B1D: Input of the attention layer.
        state: `[B, H, V + 1, K + 1]`.
        log_sum_B1H: Logarithm of the sum of exp(score) over the exact tokens.
        weights: What the answer is computed from.
        rows_B: Which row of `state` is whose, int64; `None` where they are those of the batch.
    """
    B, _, H, K = q_B1HK.shape
    V, D = local_B1HV.size(3), x_B1D.size(2)
    rows = B if rows_B is None else state.size(0)
    check_shapes((local_B1HV, (B, 1, H, V)), (x_B1D, (B, 1, D)), (state, (rows, H, V + 1, K + 1)), (rows_B, (B,)))
    shapes = (H, K), (H, K), (H, D), (H,), (H,), (H,), (H,), (H, V, V)
    check_shapes(*zip(weights, shapes, strict=True))
    check_shapes((log_sum_B1H, (B, 1, H)))
    q, x, log_sum = q_B1HK.contiguous(), x_B1D.contiguous(), log_sum_B1H.contiguous()
    state = state.contiguous() if rows_B is None else state
    places_B = None if rows_B is None else rows_B * state.stride(0)
    native._run("ahn_decode_add_linearized", B, H, K, V, D, q, x, state, places_B, *weights, log_sum, local_B1HV)
