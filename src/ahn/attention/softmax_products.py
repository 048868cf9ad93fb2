"""The gradient of attention in bfloat16 on a CPU as matrix products, which the processor makes by itself (AMX).

The fused kernel of torch makes its products in small tiles, and takes more than twice as long.

Legend of shapes: B batch, G key/value heads, R queries stacked on a kv head, M keys, K size of keys and values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from ahn import native
from ahn.native.softmax_back import softmax_back

_PRODUCTS: Any = getattr(torch.backends.mkldnn, "matmul", None)  # torch 2.6 has none


def can_multiply(query: torch.Tensor) -> bool:
    """Whether `gradients` serves: in bfloat16, where products of such numbers can be had in float32."""
    return query.dtype is torch.bfloat16 and hasattr(_PRODUCTS, "fp32_precision") and native.ready()


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Multiplies float32 as bfloat16 inside a `with` block: exact where the numbers come from there, sums included."""
    before = _PRODUCTS.fp32_precision
    _PRODUCTS.fp32_precision = "bf16"
    try:
        yield
    finally:
        _PRODUCTS.fp32_precision = before


def gradients(
    to_out_BGRK: torch.Tensor,
    q_BGRK: torch.Tensor,
    k_BGMK: torch.Tensor,
    v_BGMK: torch.Tensor,
    mask_RM: torch.Tensor,
    log_sums_BGR: torch.Tensor,
    means_BGR: torch.Tensor,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of queries, keys and values; all but sums and means is bfloat16. Runs inside `exact_products`.

    Args:
        to_out_BGRK: Gradient of the output.
        q_BGRK: Queries.
        k_BGMK: Keys.
        v_BGMK: Values.
        mask_RM: Additive mask.
        log_sums_BGR: Logarithms of the softmax's denominators, float32.
        means_BGR: Products of the output and its gradient, float32.
        scaling: Factor on the products of queries and keys.
    """
    to_out, q, k, v = (each.flatten(0, 1) for each in (to_out_BGRK, q_BGRK, k_BGMK, v_BGMK))
    scores = torch.bmm(q.float(), k.float().mT)
    to_weights = torch.bmm(to_out.float(), v.float().mT)
    log_sums, means = log_sums_BGR.flatten(0, 1), means_BGR.flatten(0, 1)
    weights, slopes = softmax_back(scores, to_weights, mask_RM, log_sums, means, scaling)
    to_q, to_k, to_v = torch.bmm(slopes, k), torch.bmm(slopes.mT, q), torch.bmm(weights.mT, to_out)
    return to_q.view_as(q_BGRK), to_k.view_as(k_BGMK), to_v.view_as(v_BGMK)
