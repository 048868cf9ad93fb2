"""Every backend computes the same outputs, states and gradients as the loop over tokens."""

import math
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ahn import ops
from ahn.ops import chunked, cuda, grouped, naive, step

RULES = ["gated_delta_rule", "delta_rule", "state_space"]
LENGTHS = [1, 2, 31, 32, 33, 63, 64, 65, 130]
HEADS = [pytest.param(2, 2, id="2q-2kv"), pytest.param(4, 2, id="4q-2kv"), pytest.param(3, 1, id="3q-1kv")]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from threads, and wait for them on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def inputs(rule: str, T: int, H: int = 4, G: int = 2, dtype: torch.dtype = torch.float64, B: int = 2) -> list[Tensor]:
    """Inputs of a rule in its argument order, the state last; key and value sizes differ on purpose."""
    K, V = 8, 6
    random = torch.Generator().manual_seed(T * 100 + H * 10 + G)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=random)

    q, k, v = F.normalize(normal(B, T, H, K), dim=-1), F.normalize(normal(B, T, G, K), dim=-1), normal(B, T, G, V)
    g, strength, state = -F.softplus(normal(B, T, H)), torch.sigmoid(normal(B, T, H)), normal(B, H, K, V)
    gates = [strength] if rule == "delta_rule" else [g, strength]
    state = state.mT.contiguous() if rule == "state_space" else state
    return [x.to(dtype) for x in (q, k, v, *gates, state)]


def run(module: ModuleType, rule: str, tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    return getattr(module, rule)(*tensors)


def gradients(module: ModuleType, rule: str, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of a fixed mix of outputs and final state with respect to every input."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    o, state = run(module, rule, leaves)
    mix = [torch.linspace(-1, 1, x.numel(), dtype=x.dtype).cos().view(x.shape) for x in (o, state)]
    return torch.autograd.grad((o * mix[0]).sum() + (state * mix[1]).sum(), leaves)


def assert_same(got: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> None:
    for x, y in zip(got, expected, strict=True):
        assert x.shape == y.shape
        torch.testing.assert_close(x, y, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(("H", "G"), HEADS)
@pytest.mark.parametrize("T", LENGTHS, ids=lambda T: f"{T}tokens")
@pytest.mark.parametrize("rule", RULES)
def test_chunked_equals_naive(rule: str, T: int, H: int, G: int, dtype: torch.dtype) -> None:
    tensors = inputs(rule, T, H, G, dtype)
    assert_same(run(chunked, rule, tensors), run(naive, rule, tensors), TOLERANCE[dtype])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)], ids=["f64", "f32"])
@pytest.mark.parametrize(("H", "G"), HEADS)
@pytest.mark.parametrize("T", [1, 2, 33, 65], ids=lambda T: f"{T}tokens")
@pytest.mark.parametrize("rule", RULES)
def test_chunked_gradients_equal_naive(rule: str, T: int, H: int, G: int, dtype: torch.dtype, tolerance: float) -> None:
    tensors = inputs(rule, T, H, G, dtype)
    assert_same(gradients(chunked, rule, tensors), gradients(naive, rule, tensors), tolerance)
    assert_same(run(grouped, rule, tensors), run(naive, rule, tensors), TOLERANCE[dtype])
    assert_same(gradients(grouped, rule, tensors), gradients(naive, rule, tensors), tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(("H", "G"), HEADS)
@pytest.mark.parametrize("rule", RULES)
def test_step_equals_naive_with_gradients(rule: str, H: int, G: int, dtype: torch.dtype) -> None:
    tensors = inputs(rule, 1, H, G, dtype)
    assert_same(run(step, rule, tensors), run(naive, rule, tensors), TOLERANCE[dtype])
    assert_same(gradients(step, rule, tensors), gradients(naive, rule, tensors), TOLERANCE[dtype])


@pytest.mark.parametrize("rule", RULES)
def test_many_groups_of_chunks_equal_one(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = inputs(rule, 130)
    one = run(chunked, rule, tensors) + gradients(chunked, rule, tensors)
    monkeypatch.setattr("ahn.ops._chunks._CPU_ELEMENTS_PER_THREAD", 1)
    for module in (chunked, grouped):
        assert_same(run(module, rule, tensors) + gradients(module, rule, tensors), one, 1e-12)


def test_groups_keep_the_states_between_them_alone() -> None:
    leaves = [x.requires_grad_() for x in inputs("gated_delta_rule", 130)]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        ops.gated_delta_rule(*leaves)
    assert sum(x.numel() for x in kept) <= sum(x.numel() for x in leaves) + 2 * leaves[-1].numel()


@pytest.mark.parametrize("module", [naive, chunked, step], ids=["naive", "chunked", "step"])
@pytest.mark.parametrize("rule", RULES)
def test_without_a_state_it_starts_from_zeros(rule: str, module: ModuleType) -> None:
    *tensors, state = inputs(rule, 1 if module is step else 33)
    assert_same(run(module, rule, tensors), run(module, rule, [*tensors, torch.zeros_like(state)]), 0.0)


@pytest.mark.parametrize("split", [1, 32, 50, 129], ids=lambda t: f"{t}+{130 - t}")
@pytest.mark.parametrize("rule", RULES)
def test_two_calls_equal_one(rule: str, split: int) -> None:
    *tensors, state = inputs(rule, 130)
    first, state_between = run(ops, rule, [*(x[:, :split] for x in tensors), state])
    second, state_after = run(ops, rule, [*(x[:, split:] for x in tensors), state_between])
    assert_same((torch.cat([first, second], 1), state_after), run(ops, rule, [*tensors, state]), 1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_token_by_token_equals_one_call(rule: str) -> None:
    *tensors, state = inputs(rule, 33)
    expected, outputs = run(ops, rule, [*tensors, state]), []
    for t in range(33):
        o, state = run(ops, rule, [*(x[:, t : t + 1] for x in tensors), state])
        outputs.append(o)
    assert_same((torch.cat(outputs, 1), state), expected, 1e-12)


@pytest.mark.parametrize("module", [naive, chunked, cuda, ops], ids=["naive", "chunked", "cuda", "auto"])
@pytest.mark.parametrize("rule", RULES)
def test_no_tokens_leave_the_state(rule: str, module: ModuleType) -> None:
    tensors = inputs(rule, 0)
    o, state = run(module, rule, tensors)
    assert o.shape == (2, 0, 4, 6)
    assert torch.equal(state, tensors[-1])
    assert state.data_ptr() != tensors[-1].data_ptr()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("T", [1, 2, 65], ids=lambda T: f"{T}tokens")
@pytest.mark.parametrize("module", [naive, chunked, ops], ids=["naive", "chunked", "auto"])
@pytest.mark.parametrize("rule", RULES)
def test_zero_gates_leave_the_state_bit_identical(rule: str, module: ModuleType, T: int, dtype: torch.dtype) -> None:
    q, k, v, *gates, state = inputs(rule, T, dtype=dtype)
    _, after = run(module, rule, [q, k, v, *(torch.zeros_like(x) for x in gates), state])
    assert torch.equal(after, state)


@pytest.mark.parametrize("module", [naive, chunked, step], ids=["naive", "chunked", "step"])
@pytest.mark.parametrize("rule", RULES)
def test_inputs_are_not_changed(rule: str, module: ModuleType) -> None:
    # One head and one row: slices and reorderings are then views of the inputs, so writing to them would show.
    tensors = inputs(rule, 1 if module is step else 64, H=1, G=1, B=1)
    before = [x.clone() for x in tensors]
    with torch.no_grad():
        _, state = run(module, rule, tensors)
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))
    assert state.data_ptr() != tensors[-1].data_ptr()


STRONG = {
    "-50": lambda g: torch.full_like(g, -50.0),
    "-1e4": lambda g: torch.full_like(g, -1e4),
    "-inf": lambda g: torch.full_like(g, -math.inf),
    "resets-among-mild": lambda g: torch.where(torch.arange(g.shape[1])[:, None] % 5 == 2, -1e4, 0.1 * g),
    "one-reset": lambda g: torch.where(torch.arange(g.shape[1])[:, None] == 3, -1e4, 0.01 * g),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)], ids=["f64", "f32"])
@pytest.mark.parametrize("strong", STRONG)
@pytest.mark.parametrize("rule", ["gated_delta_rule", "state_space"])
def test_strong_decays(rule: str, strong: str, dtype: torch.dtype, tolerance: float) -> None:
    tensors = inputs(rule, 40, dtype=dtype)
    tensors[3] = STRONG[strong](tensors[3])
    got = run(chunked, rule, tensors) + gradients(chunked, rule, tensors)
    assert all(x.isfinite().all() for x in got)
    if strong != "-inf":  # the loop itself has no gradient there
        assert_same(got, run(naive, rule, tensors) + gradients(naive, rule, tensors), tolerance)
    else:
        assert_same(got[:2], run(naive, rule, tensors), tolerance)


@pytest.mark.parametrize("rule", ["gated_delta_rule", "delta_rule"])
def test_the_same_key_again_and_again(rule: str) -> None:
    # The hardest system to invert: every key overlaps fully with every other.
    q, k, v, *gates, beta, state = inputs(rule, 130, dtype=torch.float32)
    tensors = [q, k[:, :1].expand_as(k), v, *(0 * g for g in gates), torch.full_like(beta, 0.99), state]
    assert_same(run(chunked, rule, tensors), run(naive, rule, tensors), 1e-4)


@pytest.mark.parametrize("T", [1, 40], ids=["step", "chunked"])
@pytest.mark.parametrize("rule", RULES)
def test_half_precision_inputs_compute_in_float32(rule: str, T: int) -> None:
    tensors = inputs(rule, T, dtype=torch.bfloat16)
    o, state = run(ops, rule, tensors)
    assert o.dtype == state.dtype == torch.float32
    assert_same((o, state), run(naive, rule, [x.float() for x in tensors]), 1e-5)


@pytest.mark.parametrize("T", [1, 40], ids=["step", "chunked"])
@pytest.mark.parametrize("rule", RULES)
def test_autocast_does_not_lower_the_precision(rule: str, T: int) -> None:
    tensors = inputs(rule, T, dtype=torch.float32)
    expected = run(ops, rule, tensors)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(run(ops, rule, tensors), expected, 0.0)


@pytest.mark.parametrize("T", [1, 40], ids=["step", "chunked"])
@pytest.mark.parametrize("rule", RULES)
def test_inputs_of_any_layout(rule: str, T: int) -> None:
    tensors = inputs(rule, T)
    strided = [x.movedim(0, -1).contiguous().movedim(-1, 0) for x in tensors]
    assert_same(run(ops, rule, strided), run(ops, rule, tensors), 1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)], ids=["f32", "bf16"])
@pytest.mark.parametrize("T", [1, 40, 65, 130], ids=lambda T: f"{T}tokens")
@pytest.mark.parametrize("rule", RULES)
def test_cuda_equals_naive_with_gradients(rule: str, T: int, dtype: torch.dtype, tolerance: float) -> None:
    *rounded, state = inputs(rule, T, dtype=dtype)
    # The reference starts from the same rounded numbers; the state is float32 on every path.
    on_cpu, on_gpu = (
        [*(x.double() for x in rounded), state.double()],
        [x.cuda() for x in rounded] + [state.cuda().float()],
    )
    for call in (run, gradients):
        got = tuple(x.cpu().double() for x in call(ops, rule, on_gpu))
        expected = call(naive, rule, on_cpu)
        for x, y in zip(got, expected, strict=True):
            assert (x - y).norm() <= tolerance * y.norm()
