"""Speed of the recurrences on this machine, against the plain torch versions in transformers.

Run `python benchmarks/ops.py`. Both sides get the same inputs and take turns within one run, so that what else the
machine does hits both; medians are compared. Nothing is written unless `--json FILE` is given.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from typing import Any

# Else transformers looks for a kernel on the hub, and this compares plain torch.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan
from transformers.models.qwen3_next.modeling_qwen3_next import (
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)

from ahn import ops

Pair = tuple[Callable[[], Any], Callable[[], Any]]
SHAPES = [(512, 9, 64), (1024, 9, 64), (2048, 9, 64), (512, 16, 128), (1024, 16, 128)]


def inputs(tokens: int, heads: int, size: int) -> tuple[Tensor, ...]:
    """Normalised queries and keys, values, log decays, writing strengths and a state, float32, one row."""
    q, k = (F.normalize(torch.randn(1, tokens, heads, size), dim=-1) for _ in range(2))
    g = -F.softplus(torch.randn(1, tokens, heads))
    return q, k, torch.randn(1, tokens, heads, size), g, torch.rand(1, tokens, heads), torch.randn(1, heads, size, size)


def gated_delta_rule(tokens: int, heads: int, size: int) -> Pair:
    """Forward pass of the gated delta rule without gradients: ours, theirs."""
    q, k, v, g, beta, state = inputs(tokens, heads, size)
    # Theirs scales the queries itself.
    scaled = q * size**-0.5
    reference = torch_recurrent_gated_delta_rule if tokens == 1 else torch_chunk_gated_delta_rule
    return (
        lambda: ops.gated_delta_rule(scaled, k, v, g, beta, state),
        lambda: reference(q, k, v, g, beta, initial_state=state, output_final_state=True),
    )


def gated_delta_rule_backward(tokens: int, heads: int, size: int) -> Pair:
    """Forward and backward pass of the gated delta rule: ours, theirs."""
    leaves = [x.requires_grad_() for x in inputs(tokens, heads, size)]
    q, k, v, g, beta, state = leaves

    def backward(result: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(result[0].sum() + result[1].sum(), leaves)

    def theirs() -> tuple[Tensor, ...]:
        out = torch_chunk_gated_delta_rule(q, k, v, g, beta, initial_state=state, output_final_state=True)
        return backward(out)

    return lambda: backward(ops.gated_delta_rule(q * size**-0.5, k, v, g, beta, state)), theirs


def state_space(tokens: int, heads: int, size: int) -> Pair:
    """Forward pass of the state space recurrence without gradients: ours, theirs."""
    q, k, v, g, dt, state = inputs(tokens, heads, size)
    # Theirs takes one decay rate A per head and multiplies it by dt.
    A = -torch.rand(heads)
    g = A * dt
    return (
        lambda: ops.state_space(q, k, v, g, dt, state),
        lambda: mamba2_chunk_scan(v, dt, A, k, q, chunk_size=64, initial_states=state, return_final_states=True),
    )


# Each with whether gradients are recorded.
CASES = [(gated_delta_rule, False), (gated_delta_rule_backward, True), (state_space, False)]


def measure(pair: Pair, rounds: int, grad: bool) -> dict[str, float]:
    """Time both sides in turns; check first that they agree. Times in milliseconds, medians."""
    ours, theirs = pair
    with torch.set_grad_enabled(grad):
        for x, y in zip(ours(), theirs()):
            torch.testing.assert_close(x, y.view(x.shape), atol=1e-3, rtol=1e-3)
        seconds: tuple[list[float], list[float]] = ([], [])
        for _ in range(rounds):
            for side, run in zip(seconds, (ours, theirs)):
                start = time.perf_counter()
                run()
                side.append(time.perf_counter() - start)
    mine, other = (1e3 * statistics.median(x) for x in seconds)
    return {"ours_ms": mine, "transformers_ms": other, "ratio": other / mine}


def main() -> None:
    """Measure every case and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25, help="timed calls of each side per case (default: 25)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--only", choices=[case.__name__ for case, _ in CASES], help="this recurrence alone")
    parser.add_argument("--json", metavar="FILE", help="write the results here, too")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"{torch.get_num_threads()} threads, float32, one row; median of {options.rounds} calls each, taking turns")
    # Threads that wait for a busy core stall both sides by milliseconds: ratios mean little well above a load of 0.
    print(f"load of the machine at the start: {os.getloadavg()[0]:.1f}")
    print(f"{'times as fast as transformers':<32}{'tokens':>8}{'heads':>10}{'ours ms':>10}{'theirs ms':>11}")
    results = []
    for case, grad in CASES:
        if options.only not in (None, case.__name__):
            continue
        shapes = [(1, 9, 64), *SHAPES] if case is gated_delta_rule else SHAPES
        for tokens, heads, size in shapes:
            # A single token takes microseconds: more rounds cost nothing and steady the median.
            rounds = options.rounds * (20 if tokens == 1 else 1)
            row = {"case": case.__name__, "tokens": tokens, "heads": heads, "size": size}
            row |= measure(case(tokens, heads, size), rounds, grad)
            results.append(row)
            print(
                f"{row['ratio']:5.2f}x {row['case']:<26}{tokens:>7}{f'{heads} x {size}':>10}"
                f"{row['ours_ms']:>10.2f}{row['transformers_ms']:>11.2f}",
                flush=True,
            )
    if options.json:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        about = {"date": date.today().isoformat(), "machine": platform.processor() or platform.machine()}
        about |= {"threads": str(torch.get_num_threads()), "rounds": str(options.rounds)}
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"about": about | versions, "results": results}, file, indent=2)


if __name__ == "__main__":
    main()
