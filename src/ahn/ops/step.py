"""A single token: the recurrences, and what decoding computes around them, in as few operations as possible.

Shapes: L layers, B batch, T tokens (1 here), D hidden size, H query heads, G kv heads (H = r * G; query head h uses kv
head h // r), K key size, V value size, X = B * H.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ahn import native
from ahn.native import OutputWeights, linearized
from ahn.native.linearized import LinearizedWeights
from ahn.ops._shared import first_state, in_compute_dtype


def gated_delta_rule(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, g_BTH: Tensor, beta_BTH: Tensor, state_BHKV: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gated delta rule for one token; see `ahn.ops.gated_delta_rule` for the arguments."""
    q_BTHK, g_BTH = in_compute_dtype(q_BTHK, g_BTH)
    S_BHKV = first_state(state_BHKV, q_BTHK, q_BTHK.shape[3], v_BTGV.shape[3])
    return _delta(q_BTHK, k_BTGK, v_BTGV, beta_BTH, S_BHKV * g_BTH.reshape(*S_BHKV.shape[:2], 1, 1).exp())


def delta_rule(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, beta_BTH: Tensor, state_BHKV: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Delta rule for one token; see `ahn.ops.delta_rule` for the arguments."""
    (q_BTHK,) = in_compute_dtype(q_BTHK)
    return _delta(q_BTHK, k_BTGK, v_BTGV, beta_BTH, first_state(state_BHKV, q_BTHK, q_BTHK.shape[3], v_BTGV.shape[3]))


def state_space(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, g_BTH: Tensor, dt_BTH: Tensor, state_BHVK: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """State space recurrence for one token; see `ahn.ops.state_space` for the arguments."""
    q_BTHK, k_BTGK, v_BTGV, g_BTH, dt_BTH = in_compute_dtype(q_BTHK, k_BTGK, v_BTGV, g_BTH, dt_BTH)
    B, _, H, K = q_BTHK.shape
    V = v_BTGV.shape[3]
    S_BHVK = first_state(state_BHVK, q_BTHK, V, K)
    S_XVK = (S_BHVK * g_BTH.reshape(B, H, 1, 1).exp()).reshape(B * H, V, K)
    v_XV1 = _rows(v_BTGV, H).mT * dt_BTH.reshape(B * H, 1, 1)
    S_XVK = torch.baddbmm(S_XVK, v_XV1, _rows(k_BTGK, H))
    o_XV1 = torch.bmm(S_XVK, q_BTHK.reshape(B * H, K, 1))
    return o_XV1.view(B, 1, H, V), S_XVK.view(B, H, V, K)


def state_places(state_LRHKV: Tensor, rows_B: Tensor, sizes: Sequence[int] | None = None) -> Tensor | None:
    """Where the states of some rows begin, for a kernel that writes to them where they lie.

    Args:
        state_LRHKV: States of L layers and R rows, `[L, R, H, K, V]` or `[L, R, H, V, K]`, float32.
        rows_B: The rows, int64.
        sizes: Sizes that must fill whole vectors; `None` for those of a state, K and V.

    Returns:
        Places in numbers from the first state, `[L * B * H]` int64; `None` where no kernel takes these states.
    """
    L, _, H, first, last = state_LRHKV.shape
    to_layer, to_row, to_head, *inner = state_LRHKV.stride()
    if inner != [last, 1] or not native.ready(state_LRHKV, sizes=(first, last) if sizes is None else sizes):
        return None
    layers, heads = torch.arange(L)[:, None, None] * to_layer, torch.arange(H) * to_head
    return (layers + rows_B[:, None] * to_row + heads).flatten()


def write_delta_(
    k_BGK: Tensor,
    v_BGV: Tensor,
    decay_BH: Tensor | None,
    beta_BH: Tensor,
    state_BHKV: Tensor,
    places_X: Tensor | None = None,
    former_BHKV: Tensor | None = None,
) -> None:
    """Write one token into a state of the (gated) delta rule, without reading it.

    Args:
        k_BGK: Keys, `[B, G, K]`.
        v_BGV: Values, `[B, G, V]`.
        decay_BH: Share of the state that stays, `[B, H]`, in [0, 1]; None for all of it.
        beta_BH: Writing strength, `[B, H]`.
        state_BHKV: The state, `[B, H, K, V]`, contiguous.
        places_X: What `state_places` gave for states that lie elsewhere, in a tensor that is `state_BHKV` then.
        former_BHKV: The state before the token, contiguous, which stays as it is; `None` where `state_BHKV` holds it.
    """
    B, H = beta_BH.shape
    k_X1K, v_X1V = _rows(k_BGK.unsqueeze(1), H), _rows(v_BGV.unsqueeze(1), H)
    S_XKV = state_BHKV if places_X is not None else state_BHKV.view(B * H, *state_BHKV.shape[2:])
    gates = [beta_BH] if decay_BH is None else [beta_BH, decay_BH]
    if places_X is not None or _kernels_take(S_XKV, k_X1K, v_X1V, *gates):
        decay_X = None if decay_BH is None else decay_BH.reshape(-1)
        before_XKV = None if former_BHKV is None else former_BHKV.view(S_XKV.shape)
        native.write_delta_(k_X1K[:, 0], v_X1V[:, 0], decay_X, beta_BH.reshape(-1), S_XKV, places_X, before_XKV)
        return
    if former_BHKV is not None:
        state_BHKV.copy_(former_BHKV)
    if decay_BH is not None:
        S_XKV.mul_(decay_BH.reshape(B * H, 1, 1))
    u_X1V = torch.baddbmm(v_X1V, k_X1K, S_XKV, alpha=-1).mul_(beta_BH.reshape(B * H, 1, 1))
    S_XKV.baddbmm_(k_X1K.mT, u_X1V)


def write_state_space_(
    k_BGK: Tensor,
    v_BGV: Tensor,
    decay_BH: Tensor,
    dt_BH: Tensor,
    state_BHVK: Tensor,
    places_X: Tensor | None = None,
    former_BHVK: Tensor | None = None,
) -> None:
    """Write one token into a state of the state space recurrence, without reading it.

    Args:
        k_BGK: Keys, `[B, G, K]`.
        v_BGV: Values, `[B, G, V]`.
        decay_BH: Share of the state that stays, `[B, H]`, in [0, 1].
        dt_BH: Step size, `[B, H]`, at least 0.
        state_BHVK: The state, `[B, H, V, K]`, contiguous.
        places_X: As for `write_delta_`.
        former_BHVK: The same.
    """
    B, H = dt_BH.shape
    k_X1K, v_X1V = _rows(k_BGK.unsqueeze(1), H), _rows(v_BGV.unsqueeze(1), H)
    S_XVK = state_BHVK if places_X is not None else state_BHVK.view(B * H, *state_BHVK.shape[2:])
    if places_X is not None or _kernels_take(S_XVK, k_X1K, v_X1V, decay_BH, dt_BH):
        steps = decay_BH.reshape(-1), dt_BH.reshape(-1)
        before_XVK = None if former_BHVK is None else former_BHVK.view(S_XVK.shape)
        native.write_state_space_(k_X1K[:, 0], v_X1V[:, 0], *steps, S_XVK, places_X, before_XVK)
        return
    if former_BHVK is not None:
        state_BHVK.copy_(former_BHVK)
    S_XVK.mul_(decay_BH.reshape(B * H, 1, 1))
    S_XVK.baddbmm_(v_X1V.mT * dt_BH.reshape(B * H, 1, 1), k_X1K)


def linear_each(x_LBD: Tensor, linears: Sequence[Sequence[nn.Linear]]) -> Sequence[Tensor]:
    """Apply several linear maps of each layer to its hidden state, all at once and without gradients.

    Args:
        x_LBD: Hidden states of L layers, `[L, B, D]`.
        linears: Maps of each layer, alike in all layers, from D numbers to H each.

    Returns:
        What each of a layer's maps gives, `[L, B, H]`.
    """
    if not linears[0]:
        return ()
    weights = [linear.weight for row in linears for linear in row]
    if native.can_multiply(*x_LBD.shape[1:]) and native.ready(x_LBD, *weights):
        outputs = native.linear_each(x_LBD, weights).unbind(1)
    else:
        rows_LRD = torch.stack(weights).view(x_LBD.size(0), -1, x_LBD.size(2))
        outputs = torch.bmm(x_LBD, rows_LRD.mT).chunk(len(linears[0]), dim=-1)
    if linears[0][0].bias is None:
        return outputs
    biases = [torch.stack([linear.bias for linear in column])[:, None] for column in zip(*linears)]
    return [output + bias_L1H for output, bias_L1H in zip(outputs, biases)]


def decode_add_(
    local_B1HV: Tensor,
    q_B1HK: Tensor,
    x_B1D: Tensor,
    state: Tensor,
    weights: OutputWeights | LinearizedWeights,
    rows_B: Tensor | None = None,
    log_sum_B1H: Tensor | None = None,
) -> bool:
    """Add what a memory answers to one query per row, in place, by a kernel in C.

    Its torch form is `ahn.memories.Memory.decode_add`, which also serves whatever the kernel does not take.

    Args:
        local_B1HV: Output of the attention over exact tokens, to which it is added.
        q_B1HK: Queries, as the attention layer has them.
        x_B1D: Input of the attention layer.
        state: `[B, H, K, V]` with `weights.key_first`, else `[B, H, V, K]`; of linearised attention
            `[B, H, V + 1, K + 1]`.
        weights: Output of the memory.
        rows_B: Which row of `state` is whose, int64; `None` where they are those of the batch.
        log_sum_B1H: Logarithm of the sum of exp(score) over the exact tokens, which linearised attention reads.

    Returns:
        Whether the kernel takes these tensors; if not, nothing was changed.
    """
    is_dense = rows_B is None or state[0].is_contiguous()
    if not is_dense or not native.can_decode_add(local_B1HV, q_B1HK, x_B1D, state, weights):
        return False
    if not isinstance(weights, LinearizedWeights):
        native.decode_add_(local_B1HV, q_B1HK, x_B1D, state, weights, rows_B)
        return True
    if log_sum_B1H is None or not native.ready(log_sum_B1H):
        return False
    linearized.decode_add_(local_B1HV, q_B1HK, x_B1D, state, log_sum_B1H, weights, rows_B)
    return True


def _delta(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, beta_BTH: Tensor, S_BHKV: Tensor) -> tuple[Tensor, Tensor]:
    """Correct what the (already decayed) state recalls for the key, then read it."""
    q_BTHK, k_BTGK, v_BTGV, beta_BTH = in_compute_dtype(q_BTHK, k_BTGK, v_BTGV, beta_BTH)
    B, H, K, V = S_BHKV.shape
    S_XKV = S_BHKV.reshape(B * H, K, V)
    k_X1K, v_X1V = _rows(k_BTGK, H), _rows(v_BTGV, H)
    u_X1V = torch.baddbmm(v_X1V, k_X1K, S_XKV, alpha=-1) * beta_BTH.reshape(B * H, 1, 1)
    S_XKV = torch.baddbmm(S_XKV, k_X1K.mT, u_X1V)
    return torch.bmm(q_BTHK.reshape(B * H, 1, K), S_XKV).view(B, 1, H, V), S_XKV.view(B, H, K, V)


def _kernels_take(states: Tensor, *others: Tensor) -> bool:
    """Whether the kernels can write tokens into states that lie side by side, whose last axis they go along."""
    return states.is_contiguous() and native.ready(states, *others, sizes=(states.size(-1),))


def _rows(x_BTGD: Tensor, heads: int) -> Tensor:
    """Bring the keys or values of the one token into `[X, 1, D]`, repeated for the query heads of a group."""
    B, _, G, D = x_BTGD.shape
    if heads != G:
        x_BTGD = x_BTGD.reshape(B, G, 1, D).expand(B, G, heads // G, D)
    return x_BTGD.reshape(B * heads, 1, D)
