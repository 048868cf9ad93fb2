"""The recurrences as loops over tokens: the ground truth that every other backend is compared with.

Slow, differentiable, and as close to the formulas as code gets.

Shapes: B batch, T tokens, H query heads, G kv heads (H = r * G; query head h uses kv head h // r), K key size,
V value size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ahn.ops._shared import first_state, in_compute_dtype


def gated_delta_rule(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, g_BTH: Tensor, beta_BTH: Tensor, state_BHKV: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gated delta rule, token by token; see `ahn.ops.gated_delta_rule` for the arguments.

    Source: Gated DeltaNet (arXiv 2412.06464), equation 10.
    """
    q_BTHK, k_BTGK, v_BTGV, g_BTH, beta_BTH = in_compute_dtype(q_BTHK, k_BTGK, v_BTGV, g_BTH, beta_BTH)
    k_BTHK, v_BTHV = _repeat_heads(k_BTGK, v_BTGV, q_BTHK.shape[2])
    S_BHKV = first_state(state_BHKV, q_BTHK, q_BTHK.shape[3], v_BTGV.shape[3])
    outputs = []
    for t in range(q_BTHK.shape[1]):
        k_BHK, v_BHV, q_BHK = k_BTHK[:, t], v_BTHV[:, t], q_BTHK[:, t]
        S_BHKV = S_BHKV * g_BTH[:, t, :, None, None].exp()
        recalled_BHV = (S_BHKV * k_BHK[..., None]).sum(-2)
        correction_BHV = beta_BTH[:, t, :, None] * (v_BHV - recalled_BHV)
        S_BHKV = S_BHKV + k_BHK[..., None] * correction_BHV[..., None, :]
        outputs.append((S_BHKV * q_BHK[..., None]).sum(-2))
    return _over_time(outputs, v_BTHV), S_BHKV if outputs else S_BHKV.clone()


def delta_rule(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, beta_BTH: Tensor, state_BHKV: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Delta rule, token by token; see `ahn.ops.delta_rule` for the arguments.

    Source: DeltaNet (arXiv 2406.06484), section 2.2.
    """
    return gated_delta_rule(q_BTHK, k_BTGK, v_BTGV, torch.zeros_like(beta_BTH), beta_BTH, state_BHKV)


def state_space(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, g_BTH: Tensor, dt_BTH: Tensor, state_BHVK: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """State space recurrence, token by token; see `ahn.ops.state_space` for the arguments.

    Source: Mamba2 (arXiv 2405.21060), the scalar-identity recurrence of section 2.
    """
    q_BTHK, k_BTGK, v_BTGV, g_BTH, dt_BTH = in_compute_dtype(q_BTHK, k_BTGK, v_BTGV, g_BTH, dt_BTH)
    k_BTHK, v_BTHV = _repeat_heads(k_BTGK, v_BTGV, q_BTHK.shape[2])
    S_BHVK = first_state(state_BHVK, q_BTHK, v_BTGV.shape[3], q_BTHK.shape[3])
    outputs = []
    for t in range(q_BTHK.shape[1]):
        written_BHV = dt_BTH[:, t, :, None] * v_BTHV[:, t]
        S_BHVK = S_BHVK * g_BTH[:, t, :, None, None].exp()
        S_BHVK = S_BHVK + written_BHV[..., None] * k_BTHK[:, t, :, None]
        outputs.append((S_BHVK * q_BTHK[:, t, :, None]).sum(-1))
    return _over_time(outputs, v_BTHV), S_BHVK if outputs else S_BHVK.clone()


def _repeat_heads(k_BTGK: Tensor, v_BTGV: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Give every query head its own copy of the keys and values of its group."""
    repeats = heads // k_BTGK.shape[2]
    return k_BTGK.repeat_interleave(repeats, dim=2), v_BTGV.repeat_interleave(repeats, dim=2)


def _over_time(outputs: list[Tensor], v_BTHV: Tensor) -> Tensor:
    """Stack the outputs of single tokens; without tokens, an empty tensor of the right shape."""
    return torch.stack(outputs, dim=1) if outputs else torch.zeros_like(v_BTHV)
