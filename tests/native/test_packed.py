"""The kernels for weights in few bits against float64, at odd sizes, and what they refuse."""

from typing import Any

import pytest
import torch

from ahn import native
from ahn.errors import ShapeError
from ahn.native import packed
from ahn.quantization.groups import Groups, pack, round_to_groups, unpack

needs_kernels = pytest.mark.skipif(native.why_not() is not None, reason=f"no kernels here: {native.why_not()}")
pytestmark = needs_kernels
SIZES = [(1, 32, 1), (7, 96, 2), (16, 64, 3), (33, 32, 5), (50, 576, 8), (129, 1536, 4)]


def groups(rows: int, columns: int, bits: Any, size: int = 32, dtype: torch.dtype = torch.float16) -> Groups:
    draw = torch.Generator().manual_seed(rows + columns + bits)
    codes = torch.randint(0, 2**bits, (rows, columns // size, size), generator=draw, dtype=torch.uint8)
    scales, minima = (torch.randn(rows, columns // size, generator=draw) * factor for factor in (0.01, 0.1))
    return Groups(codes, scales.to(dtype), minima.to(dtype))


def exact(parts: Groups) -> torch.Tensor:
    codes, scales, minima = (part.double() for part in parts)
    return (codes * scales[..., None] + minima[..., None]).flatten(1)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("rows", "columns", "vectors"), SIZES)
def test_product_and_unpacking(bits: Any, size: int, dtype: torch.dtype, rows: int, columns: int, vectors: int) -> None:
    parts = groups(rows, columns, bits, size, dtype)
    weight = pack(parts, bits)
    x, bias = torch.randn(vectors, columns), torch.randn(rows)
    expected = x.double() @ exact(parts).T + bias
    torch.testing.assert_close(packed.multiply(x, weight, bias, rows).double(), expected, atol=1e-4, rtol=2e-5)
    torch.testing.assert_close(packed.unpack(weight, 0, rows), exact(parts).float(), atol=1e-7, rtol=1e-6)
    assert torch.equal(packed.multiply(x, weight, None, rows) + bias, packed.multiply(x, weight, bias, rows))


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_from_the_middle(bits: Any) -> None:
    parts = groups(75, 64, bits)
    weight = pack(parts, bits)
    torch.testing.assert_close(packed.unpack(weight, 32, 71), parts.dequantize()[32:71])
    here = torch.tensor([3, 74, 3, 40])
    assert torch.equal(unpack(weight, here // 16, here % 16), parts.dequantize()[here])
    assert torch.equal(unpack(weight, slice(1, 3), slice(None)), parts.dequantize()[16:48])


def test_small_and_large_numbers_of_float16() -> None:
    special = torch.tensor([6e-8, 6e-5, 65504.0, -65504.0, 0.0, 1.0, -3e-7, 2.0]).half()
    parts = Groups(torch.ones(8, 1, 32, dtype=torch.uint8), special[:, None], torch.zeros(8, 1).half())
    assert torch.equal(packed.unpack(pack(parts, 8), 0, 8)[:, 0], special.float())


@pytest.mark.parametrize(("rows", "columns", "vectors"), SIZES)
def test_bfloat16(rows: int, columns: int, vectors: int) -> None:
    weight, x, bias = torch.randn(rows, columns).bfloat16(), torch.randn(vectors, columns), torch.randn(rows)
    expected = x.double() @ weight.double().T + bias
    torch.testing.assert_close(packed.multiply_half(x, weight, bias).double(), expected, atol=5e-5, rtol=5e-5)


def test_not_a_number_stays_where_it_is() -> None:
    x = torch.randn(2, 64)
    x[1, 5] = float("nan")
    out = packed.multiply(x, pack(groups(20, 64, 4), 4), None, 20)
    assert out[0].isfinite().all()
    assert out[1].isnan().all()


class TestRefused:
    weight = pack(round_to_groups(torch.randn(20, 64), 4), 4)

    @pytest.mark.parametrize("x", [torch.randn(1, 65), torch.randn(1, 32)])
    def test_vectors_of_another_size(self, x: torch.Tensor) -> None:
        with pytest.raises(ShapeError):
            packed.multiply(x, self.weight, None, 20)

    @pytest.mark.parametrize(
        "change",
        [
            {"scales": torch.zeros(2, 1, 16).half()},
            {"minima": torch.zeros(2, 2, 16)},
            {"codes": torch.zeros(2, 2, 4, 8, dtype=torch.int32)},
            {"codes": torch.zeros(2, 2, 4, 16)},
            {"bits": 5},
        ],
        ids=lambda change: next(iter(change)),
    )
    def test_a_weight_that_does_not_fit_together(self, change: dict[str, object]) -> None:
        with pytest.raises(ShapeError):
            packed.multiply(torch.randn(1, 64), self.weight._replace(**change), None, 20)  # type: ignore[arg-type]

    @pytest.mark.parametrize(("start", "stop"), [(0, 33), (3, 16), (32, 16), (-16, 4)])
    def test_rows_that_are_not_there(self, start: int, stop: int) -> None:
        with pytest.raises(ShapeError):
            packed.unpack(self.weight, start, stop)

    def test_a_bias_of_another_size(self) -> None:
        with pytest.raises(ShapeError):
            packed.multiply(torch.randn(1, 64), self.weight, torch.zeros(19), 20)

    def test_bfloat16_of_other_sizes(self) -> None:
        with pytest.raises(ShapeError):
            packed.multiply_half(torch.randn(1, 24), torch.randn(4, 24).bfloat16(), None)
        with pytest.raises(ShapeError):
            packed.multiply_half(torch.randn(1, 32), torch.randn(4, 32), None)
