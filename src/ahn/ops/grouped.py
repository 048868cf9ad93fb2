"""The recurrences with gradients on a CPU: group after group of tokens, and nothing kept but the states between them.

Both passes run in C where that is possible. Elsewhere the backward pass walks the groups from the last to the first and
runs the chunked form of each again, whose intermediate results then never leave the CPU's cache.

Shapes: B batch, T tokens, H query heads, G kv heads (H = r * G; query head h uses kv head h // r), K key size,
V value size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ahn.ops import chunked, compiled
from ahn.ops._chunks import token_groups
from ahn.ops._shared import first_state, in_compute_dtype


def serves(*tensors: Tensor | None) -> bool:
    """Tell whether this is of use: with gradients, on a CPU."""
    there = [x for x in tensors if x is not None]
    needed = torch.is_grad_enabled() and any(x.requires_grad for x in there)
    return needed and all(x.device.type == "cpu" for x in there)


def gated_delta_rule(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, g_BTH: Tensor, beta_BTH: Tensor, state_BHKV: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gated delta rule; see `ahn.ops.gated_delta_rule` for the arguments."""
    S_BHKV = first_state(state_BHKV, q_BTHK, q_BTHK.shape[3], v_BTGV.shape[3])
    return _run("gated_delta_rule", S_BHKV, q_BTHK, k_BTGK, v_BTGV, g_BTH, beta_BTH)


def delta_rule(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, beta_BTH: Tensor, state_BHKV: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Delta rule; see `ahn.ops.delta_rule` for the arguments."""
    S_BHKV = first_state(state_BHKV, q_BTHK, q_BTHK.shape[3], v_BTGV.shape[3])
    return _run("delta_rule", S_BHKV, q_BTHK, k_BTGK, v_BTGV, beta_BTH)


def state_space(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, g_BTH: Tensor, dt_BTH: Tensor, state_BHVK: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """State space recurrence; see `ahn.ops.state_space` for the arguments."""
    S_BHVK = first_state(state_BHVK, q_BTHK, v_BTGV.shape[3], q_BTHK.shape[3])
    return _run("state_space", S_BHVK, q_BTHK, k_BTGK, v_BTGV, g_BTH, dt_BTH)


def _run(rule: str, state: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    outputs: tuple[Tensor, Tensor] = _Groups.apply(rule, *in_compute_dtype(*tensors), state)
    return outputs


class _Groups(torch.autograd.Function):
    """A recurrence over groups of tokens."""

    @staticmethod
    def forward(ctx: Any, rule: str, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        *inputs, state = tensors
        backend = compiled if compiled.available(*inputs, state) else chunked
        outputs, states = [], [state]
        for parts, _ in token_groups(*inputs):
            output, after = getattr(backend, rule)(*parts, states[-1])
            outputs.append(output)
            states.append(after)
        last = states.pop() if outputs else state.clone()
        ctx.save_for_backward(*inputs, *states)
        ctx.rule, ctx.count = rule, len(inputs)
        whole = torch.cat(outputs, dim=1) if outputs else inputs[0].new_zeros(*inputs[0].shape[:3], inputs[2].shape[3])
        return whole, last

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        inputs, states = saved[: ctx.count], saved[ctx.count :]
        groups = [parts for parts, _ in token_groups(*inputs)]
        to_output, to_state = gradients
        to_outputs = to_output.split([parts[0].shape[1] for parts in groups], dim=1) if groups else ()
        group_slopes: list[tuple[Tensor, ...]] = []
        backward = compiled.backward if compiled.available(*saved, *gradients) else _backward
        for parts, state, to_part in reversed(list(zip(groups, states, to_outputs))):
            *slopes, to_state = backward(ctx.rule, parts, state, to_part, to_state)
            group_slopes.append(tuple(slopes))
        whole = [torch.cat(each[::-1], dim=1) for each in zip(*group_slopes)] or [torch.zeros_like(x) for x in inputs]
        return None, *whole, to_state


def _backward(
    rule: str, inputs: Sequence[Tensor], state: Tensor, to_output: Tensor, to_state: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of one group by its chunked form; see `ahn.ops.compiled.backward`."""
    leaves = [x.detach().requires_grad_() for x in (*inputs, state)]
    with torch.enable_grad():
        results = getattr(chunked, rule)(*leaves)
    return torch.autograd.grad(results, leaves, (to_output, to_state))
