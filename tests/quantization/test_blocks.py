"""Blocks of GGUF files against the reader of gguf: the same numbers, and the same products."""

import gguf
import numpy as np
import pytest
import torch

from ahn.quantization import GroupedWeight
from ahn.quantization.blocks import BLOCKS, groups_of


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("rows", [1, 19])
def test_blocks_are_taken_exactly(kind: str, rows: int) -> None:
    draw = np.random.default_rng(rows)
    blocks = draw.integers(0, 256, (rows, 3, BLOCKS[kind].bytes), dtype=np.uint8)
    for start in {"Q6_K": (208,)}.get(kind, (0, 2) if kind.endswith(("_1", "4_K", "5_K")) else (0,)):
        real = draw.normal(size=(rows, 3, 1)).astype(np.float16) * np.float16(0.01)
        blocks[..., start : start + 2] = real.view(np.uint8)
    flat = blocks.reshape(rows, -1)
    expected = torch.from_numpy(gguf.dequantize(flat, gguf.GGMLQuantizationType[kind]))
    parts, bits = groups_of(flat, kind), BLOCKS[kind].bits
    assert int(parts.codes_NGC.max()) < 2**bits
    stored = GroupedWeight(parts, bits)
    torch.testing.assert_close(stored.dequantize(), expected, atol=1e-6, rtol=1e-6)
    x = torch.randn(2, expected.size(1))
    got = stored.multiply(x, None).double()
    scale = float(expected.abs().max())
    torch.testing.assert_close(got, x.double() @ expected.double().T, atol=1e-4 * scale, rtol=1e-5)


def test_a_minimum_beyond_float16_is_kept_in_float32() -> None:
    blocks = np.zeros((1, 34), dtype=np.uint8)
    blocks[0, :2] = np.array([1000], dtype=np.float16).view(np.uint8)
    blocks[0, 2:] = np.arange(32, dtype=np.uint8)
    parts = groups_of(blocks, "Q8_0")
    assert parts.scales_NG.dtype is torch.float32
    assert torch.equal(parts.dequantize()[0], 1000 * torch.arange(32.0))
