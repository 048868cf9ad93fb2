"""The recurrences in chunks of tokens: matrix products instead of a loop, plain torch, on any device.

Inside a chunk every pair of tokens meets in a small triangular matrix; only the state walks from chunk to chunk.
Tokens are taken in groups of chunks, so small that what is computed for a group stays in the CPU's cache: fresh
memory costs more there than the arithmetic does.

Shapes: B batch, T tokens, H query heads, G kv heads (H = r * G; query head h uses kv head h // r), K key size,
V value size. Inside a group: N chunks, C tokens of a chunk, X = B * H.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ahn.ops._chunks import by_chunk, decay_factors, token_groups
from ahn.ops._shared import first_state, in_compute_dtype


def gated_delta_rule(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, g_BTH: Tensor, beta_BTH: Tensor, state_BHKV: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gated delta rule in chunks; see `ahn.ops.gated_delta_rule` for the arguments.

    Source: the WY form of DeltaNet (arXiv 2406.06484), with decay as in Gated DeltaNet (arXiv 2412.06464).
    """
    q_BTHK, k_BTGK, v_BTGV, g_BTH, beta_BTH = in_compute_dtype(q_BTHK, k_BTGK, v_BTGV, g_BTH, beta_BTH)
    B, T, H, K = q_BTHK.shape
    V = v_BTGV.shape[3]
    S_BHKV = first_state(state_BHKV, q_BTHK, K, V)
    if T == 0:
        return q_BTHK.new_zeros(B, 0, H, V), S_BHKV.clone()
    S_XKV = S_BHKV.reshape(B * H, K, V)
    outputs: list[Tensor] = []
    for (q, k, v, g, beta), C in token_groups(q_BTHK, k_BTGK, v_BTGV, g_BTH, beta_BTH):
        chunks_XCV, S_XKV = _delta_group(q, k, v, g, beta, S_XKV, C)
        outputs += [o_XCV.view(B, H, C, V).transpose(1, 2) for o_XCV in chunks_XCV]
    return torch.cat(outputs, dim=1), S_XKV.view(B, H, K, V)


def delta_rule(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, beta_BTH: Tensor, state_BHKV: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Delta rule in chunks; see `ahn.ops.delta_rule` for the arguments.

    Source: the WY form of DeltaNet (arXiv 2406.06484).
    """
    return gated_delta_rule(q_BTHK, k_BTGK, v_BTGV, torch.zeros_like(beta_BTH), beta_BTH, state_BHKV)


def state_space(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, g_BTH: Tensor, dt_BTH: Tensor, state_BHVK: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """State space recurrence in chunks; see `ahn.ops.state_space` for the arguments.

    Source: the block decomposition of Mamba2 (arXiv 2405.21060), section 6.
    """
    q_BTHK, k_BTGK, v_BTGV, g_BTH, dt_BTH = in_compute_dtype(q_BTHK, k_BTGK, v_BTGV, g_BTH, dt_BTH)
    B, T, H, K = q_BTHK.shape
    V = v_BTGV.shape[3]
    S_BHVK = first_state(state_BHVK, q_BTHK, V, K)
    if T == 0:
        return q_BTHK.new_zeros(B, 0, H, V), S_BHVK.clone()
    outputs: list[Tensor] = []
    for (q, k, v, g, dt), C in token_groups(q_BTHK, k_BTGK, v_BTGV, g_BTH, dt_BTH):
        o_BTHV, S_BHVK = _state_space_group(q, k, v, g, dt, S_BHVK, C)
        outputs.append(o_BTHV)
    return torch.cat(outputs, dim=1), S_BHVK


def _delta_group(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, g_BTH: Tensor, beta_BTH: Tensor, S_XKV: Tensor, C: int
) -> tuple[list[Tensor], Tensor]:
    """Run the gated delta rule over a group of chunks.

    With D the decays between tokens, the corrections U of a chunk solve (I + tril(beta * D * K K^T, -1)) U =
    beta * (V - since_start * K S), all of them at once; the inverse does not depend on the state S and is taken for
    the whole group ahead of the walk. Then o = since_start * Q S + (D * Q K^T) U.

    Returns:
        The outputs `[X, C, V]` of every chunk, and the state after the group.
    """
    q_NBHCK, k_NBGCK, v_NBGCV = by_chunk(q_BTHK, C), by_chunk(k_BTGK, C), by_chunk(v_BTGV, C)
    beta_NBHC = by_chunk(beta_BTH, C)
    decay = decay_factors(by_chunk(g_BTH, C))
    N, B, H = beta_NBHC.shape[:3]

    # In place on products that nothing else holds: saves a pass over fresh memory, and backward does not need them.
    scores_NBHCC = _scores(q_NBHCK, k_NBGCK).mul_(decay.between_NBHCC)
    system_NXCC = _per_head(k_NBGCK @ k_NBGCK.mT, beta_NBHC).mul_(decay.between_NBHCC.view(N, B * H, C, C))
    # Only what is below the diagonal is read, so the diagonal of the system need not be cleared.
    eye_CC = torch.eye(C, dtype=q_BTHK.dtype, device=q_BTHK.device)
    inverse_NXCC = torch.linalg.solve_triangular(system_NXCC, eye_CC, upper=False, unitriangular=True)

    return _walk(
        zip(
            (q_NBHCK * decay.since_start_NBHC.unsqueeze(-1)).view(N, B * H, C, -1).unbind(),
            _per_head(k_NBGCK, beta_NBHC * decay.since_start_NBHC).unbind(),
            _per_head(k_NBGCK, decay.until_end_NBHC).mT.unbind(),
            _per_head(v_NBGCV, beta_NBHC).unbind(),
            inverse_NXCC.unbind(),
            scores_NBHCC.view(N, B * H, C, C).unbind(),
            decay.whole_NBH.view(N, B * H, 1, 1).unbind(),
        ),
        S_XKV,
    )


def _walk(chunks: Iterable[tuple[Tensor, ...]], S_XKV: Tensor) -> tuple[list[Tensor], Tensor]:
    """Carry the state of the gated delta rule from chunk to chunk, reading it on the way."""
    outputs = []
    for q_XCK, erase_XCK, write_XKC, v_XCV, inverse_XCC, scores_XCC, decay_X11 in chunks:
        U_XCV = torch.bmm(inverse_XCC, torch.baddbmm(v_XCV, erase_XCK, S_XKV, alpha=-1))
        outputs.append(torch.bmm(q_XCK, S_XKV).baddbmm_(scores_XCC, U_XCV))
        S_XKV = (S_XKV * decay_X11).baddbmm_(write_XKC, U_XCV)
    return outputs, S_XKV


def _state_space_group(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, g_BTH: Tensor, dt_BTH: Tensor, S_BHVK: Tensor, C: int
) -> tuple[Tensor, Tensor]:
    """Run the state space recurrence over a group of chunks.

    What a chunk writes does not depend on the state, so the walk is a sum, and all reads are done at once after it.

    Returns:
        The outputs `[B, N * C, H, V]` and the state after the group.
    """
    q_NBHCK, k_NBGCK, v_NBGCV = by_chunk(q_BTHK, C), by_chunk(k_BTGK, C), by_chunk(v_BTGV, C)
    decay = decay_factors(by_chunk(g_BTH, C))
    dt_NBHC = by_chunk(dt_BTH, C)
    N, B, H = dt_NBHC.shape[:3]
    G = k_NBGCK.shape[2]

    # Heads of a group side by side as columns, so that one product with the shared keys gives all their writes.
    factor_NBGCr = (dt_NBHC * decay.until_end_NBHC).view(N, B, G, -1, C).transpose(-1, -2)
    written_NBGCR = (v_NBGCV.unsqueeze(-2) * factor_NBGCr.unsqueeze(-1)).flatten(-2)
    writes_NBHVK = (written_NBGCR.mT @ k_NBGCK).view(N, *S_BHVK.shape)
    states = []
    for decay_BH, write_BHVK in zip(decay.whole_NBH.unbind(), writes_NBHVK.unbind()):
        states.append(S_BHVK)
        S_BHVK = torch.addcmul(write_BHVK, S_BHVK, decay_BH[..., None, None])

    scores_NBHCC = _scores(q_NBHCK, k_NBGCK).mul_(decay.between_NBHCC).mul_(dt_NBHC.unsqueeze(-2))
    V = v_NBGCV.shape[-1]
    recent_NBHCV = (scores_NBHCC.view(N, B, G, -1, C) @ v_NBGCV).view(N, B, H, C, V)
    read_NBHCK = q_NBHCK * decay.since_start_NBHC.unsqueeze(-1)
    o_NXCV = torch.baddbmm(
        recent_NBHCV.view(-1, C, V), read_NBHCK.flatten(0, 2), torch.stack(states).flatten(0, 2).mT
    ).view(N, B, H, C, V)
    return o_NXCV.permute(1, 0, 3, 2, 4).reshape(B, N * C, H, V), S_BHVK


def _scores(q_NBHCK: Tensor, k_NBGCK: Tensor) -> Tensor:
    """Compute q . k for every pair of tokens of a chunk, `[N, B, H, C, C]`, with the query heads of a group stacked."""
    N, B, H, C, K = q_NBHCK.shape
    return torch.matmul(q_NBHCK.view(N, B, k_NBGCK.shape[2], -1, K), k_NBGCK.mT).view(N, B, H, C, C)


def _per_head(x_NBGCD: Tensor, factor_NBHC: Tensor) -> Tensor:
    """Scale what kv heads share by a factor of each query head: `[N, B, G, C, D]` to `[N, X, C, D]`."""
    N, B, H, C = factor_NBHC.shape
    factor_NBGrC1 = factor_NBHC.view(N, B, x_NBGCD.shape[2], -1, C, 1)
    return (x_NBGCD.unsqueeze(3) * factor_NBGrC1).view(N, B * H, C, -1)
