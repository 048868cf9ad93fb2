"""In which precision a frozen base reads fastest here: measured, because it depends on the processor."""

from __future__ import annotations

import time

import torch
from torch import nn
from torch.nn import functional

from ahn.quantization import QuantizedLinear

_TOKENS = 1024
_SECONDS = 0.5  # for each precision
_WORTH = 1.3  # times as fast half precision must be: it also rounds, and turns its inputs around


def fastest_precision(model: nn.Module, seconds: float = _SECONDS) -> torch.dtype:
    """bfloat16 where this machine multiplies clearly faster in it than in float32, else float32.

    Processors with AMX are several times as fast, others emulate bfloat16 and are slower.

    Args:
        model: The base model; its largest linear map of a layer is what is measured.
        seconds: Time to measure each precision for.
    """
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) and not isinstance(m, QuantizedLinear)]
    inner = [each.weight for each in linears if each.out_features < 8 * each.in_features] or [linears[0].weight]
    weight = max(inner, key=torch.numel).detach()
    slow, fast = (_rate(weight.to(dtype), seconds) for dtype in (torch.float32, torch.bfloat16))
    return torch.bfloat16 if fast > _WORTH * slow else torch.float32


@torch.no_grad()
def _rate(weight: torch.Tensor, seconds: float) -> float:
    """Products a second."""
    inputs = torch.ones(_TOKENS, weight.size(1), dtype=weight.dtype, device=weight.device)
    functional.linear(inputs, weight)
    count, began = 0, time.perf_counter()
    while (spent := time.perf_counter() - began) < seconds or not count:
        functional.linear(inputs, weight)
        count += 1
    return count / spent
