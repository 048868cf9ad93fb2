"""The kernels of linearised attention compute what its torch form does in float64."""

import contextlib
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ahn import native, ops
from ahn.errors import ShapeError
from ahn.memories import MemoryShape, build_memory
from ahn.memories.linearized_attention import LinearizedAttention
from ahn.native import linearized
from ahn.tokens import Attended

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=f"no kernels here: {native.why_not()}")

SHAPES = [MemoryShape(24, 6, 2, 32, 16), MemoryShape(24, 4, 4, 16, 48), MemoryShape(40, 3, 1, 64, 64)]
LAYERS, ROWS = 3, 2


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that run."""
    names: list[str] = []
    run = native._run
    monkeypatch.setattr(native, "_run", lambda name, *arguments: (names.append(name), run(name, *arguments)))
    return names


def memories(shape: MemoryShape) -> list[LinearizedAttention]:
    """Memories in which every parameter counts."""
    torch.manual_seed(shape.query_heads)
    made = [build_memory("linearized_attention", shape) for _ in range(LAYERS)]
    for memory in made:
        for parameter in memory.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return [memory for memory in made if isinstance(memory, LinearizedAttention)]


def token(shape: MemoryShape) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and gates of a token in all layers."""
    _, H, G, K, V = shape
    gates = torch.rand(LAYERS, ROWS, 1, H)
    return torch.randn(LAYERS, ROWS, G, K), torch.randn(LAYERS, ROWS, G, V), gates


def some_state(shape: MemoryShape) -> Tensor:
    """States of all layers after five tokens."""
    mine = memories(shape)
    state = torch.zeros(LAYERS, ROWS, *mine[0].state_shape())
    with torch.no_grad(), native.switched_off():
        for _ in range(5):
            LinearizedAttention.update(mine, *token(shape), state)
    return state


def in_float64(*tensors: Tensor) -> list[Tensor]:
    return [tensor.double() for tensor in tensors]


def written(shape: MemoryShape, tensors: tuple[Tensor, Tensor, Tensor], state: Tensor) -> Tensor:
    """The states after a token, in float64."""
    after, mine = state.double(), [memory.double() for memory in memories(shape)]
    LinearizedAttention.update(mine, *in_float64(*tensors), after)
    return after.float()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.no_grad()
def test_a_token_is_written(calls: list[str], shape: MemoryShape) -> None:
    state, tensors = some_state(shape), token(shape)
    expected, after, former = written(shape, tensors, state), state.clone(), state.clone()
    LinearizedAttention.update(memories(shape), *tensors, after)
    torch.testing.assert_close(after, expected, atol=1e-5, rtol=1e-5)
    beside = torch.full_like(state, math.nan)
    LinearizedAttention.update(memories(shape), *tensors, beside, former_LB=former)
    assert torch.equal(beside, after)
    assert torch.equal(former, state)
    assert calls == ["ahn_write_linearized"] * 2


@pytest.mark.parametrize("layout", ["half precision", "any"])
@torch.no_grad()
def test_a_token_of_any_layout_is_written(calls: list[str], layout: str) -> None:
    shape = SHAPES[0]
    state, tensors = some_state(shape), token(shape)
    if layout == "any":
        tensors = tuple(x.movedim(0, -1).contiguous().movedim(-1, 0) for x in tensors)  # type: ignore[assignment]
    else:
        tensors = tensors[0].bfloat16(), tensors[1].bfloat16(), tensors[2]
    expected = written(shape, tensors, state)
    LinearizedAttention.update(memories(shape), *tensors, state)
    torch.testing.assert_close(state, expected, atol=1e-5, rtol=1e-5)
    assert calls == ["ahn_write_linearized"]


@torch.no_grad()
def test_a_gate_of_zero_leaves_the_state_bit_identical() -> None:
    """As padding has it in some rows, whatever the key."""
    state, (k, v, gates) = some_state(SHAPES[0]), token(SHAPES[0])
    gates[:, 1] = 0
    after = state.clone()
    LinearizedAttention.update(memories(SHAPES[0]), 1e4 * k, v, gates, after)
    assert torch.equal(after[:, 1], state[:, 1])
    assert not torch.equal(after[:, 0], state[:, 0])
    assert after.isfinite().all()


@torch.no_grad()
def test_a_key_that_is_not_a_number_shows() -> None:
    state, (k, v, gates) = some_state(SHAPES[0]), token(SHAPES[0])
    k[1, 0, 0, 3] = math.nan
    LinearizedAttention.update(memories(SHAPES[0]), k, v, gates, state)
    assert state[1, 0, :3].isnan().all()
    assert not state[1, 0, 3:].isnan().any()


@torch.no_grad()
def test_rows_are_written_where_they_lie(calls: list[str]) -> None:
    shape, rows = SHAPES[0], torch.tensor([4, 1])
    sizes, tensors = memories(shape)[0].state_shape(), token(shape)
    pages = torch.randn(LAYERS, 6, math.prod(sizes) + 7)
    after = pages.clone()
    state = after[:, :, :-7].unflatten(2, sizes)
    expected = written(shape, tensors, state[:, rows])
    LinearizedAttention.update(memories(shape), *tensors, state, rows)
    torch.testing.assert_close(state[:, rows], expected, atol=1e-5, rtol=1e-5)
    others = [0, 2, 3, 5]
    assert torch.equal(after[:, others], pages[:, others])
    assert torch.equal(after[..., -7:], pages[..., -7:])
    assert calls == ["ahn_write_linearized"]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [None, [1, 0, 1]], ids=["batch", "rows"])
@torch.no_grad()
def test_an_answer(calls: list[str], shape: MemoryShape, rows: list[int] | None) -> None:
    D, H, _, K, V = shape
    (memory, *_), state = memories(shape), some_state(shape)[0]
    rows_B = None if rows is None else torch.tensor(rows)
    B = ROWS if rows is None else len(rows)
    local, q, x = torch.randn(B, 1, H, V), torch.randn(B, H, 1, K).transpose(1, 2), torch.randn(B, 1, D)
    log_sum = torch.randn(B, H, 1).transpose(1, 2)
    got = memory.decode_add(Attended(local.clone(), log_sum), q, x, state, rows_B)
    assert calls == ["ahn_decode_add_linearized"]
    local_64, *rest = in_float64(local, q, x, state)
    expected = memory.double().decode_add(Attended(local_64, log_sum.double()), *rest, rows_B)
    torch.testing.assert_close(got, expected.float(), atol=2e-5, rtol=2e-5)
    assert (got - local).abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "torch"])
@torch.no_grad()
def test_an_empty_state_adds_nothing(calls: list[str], kernels: bool) -> None:
    """Row by row: the other rows read what they hold."""
    D, H, _, K, V = SHAPES[0]
    (memory, *_), state = memories(SHAPES[0]), some_state(SHAPES[0])[0]
    state[1] = 0
    local, q, x = torch.randn(ROWS, 1, H, V), torch.randn(ROWS, 1, H, K), torch.randn(ROWS, 1, D)
    exact = Attended(local.clone(), torch.randn(ROWS, 1, H))
    with contextlib.nullcontext() if kernels else native.switched_off():
        got = memory.decode_add(exact, q, x, state)
    assert bool(calls) == kernels
    assert torch.equal(got[1], local[1])
    assert not torch.equal(got[0], local[0])
    assert got.isfinite().all()


def test_torch_does_what_the_kernels_cannot(calls: list[str]) -> None:
    """Gradients, float64, sizes that fill no vectors, states that are not dense."""
    for shape, dtype in ((SHAPES[0], torch.float64), (MemoryShape(12, 4, 2, 6, 5), torch.float32)):
        D, H, _, K, V = shape
        mine = [memory.to(dtype) for memory in memories(shape)]
        state = some_state(shape).to(dtype)
        with torch.no_grad():
            LinearizedAttention.update(mine, *(x.to(dtype) for x in token(shape)), state)
            local, q, x = (torch.randn(ROWS, 1, *size, dtype=dtype) for size in ((H, V), (H, K), (D,)))
            mine[0].decode_add(Attended(local, local[..., 0]), q, x, state[0])
    D, H, _, K, V = SHAPES[0]
    state = some_state(SHAPES[0])
    local, q, x = (torch.randn(ROWS, 1, *size) for size in ((H, V), (H, K), (D,)))
    assert memories(SHAPES[0])[0].decode_add(Attended(local, local[..., 0]), q, x, state[0]).requires_grad
    spread = torch.stack((state, state), -1)[..., 0]
    with torch.no_grad():
        LinearizedAttention.update(memories(SHAPES[0]), *token(SHAPES[0]), spread)
        memories(SHAPES[0])[0].decode_add(Attended(local, local[:2, ..., 0]), q, x, spread[0], torch.tensor([0, 1]))
    assert not calls


B, H, G, K, V, D = 2, 4, 2, 16, 32, 24
WRITTEN = {
    "k": (LAYERS, B, G, K),
    "v": (LAYERS, B, G, V),
    "gate": (LAYERS, B, H),
    "mean_query": (LAYERS, H, K),
    "state": (LAYERS, B, H, V + 1, K + 1),
}
READ = {
    "local": (B, 1, H, V),
    "q": (B, 1, H, K),
    "x": (B, 1, D),
    "state": (B, H, V + 1, K + 1),
    "log_sum": (B, 1, H),
    "mean_query": (H, K),
    "share_key": (H, K),
    "gate": (H, D),
    "gate_bias": (H,),
    "size_weight": (H,),
    "match_weight": (H,),
    "exact_weight": (H,),
    "o_proj": (H, V, V),
}


def write(*tensors: Tensor) -> None:
    linearized.write_(*tensors)


def read(*tensors: Tensor) -> None:
    linearized.decode_add_(*tensors[:5], ops.LinearizedWeights(*tensors[5:]))


@pytest.mark.parametrize(("kernel", "shapes"), [(write, WRITTEN), (read, READ)], ids=["write", "read"])
def test_a_tensor_of_another_shape_is_refused(kernel: Callable[..., None], shapes: dict[str, tuple[int, ...]]) -> None:
    """Empty ones too, of which a kernel would read what lies at address 0."""
    tensors = {name: torch.rand(shape) for name, shape in shapes.items()}
    kernel(*tensors.values())
    for name, shape in shapes.items():
        for other in ((0, *shape[1:]), (*shape[:-1], 0), (*shape[:-1], shape[-1] + 16)):
            with pytest.raises(ShapeError):
                kernel(*{**tensors, name: torch.rand(other)}.values())
