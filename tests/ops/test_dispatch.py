"""Which backend a call runs on, how fla is called, and what wrong shapes are told."""

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from ahn import ops
from ahn.errors import ConfigError, ShapeError
from ahn.ops import chunked, cuda, grouped, naive, step


class OnCuda(Tensor):
    """A CPU tensor that says it lives on a GPU."""

    is_cuda = True  # type: ignore[assignment]


def tensors(T: int = 3, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    B, H, G, K, V = 2, 4, 2, 8, 6
    torch.manual_seed(0)
    return {
        "q": torch.randn(B, T, H, K, dtype=dtype),
        "k": 0.3 * torch.randn(B, T, G, K, dtype=dtype),
        "v": torch.randn(B, T, G, V, dtype=dtype),
        "g": -torch.rand(B, T, H),
        "beta": torch.rand(B, T, H),
        "state": torch.randn(B, H, K, V),
    }


def pick(given: dict[str, Tensor], kind: type[Tensor] = Tensor) -> object:
    return ops._pick(*(x.as_subclass(kind) for x in given.values()))


@pytest.fixture
def fla(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """A stand-in for fla that records its calls and answers with the loop over tokens."""
    calls: list[dict[str, Any]] = []

    def kernel(name: str) -> Any:
        def call(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
            calls.append({"name": name, "q": q, "k": k, "v": v, **options})
            if not name.endswith("simple_gla"):
                g = options.get("g", torch.zeros_like(options["beta"]))
                o, state = naive.gated_delta_rule(q, k, v, g, options["beta"], options["initial_state"])
                return o.to(v.dtype), state
            ones = torch.ones_like(options["g"])
            o, state = naive.state_space(q, k, v, options["g"], ones, options["initial_state"].mT)
            return o.to(v.dtype), state.mT

        return call

    for rule in ("gated_delta_rule", "delta_rule", "simple_gla"):
        module = ModuleType(f"fla.ops.{rule}")
        for form in ("chunk", "fused_recurrent"):
            setattr(module, f"{form}_{rule}", kernel(f"{form}_{rule}"))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for package in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, package, ModuleType(package))
    cuda._module.cache_clear()
    yield calls
    cuda._module.cache_clear()


@pytest.fixture
def no_fla(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for rule in ("gated_delta_rule", "delta_rule", "simple_gla"):
        monkeypatch.setitem(sys.modules, f"fla.ops.{rule}", None)
    cuda._module.cache_clear()
    yield
    cuda._module.cache_clear()


@pytest.mark.parametrize(("T", "expected"), [(0, chunked), (1, step), (2, chunked)], ids=["0", "1", "2"])
def test_cpu_tensors_choose_by_length(T: int, expected: ModuleType) -> None:
    assert pick(tensors(T)) is expected


def test_gradients_on_a_cpu_choose_groups() -> None:
    given = tensors()
    given["q"].requires_grad_()
    assert pick(given) is grouped
    with torch.no_grad():
        assert pick(given) is chunked
    with ops.backend("grouped"), torch.no_grad():
        assert pick(given) is grouped


def test_cpu_tensors_never_reach_fla(fla: list[dict[str, Any]]) -> None:
    ops.gated_delta_rule(*tensors().values())
    assert fla == []


def test_cuda_tensors_choose_fla(fla: list[dict[str, Any]]) -> None:
    assert pick(tensors(2), OnCuda) is cuda
    assert pick(tensors(1), OnCuda) is step


def test_cuda_tensors_without_fla_run_in_plain_torch(no_fla: None) -> None:
    assert pick(tensors(), OnCuda) is chunked


def test_backend_holds_inside_its_block_only() -> None:
    given = tensors()
    with ops.backend("naive"):
        assert pick(given) is naive
        with ops.backend("chunked"):
            assert pick(given) is chunked
        assert pick(given) is naive
    assert pick(given) is chunked


def test_backend_ends_after_an_error() -> None:
    with pytest.raises(RuntimeError), ops.backend("naive"):
        raise RuntimeError
    assert pick(tensors()) is chunked


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'triton'.*auto, naive, chunked, grouped, compiled"), ops.backend("triton"):
        pass


def test_forced_cuda_says_what_is_missing(no_fla: None) -> None:
    with ops.backend("cuda"):
        with pytest.raises(ConfigError, match="needs tensors on a CUDA device, got cpu"):
            ops.gated_delta_rule(*tensors().values())
        with pytest.raises(ConfigError, match="pip install"):
            pick(tensors(), OnCuda)


@pytest.mark.parametrize("rule", ["gated_delta_rule", "delta_rule", "state_space"])
@pytest.mark.parametrize(
    ("T", "dtype", "form"),
    [(3, torch.float32, "fused_recurrent"), (3, torch.bfloat16, "fused_recurrent"), (70, torch.bfloat16, "chunk")],
    ids=["short-f32", "short-bf16", "long-bf16"],
)
def test_fla_is_called_as_it_expects(
    fla: list[dict[str, Any]], rule: str, T: int, dtype: torch.dtype, form: str
) -> None:
    arguments = tensors(T, dtype)
    if rule == "delta_rule":
        del arguments["g"]
    if rule == "state_space":
        arguments["state"] = arguments["state"].mT
    o, state = getattr(cuda, rule)(*arguments.values())

    (call,) = fla
    assert call["name"] == f"{form}_{'simple_gla' if rule == 'state_space' else rule}"
    assert call["scale"] == 1.0
    assert call["output_final_state"] is True
    assert call["initial_state"].shape == (2, 4, 8, 6)
    assert call["initial_state"].dtype == torch.float32
    assert call["initial_state"].is_contiguous()
    assert call["k"].shape == (2, T, 4, 8)
    assert call["v"].shape == (2, T, 4, 6)
    assert {call[x].dtype for x in "qkv"} == {dtype if form == "chunk" else torch.float32}

    expected_o, expected_state = getattr(naive, rule)(*arguments.values())
    assert o.dtype == state.dtype == torch.float32
    tolerance = 0.1 if form == "chunk" else 1e-5  # values are rounded to half precision on their way in and out
    torch.testing.assert_close(o, expected_o, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(state, expected_state, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    ("T", "dtype", "differentiated"),
    [(70, torch.float32, False), (3, torch.float32, True), (3, torch.float64, False), (0, torch.bfloat16, False)],
    ids=["long-f32", "gradients-f32", "float64", "no-tokens"],
)
def test_what_fla_cannot_do_runs_in_plain_torch(
    fla: list[dict[str, Any]], T: int, dtype: torch.dtype, differentiated: bool
) -> None:
    arguments = tensors(T, dtype)
    arguments["k"].requires_grad_(differentiated)
    got = cuda.gated_delta_rule(*arguments.values())
    assert fla == []
    torch.testing.assert_close(got, chunked.gated_delta_rule(*arguments.values()))


def test_gradients_in_half_precision_use_the_kernel_that_has_them(fla: list[dict[str, Any]]) -> None:
    arguments = tensors(3, torch.bfloat16)
    arguments["k"].requires_grad_()
    cuda.gated_delta_rule(*arguments.values())
    assert fla[0]["name"] == "chunk_gated_delta_rule"


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("q", (2, 3, 4), r"q must have 4 dimensions .* got \[2, 3, 4\]"),
        ("q", (2, 3, 5, 8), "q has 5 heads, which is no multiple of the 2 kv heads"),
        ("k", (2, 3, 2, 7), r"k must be \[2, 3, 2, 8\] .* got \[2, 3, 2, 7\]"),
        ("v", (2, 4, 2, 6), r"v must be \[2, 3, 2, 6\] .* got \[2, 4, 2, 6\]"),
        ("g", (2, 3, 2), r"g must be \[2, 3, 4\] .* got \[2, 3, 2\]"),
        ("beta", (2, 4, 3), r"beta must be \[2, 3, 4\] .* got \[2, 4, 3\]"),
        ("state", (2, 4, 6, 8), r"state must be \[2, 4, 8, 6\] .*key, value\]\), got \[2, 4, 6, 8\]"),
    ],
    ids=["q-dims", "q-heads", "k-size", "v-tokens", "g-kv-heads", "beta-transposed", "state-transposed"],
)
def test_wrong_shapes_are_named(name: str, shape: tuple[int, ...], message: str) -> None:
    arguments = tensors() | {name: torch.zeros(shape)}
    with pytest.raises(ShapeError, match=message) as caught:
        ops.gated_delta_rule(*arguments.values())
    assert "\n" not in str(caught.value)


def test_state_space_expects_values_first() -> None:
    with pytest.raises(ShapeError, match=r"state must be \[2, 4, 6, 8\] .*value, key"):
        ops.state_space(*tensors().values())
