"""Every kernel in C computes what the plain loop or the spelled-out softmax does, in float64."""

import contextlib
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ahn import native, ops
from ahn.errors import ShapeError
from ahn.memories import MemoryShape, build_memory
from ahn.native import Segment, recurrence
from ahn.tokens import Attended

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=f"no kernels here: {native.why_not()}")

RULES = ["gated_delta_rule", "delta_rule", "state_space"]


def inputs(rule: str, T: int, H: int, G: int, K: int, V: int, B: int = 2) -> list[Tensor]:
    random = torch.Generator().manual_seed(T * 1000 + H * 100 + V)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    q, k, v = F.normalize(normal(B, T, H, K), dim=-1), F.normalize(normal(B, T, G, K), dim=-1), normal(B, T, G, V)
    g, strength = -F.softplus(normal(B, T, H)), torch.sigmoid(normal(B, T, H))
    state = normal(B, H, V, K) if rule == "state_space" else normal(B, H, K, V)
    return [q, k, v, *([strength] if rule == "delta_rule" else [g, strength]), state]


def run(name: str, rule: str, tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    with ops.backend(name):
        return getattr(ops, rule)(*tensors)


def assert_equal_naive(rule: str, tensors: list[Tensor], tolerance: float = 2e-5) -> None:
    expected = run("naive", rule, [x.double() for x in tensors])
    for got, wanted in zip(run("compiled", rule, tensors), expected, strict=True):
        torch.testing.assert_close(got, wanted.float(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("T", [1, 2, 31, 32, 33, 64, 130])
@pytest.mark.parametrize(("H", "G", "K", "V"), [(2, 2, 16, 16), (6, 2, 24, 32), (3, 1, 7, 48), (4, 4, 64, 64)])
@pytest.mark.parametrize("rule", RULES)
def test_recurrences(rule: str, T: int, H: int, G: int, K: int, V: int) -> None:
    assert_equal_naive(rule, inputs(rule, T, H, G, K, V))


def gradients(name: str, rule: str, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of a fixed mix of outputs and final state with respect to every input."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    results = run(name, rule, leaves)
    mix = [torch.linspace(-1, 3, x.numel(), dtype=x.dtype).cos().view(x.shape) for x in results]
    return torch.autograd.grad(results, leaves, mix)


def assert_slopes_equal_naive(rule: str, tensors: list[Tensor], tolerance: float = 3e-5) -> None:
    expected = gradients("naive", rule, [x.double() for x in tensors])
    for got, wanted in zip(gradients("grouped", rule, tensors), expected, strict=True):
        torch.testing.assert_close(got, wanted.float(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("T", [1, 2, 31, 32, 33, 64, 130])
@pytest.mark.parametrize(("H", "G", "K", "V"), [(2, 2, 16, 16), (6, 2, 24, 32), (3, 1, 7, 48), (4, 4, 64, 64)])
@pytest.mark.parametrize("rule", RULES)
def test_gradients_of_recurrences(rule: str, T: int, H: int, G: int, K: int, V: int) -> None:
    assert_slopes_equal_naive(rule, inputs(rule, T, H, G, K, V))


@pytest.mark.parametrize("rule", RULES)
def test_gradients_over_several_groups(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ahn.ops._chunks._CPU_ELEMENTS_PER_THREAD", 1)
    assert_slopes_equal_naive(rule, inputs(rule, 130, 4, 2, 16, 16))


@pytest.mark.parametrize("rule", RULES)
def test_gradients_of_any_layout(rule: str) -> None:
    tensors = inputs(rule, 40, 4, 2, 16, 16)
    assert_slopes_equal_naive(rule, [x.movedim(0, -1).contiguous().movedim(-1, 0) for x in tensors])


@pytest.mark.parametrize("rule", ["gated_delta_rule", "state_space"])
@pytest.mark.parametrize("decay", [-50.0, -1e4])
def test_gradients_at_strong_decays(rule: str, decay: float) -> None:
    tensors = inputs(rule, 70, 2, 2, 16, 16)
    tensors[3] = torch.where(torch.arange(70)[:, None] % 7 == 3, decay, 0.1 * tensors[3])
    assert_slopes_equal_naive(rule, tensors, 1e-4)


@pytest.mark.parametrize("rule", ["gated_delta_rule", "state_space"])
def test_gradients_are_finite_where_the_state_is_cleared(rule: str) -> None:
    """The loop has no gradient there; the chunked form has."""
    tensors = inputs(rule, 70, 2, 2, 16, 16)
    tensors[3] = torch.where(torch.arange(70)[:, None] % 7 == 3, -math.inf, 0.1 * tensors[3])
    expected = gradients("chunked", rule, [x.double() for x in tensors])
    for got, wanted in zip(gradients("grouped", rule, tensors), expected, strict=True):
        torch.testing.assert_close(got, wanted.float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rule", RULES)
def test_recurrences_of_any_layout(rule: str) -> None:
    tensors = inputs(rule, 40, 4, 2, 16, 16)
    assert_equal_naive(rule, [x.movedim(0, -1).contiguous().movedim(-1, 0) for x in tensors])


@pytest.mark.parametrize("rule", RULES)
def test_recurrences_without_tokens_or_state(rule: str) -> None:
    *tensors, state = inputs(rule, 33, 2, 1, 16, 16)
    assert_equal_naive(rule, [*tensors, torch.zeros_like(state)])
    torch.testing.assert_close(
        run("compiled", rule, tensors), run("compiled", rule, [*tensors, torch.zeros_like(state)]), atol=0, rtol=0
    )
    o, after = run("compiled", rule, [*(x[:, :0] for x in tensors), state])
    assert o.shape == (2, 0, 2, 16)
    assert torch.equal(after, state)
    assert after.data_ptr() != state.data_ptr()


@pytest.mark.parametrize("rule", ["gated_delta_rule", "state_space"])
@pytest.mark.parametrize("decay", [-50.0, -1e4, -math.inf])
def test_strong_decays(rule: str, decay: float) -> None:
    tensors = inputs(rule, 70, 2, 2, 16, 16)
    tensors[3] = torch.where(torch.arange(70)[:, None] % 7 == 3, decay, 0.1 * tensors[3])
    assert_equal_naive(rule, tensors)


@pytest.mark.parametrize("rule", RULES)
def test_zero_gates_leave_the_state_bit_identical(rule: str) -> None:
    q, k, v, *gates, state = inputs(rule, 65, 2, 2, 16, 16)
    _, after = run("compiled", rule, [q, k, v, *(torch.zeros_like(x) for x in gates), state])
    assert torch.equal(after, state)


def test_the_same_key_again_and_again() -> None:
    q, k, v, g, beta, state = inputs("gated_delta_rule", 130, 2, 2, 16, 16)
    same = k[:, :1].expand_as(k)
    assert_equal_naive("gated_delta_rule", [q, same, v, 0 * g, torch.full_like(beta, 0.99), state], 1e-4)


@pytest.mark.parametrize("B", [1, 3])
def test_a_decoded_token(memory: str, B: int) -> None:
    torch.manual_seed(0)
    shape = MemoryShape(24, 6, 2, 32, 16)
    memories = [build_memory(memory, shape) for _ in range(3)]
    for each in memories:
        torch.nn.init.normal_(each.o_proj)
    k, v = torch.randn(3, B, 2, 32), torch.randn(3, B, 2, 16)
    gates = torch.stack([each.gates(torch.randn(B, 1, 24))[:, 0] for each in memories]).detach()
    state = torch.randn(3, B, *memories[0].state_shape())
    q, x, local = torch.randn(B, 6, 1, 32), torch.randn(B, 1, 24), torch.randn(B, 1, 6, 16)
    log_sum = torch.randn(B, 1, 6)

    def decode() -> tuple[Tensor, Tensor]:
        after = state.clone()
        type(memories[0]).update(memories, k, v, gates, after)
        return after, memories[1].decode_add(Attended(local.clone(), log_sum), q.transpose(1, 2), x, after[1])

    with torch.no_grad():
        got = decode()
        with native.switched_off():
            expected = decode()
    for mine, other in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)
    assert not torch.equal(got[1], local)


def test_a_decoded_token_of_rows_that_lie_anywhere(memory: str) -> None:
    """The states of some rows of larger tensors are written where they lie, and no other number is touched."""
    torch.manual_seed(1)
    shape, rows = MemoryShape(24, 6, 2, 32, 16), torch.tensor([4, 0, 3])
    memories = [build_memory(memory, shape) for _ in range(2)]
    for each in memories:
        torch.nn.init.normal_(each.o_proj)
    k, v = torch.randn(2, 3, 2, 32), torch.randn(2, 3, 2, 16)
    gates = torch.stack([each.gates(torch.randn(3, 1, 24))[:, 0] for each in memories]).detach()
    sizes = memories[0].state_shape()
    pages = torch.randn(2, 6, math.prod(sizes) + 7)
    q, x, local = torch.randn(3, 1, 6, 32), torch.randn(3, 1, 24), torch.randn(3, 1, 6, 16)
    log_sum = torch.randn(3, 1, 6)
    dense = pages[:, rows, :-7].unflatten(2, sizes).contiguous()
    with torch.no_grad():
        type(memories[0]).update(memories, k, v, gates, dense)
        expected = memories[1].decode_add(Attended(local.clone(), log_sum), q, x, dense[1])
        for off in (False, True):
            after = pages.clone()
            state = after[:, :, :-7].unflatten(2, sizes)
            with native.switched_off() if off else contextlib.nullcontext():
                type(memories[0]).update(memories, k, v, gates, state, rows)
                got = memories[1].decode_add(Attended(local.clone(), log_sum), q, x, state[1], rows)
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(state[:, rows], dense, atol=1e-5, rtol=1e-5)
            others = [row for row in range(6) if row not in rows]
            assert torch.equal(after[:, others], pages[:, others])
            assert torch.equal(after[..., -7:], pages[..., -7:])


@pytest.mark.parametrize("per_head", [True, False], ids=["norm-per-head", "norm-over-heads"])
@pytest.mark.parametrize("key_first", [True, False], ids=["key-first", "value-first"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(("K", "V"), [(32, 16), (16, 48)], ids=str)
def test_an_answer_in_float64(per_head: bool, key_first: bool, bias: bool, K: int, V: int) -> None:
    """Kind of norm and layout of the state are independent of each other; the sum is spelled out."""
    torch.manual_seed(K + 2 * per_head + key_first)
    B, H, D = 3, 6, 24
    local, q, x = torch.randn(B, 1, H, V), torch.randn(B, 1, H, K), torch.randn(B, 1, D)
    state_BHKV = torch.randn(B, H, K, V)
    gate, gate_bias, norm, o_proj = (
        torch.randn(*shape) for shape in ((H, D), (H,), (V if per_head else H * V,), (H, V, V))
    )
    weights = ops.OutputWeights(gate, gate_bias if bias else None, norm, o_proj, 0.3, per_head, key_first)
    out, state = local.clone(), state_BHKV if key_first else state_BHKV.mT.contiguous()
    assert ops.decode_add_(out, q, x, state, weights)

    q_BHK, x_BD, o_HVV = q.double()[:, 0], x.double()[:, 0], o_proj.double()
    unit_BHK = q_BHK / (q_BHK.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    read_BHV = 0.3 * (unit_BHK[..., None] * state_BHKV.double()).sum(-2)
    gate_BH1 = F.silu(x_BD @ gate.double().T + (gate_bias.double() if bias else 0))[..., None]
    if per_head:
        rms_BH1 = (read_BHV.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        normed_BHV = read_BHV / rms_BH1 * norm.double() * gate_BH1
    else:
        gated_BHV = read_BHV * gate_BH1
        rms_B11 = (gated_BHV.square().mean((-2, -1), keepdim=True) + 1e-5).sqrt()
        normed_BHV = gated_BHV / rms_B11 * norm.double().view(H, V)
    expected = local.double()[:, 0] + (normed_BHV[..., None] * o_HVV).sum(-2)
    torch.testing.assert_close(out[:, 0].double(), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("G", [6, 2])
def test_a_token_of_any_layout_is_written(G: int) -> None:
    torch.manual_seed(0)
    k, v = (torch.randn(16, G, 3).permute(2, 1, 0) for _ in range(2))
    decay, write = (torch.rand(6, 3).T for _ in range(2))
    for rule in (ops.write_delta_, ops.write_state_space_):
        state = torch.randn(3, 6, 16, 16)
        expected = state.clone()
        rule(k, v, decay, write, state)
        with native.switched_off():
            rule(k, v, decay, write, expected)
        torch.testing.assert_close(state, expected, atol=1e-5, rtol=1e-5)


def softmax(segments: list[Segment], allowed: list[Tensor], scaling: float) -> tuple[Tensor, Tensor]:
    """The softmax spelled out in float64, and its log-sum; `allowed` is `[B or 1, T, N]` for each segment."""
    scores, values = [], []
    for segment, mask in zip(segments, allowed, strict=True):
        repeats = segment.queries.size(1) // segment.keys.size(1)
        keys, value = (x.double().repeat_interleave(repeats, 1) for x in (segment.keys, segment.values))
        score = scaling * segment.queries.double() @ keys.mT
        if segment.mask is not None:
            score = score + segment.mask.double()[:, None, None]
        scores.append(score.masked_fill(~mask[:, None], -math.inf))
        values.append(value)
    all_scores = torch.cat(scores, -1)
    return (all_scores.softmax(-1) @ torch.cat(values, 2)).transpose(1, 2), all_scores.logsumexp(-1).transpose(1, 2)


def check_attention(attend: Any, segments: list[Segment], seen: int, expected: tuple[Tensor, Tensor]) -> None:
    """Output and log-sum of a kernel; the output is the same where no log-sum is asked for."""
    log_sum = torch.empty(expected[1].shape)
    got = attend(segments, seen, 0.3, log_sum)
    torch.testing.assert_close(got, expected[0].float(), atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(log_sum, expected[1].float(), atol=2e-5, rtol=2e-5)
    assert torch.equal(attend(segments, seen, 0.3), got)


@pytest.mark.parametrize("heads", [(2, 2), (3, 1), (6, 2), (10, 2), (64, 1)], ids=str)
@pytest.mark.parametrize(
    ("T", "seen", "window"), [(1, 40, 16), (70, 0, 16), (3, 7, 300), (130, 500, 300), (33, 90, 64)]
)
def test_many_queries(heads: tuple[int, int], T: int, seen: int, window: int) -> None:
    torch.manual_seed(T)
    (H, G), B, K, V, S = heads, 2, 32, 48, 5
    sinks, first = min(S, seen + T), max(S, seen - window + 1)
    local, extra = max(0, seen + T - first), 37
    near = torch.randn(B, T, H, K).transpose(1, 2)
    far = torch.randn(B, T, H, K).transpose(1, 2)
    visible_from = torch.randint(0, seen + T + 1, (B, extra))
    visible_until = visible_from + torch.randint(0, T + 9, (B, extra))

    def held(count: int) -> tuple[Tensor, Tensor]:  # not dense, as they come from a model
        return torch.randn(B, count, G, K).transpose(1, 2), torch.randn(B, count, G, V).transpose(1, 2)

    segments = [
        Segment(far, *held(sinks)),
        Segment(far, *held(extra), visible=(visible_from, visible_until)),
        Segment(near, *held(local), first=first, window=window),
    ]
    query = torch.arange(seen, seen + T)[:, None]
    key = torch.arange(first, first + local)
    allowed = [
        (torch.arange(sinks) <= query)[None],
        (visible_from[:, None] <= query) & (query < visible_until[:, None]),
        ((key <= query) & (key > query - window))[None],
    ]
    check_attention(native.attend, segments, seen, softmax(segments, allowed, 0.3))


@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (3, 1), (8, 2), (10, 2)], ids=str)
@pytest.mark.parametrize("slots", [1, 7, 255, 256, 257, 600])
def test_a_single_query(heads: tuple[int, int], slots: int) -> None:
    torch.manual_seed(slots)
    (H, G), B, K, V, S = heads, 2, 32, 48, min(5, slots)
    near, far = torch.randn(B, H, 1, K), torch.randn(B, H, 1, K)
    keys, values = torch.randn(B, G, 700, K), torch.randn(B, G, 700, V)
    mask = torch.where(torch.rand(B, slots) < 0.3, -math.inf, 0.0)
    mask[:, 0] = 0.0
    visible_from = torch.randint(0, 100, (1, 40))
    segments = [
        Segment(far, keys[:, :, :S], values[:, :, :S], mask=mask[:, :S]),
        Segment(near, keys[:, :, S:slots], values[:, :, S:slots], mask=mask[:, S:]),
        Segment(far, torch.randn(B, G, 40, K), torch.randn(B, G, 40, V), visible=(visible_from, visible_from + 30)),
    ]
    everything = torch.ones(1, 1, slots, dtype=torch.bool)
    allowed = [everything[..., :S], everything[..., S:], ((visible_from <= 60) & (visible_from + 30 > 60))[:, None]]
    check_attention(native.attend_one, segments, 60, softmax(segments, allowed, 0.3))


@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (10, 2)], ids=str)
def test_a_single_query_of_rows_that_lie_anywhere(heads: tuple[int, int]) -> None:
    """Each row of the batch has its own place and its own number of keys; what lies beyond them is never read."""
    torch.manual_seed(3)
    (H, G), K, V, S, N = heads, 32, 48, 5, 600
    near, far = torch.randn(4, H, 1, K), torch.randn(4, H, 1, K)
    rows, counts = torch.tensor([6, 0, 3, 4]), torch.tensor([600, 3, 257, 5])
    pages = torch.full((7, G * N * (K + V) + 9), math.nan)  # as they lie in the block of a request
    keys, values = pages[:, : G * N * K].view(7, G, N, K), pages[:, G * N * K : -9].view(7, G, N, V)
    for row, count in zip(rows, counts, strict=True):
        keys[row, :, :count], values[row, :, :count] = torch.randn(G, count, K), torch.randn(G, count, V)
    sinks = counts.clamp(max=S)
    parts = (far, slice(0, S), sinks), (near, slice(S, None), counts - sinks)
    segments = [Segment(q, keys[:, :, p], values[:, :, p], rows=rows, counts=count) for q, p, count in parts]
    own = [Segment(q, keys[rows][:, :, p].nan_to_num(), values[rows][:, :, p].nan_to_num()) for q, p, _ in parts]
    allowed = [(torch.arange(part.keys.size(2)) < count[:, None])[:, None] for part, (*_, count) in zip(own, parts)]
    check_attention(native.attend_one, segments, 0, softmax(own, allowed, 0.3))


@pytest.mark.parametrize("huge", [1e4, -1e4])
def test_scores_of_any_size(huge: float) -> None:
    queries, keys, values = torch.full((1, 1, 1, 16), huge), torch.randn(1, 1, 300, 16), torch.randn(1, 1, 300, 16)
    everything = [torch.ones(1, 1, 300, dtype=torch.bool)]
    for attend in (native.attend, native.attend_one):
        segments = [Segment(queries, keys, values)]
        expected = softmax(segments, everything, 1.0)[0].float()
        torch.testing.assert_close(attend(segments, 500, 1.0), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("what", ["key", "value", "query"])
def test_what_is_not_a_number_shows(what: str) -> None:
    tensors = {
        "query": torch.randn(1, 1, 1, 16),
        "key": torch.randn(1, 1, 300, 16),
        "value": torch.randn(1, 1, 300, 16),
    }
    tensors[what][0, 0, 0, 3] = math.nan
    for attend in (native.attend, native.attend_one):
        assert attend([Segment(*tensors.values())], 500, 1.0).isnan().any()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize(("D", "N"), [(8, 1), (32, 7), (576, 64), (64, 131)])
def test_linear_maps(rows: int, D: int, N: int, bias: bool) -> None:
    torch.manual_seed(N)
    linear, x = torch.nn.Linear(D, N, bias=bias), torch.randn(1, rows, 2 * D)[..., ::2]
    with torch.no_grad():
        got = native.linear(x, linear.weight, linear.bias)
        torch.testing.assert_close(got, linear(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("N", [1, 9, 70])
def test_linear_maps_of_several_layers(rows: int, N: int) -> None:
    torch.manual_seed(N)
    x, weights = torch.randn(3, rows, 24), [torch.randn(N, 24) for _ in range(6)]
    got = native.linear_each(x, weights)
    for layer in range(3):
        for each in range(2):
            expected = x[layer] @ weights[2 * layer + each].T
            torch.testing.assert_close(got[layer, each], expected, atol=1e-5, rtol=1e-5)


def test_threads_change_nothing() -> None:
    torch.manual_seed(0)
    segments = [Segment(torch.randn(1, 6, 100, 32), torch.randn(1, 2, 400, 32), torch.randn(1, 2, 400, 32))]
    tensors = inputs("gated_delta_rule", 70, 4, 2, 16, 16)
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            found.append((native.attend(segments, 300, 0.2), *run("compiled", "gated_delta_rule", tensors)))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


B, T, H, G, K, V, D = 2, 3, 4, 2, 16, 32, 24
SHAPES = {
    "scan": {
        "q": (B, T, H, K),
        "k": (B, T, G, K),
        "v": (B, T, G, V),
        "g": (B, T, H),
        "beta": (B, T, H),
        "s": (B, H, K, V),
    },
    "write_delta_": {"k": (6, K), "v": (6, V), "decay": (6,), "write": (6,), "s": (6, K, V)},
    "write_state_space_": {"k": (6, K), "v": (6, V), "decay": (6,), "step": (6,), "s": (6, V, K)},
    "decode_add_": {
        "local": (B, 1, H, V),
        "q": (B, 1, H, K),
        "x": (B, 1, D),
        "s": (B, H, K, V),
        "gate": (H, D),
        "bias": (H,),
        "norm": (V,),
        "o_proj": (H, V, V),
    },
    "linear": {"x": (3, K), "weight": (5, K), "bias": (5,)},
    "attend": {
        "q": (B, H, T, K),
        "k": (B, G, 7, K),
        "v": (B, G, 7, V),
        "visible_from": (B, 7),
        "visible_until": (B, 7),
        "mask": (B, 7),
    },
}


def run_kernel(kernel: str, tensors: dict[str, Tensor]) -> None:
    given = list(tensors.values())
    if kernel == "decode_add_":
        native.decode_add_(*given[:4], native.OutputWeights(*given[4:], 1.0, per_head=True, key_first=True))
    elif kernel == "attend":
        segment = Segment(*given[:3], visible=(given[3].long(), given[4].long()), mask=given[5])
        first = (torch.rand(SHAPES[kernel][name]) for name in "qkv")
        native.attend([Segment(*first), segment], 7, 1.0)
    else:
        getattr(recurrence if kernel.startswith("scan") else native, kernel)(*given)


@pytest.mark.parametrize(("kernel", "name"), [(kernel, name) for kernel in SHAPES for name in ["", *SHAPES[kernel]]])
def test_a_tensor_of_another_shape_is_refused(kernel: str, name: str) -> None:
    """Empty ones too, of which a kernel would read what lies at address 0."""
    tensors = {key: torch.rand(shape) for key, shape in SHAPES[kernel].items()}
    run_kernel(kernel, tensors)
    if name:
        shape = SHAPES[kernel][name]
        rows = [] if name == "x" and kernel == "linear" else [(0, *shape[1:])]  # no vectors are no mistake
        for other in (*rows, (*shape[:-1], 0), (*shape[:-1], shape[-1] + 16)):
            with pytest.raises(ShapeError):
                run_kernel(kernel, {**tensors, name: torch.rand(other)})
