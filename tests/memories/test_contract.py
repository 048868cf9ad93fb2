"""The contract of a memory, held by every memory: those of the registry and the one that CONTRIBUTING shows.

The fixture `memory` gives all of them to the tests of whole models too, wherever these ask for it.
"""

from __future__ import annotations

import itertools
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from ahn import native, ops
from ahn.cost import cost_model
from ahn.errors import ConfigError
from ahn.memories import Memory, MemoryShape, build_memory
from ahn.tokens import Attended
from tests.cost.test_actual import config, token_flops
from tests.tiny import CONTRIBUTING, DOCUMENTED, MEMORIES, documented_memory, tiny

SHAPE = MemoryShape(hidden_size=12, query_heads=4, kv_heads=2, key_size=6, value_size=5)
WIDE = MemoryShape(hidden_size=24, query_heads=4, kv_heads=2, key_size=16, value_size=32)
SMOLLM2 = MemoryShape(hidden_size=576, query_heads=9, kv_heads=3, key_size=64, value_size=64)
LAYERS = 30
SLOWEST = 1.3  # times Gated DeltaNet


def declared(rule: Any, decays: bool, per_head: bool, projected: bool) -> type[Memory]:
    """A memory of one of the kinds that can be declared."""

    class Declared(Memory):
        projections = ("w_proj",) if projected else ()
        gate_parameters = {"rate": torch.rand}  # noqa: RUF012
        norm_per_head = per_head

        @staticmethod
        def activate(*inputs: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
            *strength, rate = inputs
            return -rate if decays else None, torch.sigmoid(strength[0] + rate) if projected else rate

    Declared.rule = rule
    return Declared


KINDS = {
    f"{rule}-{'decay' if decays else 'kept'}-{'per-head' if per_head else 'all-heads'}": (rule, decays, per_head)
    for rule, decays, per_head in itertools.product(("delta", "additive"), (True, False), (True, False))
}


@pytest.fixture(params=[*MEMORIES, DOCUMENTED, *KINDS])
def build(request: pytest.FixtureRequest) -> Callable[[MemoryShape], Memory]:
    """What builds a memory with an output that is not zero: every memory, and every kind that can be declared."""
    name = request.param

    def built(shape: MemoryShape) -> Memory:
        torch.manual_seed(3)
        if name in KINDS:
            memory = declared(*KINDS[name], projected="delta" in name)(shape)
        else:
            memory = documented_memory()(shape) if name == DOCUMENTED else build_memory(name, shape)
        torch.nn.init.normal_(memory.o_proj)
        return memory

    return built


def tokens(memory: Memory, count: int, batch: int = 2) -> list[torch.Tensor]:
    """Queries, keys and values, hidden states and a state, in the dtype of the memory."""
    hidden, heads, kv_heads, key_size, value_size = memory.shape
    sizes = [(heads, key_size), (kv_heads, key_size), (kv_heads, value_size), (hidden,)]
    made = [torch.randn(batch, count, *size) for size in sizes] + [torch.randn(batch, *memory.state_shape())]
    return [tensor.to(memory.o_proj.dtype) for tensor in made]


@pytest.mark.parametrize("backend", ["naive", "chunked"])
def test_any_chunking_gives_the_same_with_gradients(build: Any, backend: str) -> None:
    """One scan = chunks = token by token, in float64, outputs and gradients of inputs and parameters."""
    memory = build(SHAPE).double()
    inputs, local = tokens(memory, 45), torch.randn(2, 45, 4, 5, dtype=torch.float64)
    log_sum = torch.randn(2, 45, 4, dtype=torch.float64)

    def scanned(sizes: list[int]) -> list[torch.Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        *evicted, hidden, state = leaves
        read, parts = state, []
        for span in zip(*(tensor.split(sizes, 1) for tensor in (*evicted, hidden, local, log_sum)), strict=True):
            out, read = memory.scan(*span[:3], memory.gates(span[3]), read)
            parts.append(memory.project_out(out, span[3], Attended(*span[4:])))
        out = torch.cat(parts, 1)
        needed = [*leaves, *memory.parameters()]
        return [out, read, *torch.autograd.grad(out.square().sum() + read.square().sum(), needed)]

    with ops.backend("naive"):
        expected = scanned([45])
    for sizes in ([45], [1] * 45, [33, 1, 1, 10]):
        with ops.backend(backend):
            torch.testing.assert_close(scanned(sizes), expected, rtol=1e-8, atol=1e-8)


@torch.no_grad()
def test_decoding_is_what_the_scan_does(build: Any) -> None:
    """One token: update and read, in torch and in C where there are kernels."""
    memory = build(WIDE)
    query, key, value, hidden, before = tokens(memory, 1, batch=3)
    gates, local, log_sum = memory.gates(hidden), torch.randn(3, 1, 4, 32), torch.randn(3, 1, 4)
    read, after = memory.scan(query, key, value, gates, before)
    expected = local + memory.project_out(read, hidden, Attended(local, log_sum))
    assert gates.dtype == torch.float32
    for where in (nullcontext(), native.switched_off()):
        with where:
            state = before[None].clone()
            together = type(memory).gates_of_layers([memory], hidden.transpose(0, 1))
            torch.testing.assert_close(together[0], gates[:, 0])
            type(memory).update([memory], key.transpose(0, 1), value.transpose(0, 1), together, state)
            torch.testing.assert_close(state[0], after, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(memory.read(query, state[0]), read, rtol=1e-5, atol=1e-5)
            added = memory.decode_add(Attended(local.clone(), log_sum), query, hidden, state[0])
            torch.testing.assert_close(added, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_gates_of_zero_leave_the_state_bit_identical(build: Any) -> None:
    memory = build(WIDE)
    for count in (1, 2, 40):
        query, key, value, hidden, state = tokens(memory, count)
        _, after = memory.scan(query, key, value, torch.zeros_like(memory.gates(hidden)), state)
        assert torch.equal(after, state)


def test_what_gates_mean(build: Any) -> None:
    memory = build(SHAPE)
    gates = memory.gates(torch.randn(2, 7, SHAPE.hidden_size))
    assert gates.shape == (2, 7, memory.gate_count, SHAPE.query_heads)
    write, decay = memory.gating(gates)
    assert bool((write >= 0).all())
    assert (decay is None) == (memory.gate_count == 1)
    assert decay is None or bool(((decay > 0) & (decay <= 1)).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bfloat16", "float64"])
def test_gates_in_other_dtypes(build: Any, dtype: torch.dtype) -> None:
    memory = build(SHAPE).to(dtype)
    gates = memory.gates(torch.randn(1, 3, SHAPE.hidden_size, dtype=dtype))
    assert gates.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_it_is_silent_before_it_is_trained(memory: str) -> None:
    fresh = build_memory(memory, SHAPE)
    query, key, value, hidden, state = tokens(fresh, 3)
    read, _ = fresh.scan(query, key, value, fresh.gates(hidden), state)
    added = fresh.project_out(read, hidden, Attended(torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4)))
    assert torch.equal(added, torch.zeros(2, 3, 4, 5))


@pytest.mark.parametrize("count", [1, 20, 60])
def test_costs_token_by_token(memory: str, count: int) -> None:
    counted = cost_model(tiny().config, config(window=16))
    cost = counted.at(count)[memory]
    assert cost.mixer_flops == sum(token_flops(counted, memory, token) for token in range(count))
    shapes = [layer.shape for layer in counted.base.attachment.layers]
    added = sum(p.numel() for shape in shapes for p in build_memory(memory, shape).parameters())
    assert cost.parameters == added


def decode_seconds(memories: list[Memory]) -> float:
    """CPU time of one token: gates, updates and answers of all layers."""
    x = torch.randn(LAYERS, 1, 576)
    keys, values = torch.randn(2, LAYERS, 1, 3, 64).unbind()
    states = torch.randn(LAYERS, 1, *memories[0].state_shape())
    query, local = torch.randn(1, 1, 9, 64), Attended(torch.randn(1, 1, 9, 64), torch.randn(1, 1, 9))
    begun = time.process_time()
    gates = type(memories[0]).gates_of_layers(memories, x)
    type(memories[0]).update(memories, keys, values, gates, states)
    for layer, memory in enumerate(memories):
        memory.decode_add(local, query, x[layer, :, None], states[layer])
    return time.process_time() - begun


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "torch"])
@torch.no_grad()
def test_it_decodes_about_as_fast_as_gated_delta_net(memory: str, kernels: bool) -> None:
    """Turn by turn in one process, by CPU time; a busy machine gets several chances."""
    theirs, ours = ([build_memory(name, SMOLLM2) for _ in range(LAYERS)] for name in ("gated_delta_net", memory))
    ratios = []
    with nullcontext() if kernels else native.switched_off():
        for _ in range(6):
            rounds = [(decode_seconds(ours), decode_seconds(theirs)) for _ in range(15)]
            mine, reference = (statistics.median(times) for times in zip(*rounds))
            ratios.append(mine / reference)
            if ratios[-1] <= SLOWEST:
                return
    pytest.fail(f"{memory} takes {min(ratios):.2f} times as long as gated_delta_net, at most {SLOWEST} are allowed")


def test_an_unknown_rule_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^Declared\.rule is 'hebb'; declare one of delta, additive$"):
        declared("hebb", True, True, True)(SHAPE)


@pytest.mark.parametrize(
    ("rule", "decays", "projected"), [("delta", False, False), ("additive", True, False), ("additive", False, True)]
)
def test_only_sums_without_order_leave_anchors_out(rule: str, decays: bool, projected: bool) -> None:
    ordered, plain = declared(rule, decays, True, projected), declared("additive", False, True, False)
    ordered.leaves_anchors_out = plain.leaves_anchors_out = True
    plain(SHAPE)
    with pytest.raises(ConfigError, match=r"^Declared cannot leave anchors out: its state depends on how tokens come$"):
        ordered(SHAPE)


def test_contributing_shows_a_whole_memory() -> None:
    page = CONTRIBUTING.read_text()
    kind = documented_memory()
    assert kind.rule == "additive"
    assert f'`"{DOCUMENTED}": "{kind.__name__}",`' in page
    assert f"src/ahn/memories/{DOCUMENTED}.py" in page
    lines = page.partition("```python\n")[2].partition("```")[0].splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 120


def test_the_docs_list_the_registry() -> None:
    page = (Path(__file__).parents[2] / "docs" / "usage.md").read_text()
    (row,) = re.findall(r"^\| `memory` \|(.*?)\|", page, re.MULTILINE)
    assert tuple(re.findall(r"`(\w+)`", row)) == MEMORIES


def test_names_cost_no_import_of_torch() -> None:
    code = "import sys; from ahn.memories import memory_names; print(*memory_names(), 'torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.split() == [*MEMORIES, "False"]
