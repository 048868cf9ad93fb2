"""The elementwise part of the gradient of attention, by the kernel.

Legend of shapes: X heads and rows of a batch, R queries, M keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ahn import native
from ahn.errors import ShapeError
from ahn.native.checks import check_shapes


def softmax_back(
    scores_XRM: Tensor,
    to_weights_XRM: Tensor,
    mask_RM: Tensor,
    log_sums_XR: Tensor,
    means_XR: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """Weights of a softmax, and the gradient of the products of queries and keys.

    Args:
        scores_XRM: The products, float32, dense.
        to_weights_XRM: Gradient of the weights, float32, dense.
        mask_RM: Additive mask, float32 or bfloat16.
        log_sums_XR: Logarithms of the softmax's denominators, float32.
        means_XR: Mean of the gradient of the weights, weighted by the weights, float32.
        scaling: Factor on the products.

    Returns:
        Both `[X, R, M]`, in the dtype of the mask.
    """
    X, R, M = scores_XRM.shape
    check_shapes((to_weights_XRM, (X, R, M)), (mask_RM, (R, M)), (log_sums_XR, (X, R)), (means_XR, (X, R)))
    if not (scores_XRM.is_contiguous() and to_weights_XRM.is_contiguous()):
        raise ShapeError("a kernel takes dense scores")
    mask_RM = mask_RM if mask_RM.stride(1) == 1 else mask_RM.contiguous()
    log_sums, means = log_sums_XR.contiguous(), means_XR.contiguous()
    weights, slopes = (torch.empty(X, R, M, dtype=mask_RM.dtype) for _ in range(2))
    tensors = scores_XRM, to_weights_XRM, mask_RM, log_sums, means, weights, slopes
    native._run("ahn_softmax_back", X, R, M, mask_RM.stride(0), scaling, *tensors, int(mask_RM.dtype is torch.bfloat16))
    return weights, slopes
