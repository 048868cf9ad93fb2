"""The recurrences through the triton kernels of flash-linear-attention (fla), for CUDA tensors only.

fla is optional and imported on the first call, because with triton it crashes on CPU tensors. Its chunked kernels
multiply in the type of q, k and v, so they serve half precision only. Float32 inputs need float32 arithmetic. They go
to the token-by-token kernel (short spans without gradients) or to `ahn.ops.chunked`.

Shapes: B batch, T tokens, H query heads, G kv heads (H = r * G; query head h uses kv head h // r), K key size, V value
size.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ahn.ops import chunked
from ahn.ops._shared import clamp_log_decay, first_state

_HALF = (torch.bfloat16, torch.float16)
# Up to here a loop inside one kernel costs less than the several launches of the chunked form.
_RECURRENT_TOKENS = 64
# fla's chunked kernels keep a row of keys in registers and take no more than this.
_MAX_KEY_SIZE = 256


def available() -> bool:
    """Tell whether fla can be imported; asked once per process."""
    return _module("gated_delta_rule") is not None


def gated_delta_rule(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, g_BTH: Tensor, beta_BTH: Tensor, state_BHKV: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gated delta rule with fla's kernels; see `ahn.ops.gated_delta_rule` for the arguments.

    Source: Gated DeltaNet (arXiv 2412.06464).
    """
    kernel = _kernel("gated_delta_rule", q_BTHK, (q_BTHK, k_BTGK, v_BTGV, g_BTH, beta_BTH, state_BHKV))
    if kernel is None:
        return chunked.gated_delta_rule(q_BTHK, k_BTGK, v_BTGV, g_BTH, beta_BTH, state_BHKV)
    return _call(kernel, q_BTHK, k_BTGK, v_BTGV, state_BHKV, g=clamp_log_decay(g_BTH.float()), beta=beta_BTH.float())


def delta_rule(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, beta_BTH: Tensor, state_BHKV: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Delta rule with fla's kernels; see `ahn.ops.delta_rule` for the arguments.

    Source: DeltaNet (arXiv 2406.06484).
    """
    kernel = _kernel("delta_rule", q_BTHK, (q_BTHK, k_BTGK, v_BTGV, beta_BTH, state_BHKV))
    if kernel is None:
        return chunked.delta_rule(q_BTHK, k_BTGK, v_BTGV, beta_BTH, state_BHKV)
    return _call(kernel, q_BTHK, k_BTGK, v_BTGV, state_BHKV, beta=beta_BTH.float())


def state_space(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, g_BTH: Tensor, dt_BTH: Tensor, state_BHVK: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """State space recurrence with fla's kernels; see `ahn.ops.state_space` for the arguments.

    It is simple gated linear attention on values scaled by dt, with the state transposed.

    Source: Mamba2 (arXiv 2405.21060).
    """
    kernel = _kernel("simple_gla", q_BTHK, (q_BTHK, k_BTGK, v_BTGV, g_BTH, dt_BTH, state_BHVK))
    if kernel is None:
        return chunked.state_space(q_BTHK, k_BTGK, v_BTGV, g_BTH, dt_BTH, state_BHVK)
    repeats = q_BTHK.shape[2] // v_BTGV.shape[2]
    v_BTHV = v_BTGV.float().repeat_interleave(repeats, dim=2) * dt_BTH.float().unsqueeze(-1)
    state_BHKV = None if state_BHVK is None else state_BHVK.mT
    o_BTHV, state_BHKV = _call(kernel, q_BTHK, k_BTGK, v_BTHV, state_BHKV, g=clamp_log_decay(g_BTH.float()))
    return o_BTHV, state_BHKV.mT.contiguous()


@cache
def _module(rule: str) -> Any | None:
    """Import `fla.ops.<rule>` once; None where fla or what it needs is missing."""
    try:
        return importlib.import_module(f"fla.ops.{rule}")
    except ImportError:
        return None


def _kernel(
    rule: str, q_BTHK: Tensor, tensors: tuple[Tensor | None, ...]
) -> tuple[Callable[..., Any], torch.dtype] | None:
    """Choose fla's kernel for one call and the type it multiplies in, or None where plain torch has to do it."""
    module = _module(rule)
    T, K = q_BTHK.shape[1], q_BTHK.shape[3]
    if module is None or T == 0 or q_BTHK.dtype == torch.float64:
        return None
    # The token-by-token kernel of the gated delta rule has no backward.
    differentiated = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    if T <= _RECURRENT_TOKENS and not differentiated:
        # It computes in float32 whatever it is given, but rounds the output to the type that it is given.
        return getattr(module, f"fused_recurrent_{rule}"), torch.float32
    if q_BTHK.dtype in _HALF and K <= _MAX_KEY_SIZE:
        return getattr(module, f"chunk_{rule}"), q_BTHK.dtype
    return None


def _call(
    kernel: tuple[Callable[..., Any], torch.dtype],
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    state_BHKV: Tensor | None,
    **gates: Tensor,
) -> tuple[Tensor, Tensor]:
    """Call one of fla's kernels the way they all agree on: heads repeated, state float32 `[B, H, K, V]`, no scaling."""
    function, dtype = kernel
    H, K, V = q_BTHK.shape[2], q_BTHK.shape[3], v_BTGV.shape[3]
    k_BTHK, v_BTHV = (x.repeat_interleave(H // x.shape[2], dim=2).to(dtype).contiguous() for x in (k_BTGK, v_BTGV))
    o_BTHV, state_BHKV = function(
        q_BTHK.to(dtype).contiguous(),
        k_BTHK,
        v_BTHV,
        **{name: gate.contiguous() for name, gate in gates.items()},
        scale=1.0,
        initial_state=first_state(state_BHKV, q_BTHK.float(), K, V).contiguous(),
        output_final_state=True,
    )
    return o_BTHV.float(), state_BHKV.float()
