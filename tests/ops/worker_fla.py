"""Compares fla's token-by-token kernels, interpreted on the CPU, with the loop over tokens in float64. Prints JSON.

A process of its own, because triton reads TRITON_INTERPRET when it is imported.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import triton.runtime.autotuner

from ahn.ops import cuda, naive


def first_configuration(*args: Any, **kwargs: Any) -> list[float]:
    """Takes the place of timing a kernel's configurations, for which the interpreter has no clock."""
    return [1.0, 1.0, 1.0]


def inputs(tokens: int, with_state: bool) -> dict[str, torch.Tensor | None]:
    torch.manual_seed(tokens)
    B, H, G, K, V = 2, 4, 2, 16, 8
    return {
        "q": torch.randn(B, tokens, H, K),
        "k": torch.nn.functional.normalize(torch.randn(B, tokens, G, K), dim=-1),
        "v": torch.randn(B, tokens, G, V),
        "g": -torch.rand(B, tokens, H),
        "beta": torch.rand(B, tokens, H),
        "state": torch.randn(B, H, K, V) if with_state else None,
    }


def arguments(rule: str, given: dict[str, torch.Tensor | None]) -> list[torch.Tensor | None]:
    """What a rule takes; the state of a state space has its values first."""
    state = given["state"]
    if rule == "state_space" and state is not None:
        state = state.mT.contiguous()
    gates = ["beta"] if rule == "delta_rule" else ["g", "beta"]
    return [given[name] for name in ("q", "k", "v", *gates)] + [state]


def largest_error(rule: str, tokens: int, with_state: bool) -> float:
    """Largest difference of outputs and state, relative to the largest number of each."""
    tensors = arguments(rule, inputs(tokens, with_state))
    found = getattr(cuda, rule)(*tensors)
    expected = getattr(naive, rule)(*(None if each is None else each.double() for each in tensors))
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))


@torch.no_grad()
def main() -> None:
    triton.runtime.autotuner.Autotuner._bench = first_configuration
    if not cuda.available():
        sys.exit("fla cannot be imported")
    rules = ("gated_delta_rule", "delta_rule", "state_space")
    cases = [(rule, tokens, state) for rule in rules for tokens in (1, 5, 33) for state in (False, True)]
    print(json.dumps({f"{rule}-{tokens}-{state}": largest_error(rule, tokens, state) for rule, tokens, state in cases}))


if __name__ == "__main__":
    main()
