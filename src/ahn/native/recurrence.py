"""The recurrences over many tokens, and their gradients.

Legend of shapes: B batch, T tokens, H query heads, G key/value heads, K key size, V value size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ahn import native
from ahn.native.checks import check_groups, check_shapes


def scan(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, log_decay_BTH: Tensor | None, write_BTH: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The (gated) delta rule over tokens; see `ahn.ops.gated_delta_rule`.

    Args:
        q_BTHK: Queries.
        k_BTGK: Keys.
        v_BTGV: Values.
        log_decay_BTH: Log decay per token; `None` where nothing decays.
        write_BTH: Writing strength per token.
        state: State before the first token, `[B, H, K, V]`. It is not changed.

    Returns:
        The outputs, `[B, T, H, V]`, and the state after the last token.
    """
    return _scan(q_BTHK, k_BTGK, v_BTGV, log_decay_BTH, write_BTH, state, is_delta=True)


def scan_state_space(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, log_decay_BTH: Tensor, step_BTH: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The state space recurrence over tokens, state `[B, H, V, K]`; see `ahn.ops.state_space`."""
    return _scan(q_BTHK, k_BTGK, v_BTGV, log_decay_BTH, step_BTH, state, is_delta=False)


def _scan(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, write: Tensor, state: Tensor, *, is_delta: bool
) -> tuple[Tensor, Tensor]:
    B, T, H, K = q.shape
    G, V = v.shape[2:]
    _check(q, k, v, log_decay, write, (state,), is_delta)
    after = state.clone(memory_format=torch.contiguous_format)
    out = q.new_empty(B, T, H, V)
    q, k, v, write = (x.contiguous() for x in (q, k, v, write))
    log_decay = None if log_decay is None else log_decay.contiguous()
    native._run("ahn_scan", B, T, H, G, K, V, q, k, v, log_decay, write, after, out, int(is_delta))
    return out, after


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    write: Tensor,
    states: Sequence[Tensor],
    is_delta: bool,
) -> None:
    """Checks the shapes of what a recurrence is given."""
    B, T, H, K = q.shape
    G, V = v.shape[2:]
    check_groups(H, G)
    check_shapes((k, (B, T, G, K)), (v, (B, T, G, V)), (log_decay, (B, T, H)), (write, (B, T, H)))
    check_shapes(*((state, (B, H, K, V) if is_delta else (B, H, V, K)) for state in states))


def scan_back(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    log_decay_BTH: Tensor | None,
    write_BTH: Tensor,
    state: Tensor,
    to_out_BTHV: Tensor,
    to_state: Tensor,
    *,
    is_delta: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """Gradients of `scan` (`is_delta`) or `scan_state_space`; states are in the layout of that function.

    Args:
        q_BTHK: Queries.
        k_BTGK: Keys.
        v_BTGV: Values.
        log_decay_BTH: Log decay per token; `None` where nothing decays.
        write_BTH: Writing strength per token.
        state: State before the first token.
        to_out_BTHV: Gradient of the outputs.
        to_state: Gradient of the state after the last token.
        is_delta: Which recurrence it is.

    Returns:
        Gradients of the first six arguments, in their order.
    """
    B, T, H, K = q_BTHK.shape
    G, V = v_BTGV.shape[2:]
    tensors = q_BTHK, k_BTGK, v_BTGV, write_BTH, state, to_out_BTHV
    q, k, v, write, state, to_out = (x.contiguous() for x in tensors)
    log_decay = None if log_decay_BTH is None else log_decay_BTH.contiguous()
    _check(q, k, v, log_decay, write, (state, to_state), is_delta)
    check_shapes((to_out, (B, T, H, V)))
    to_first = to_state.clone(memory_format=torch.contiguous_format)
    to_q, to_write = torch.empty_like(q), torch.empty_like(write)
    to_k, to_v = torch.zeros_like(k), torch.zeros_like(v)
    to_decay = None if log_decay is None else torch.empty_like(log_decay)
    slopes = to_first, to_q, to_k, to_v, to_decay, to_write
    native._run("ahn_scan_back", B, T, H, G, K, V, q, k, v, log_decay, write, state, to_out, *slopes, int(is_delta))
    return to_q, to_k, to_v, to_decay, to_write, to_first
