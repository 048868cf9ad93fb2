"""Blocks of the GGUF format as groups of whole numbers, without rounding.

The layouts are those of ggml: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h.
Legend of shapes: N rows, B blocks of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from ahn.quantization.groups import Bits, Groups

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Array = np.ndarray[Any, Any]


class BlockType(NamedTuple):
    """A type of blocks.

    Attributes:
        bytes: Of a block.
        bits: Of a code, once it is unpacked.
        read: Makes codes, scales and minima of blocks `[N, B, bytes]`.
    """

    bytes: int
    bits: Bits
    read: Callable[[Bytes], tuple[Array, Array, Array]]


def groups_of(blocks_NX: Bytes, kind: str) -> Groups:
    """Rows of blocks as groups, exactly.

    Args:
        blocks_NX: The bytes of each row.
        kind: Name of the blocks' type, a key of `BLOCKS`.

    Returns:
        The groups. Scales are float16 where that holds them and float32 otherwise.
    """
    block = BLOCKS[kind]
    codes, scales, minima = block.read(np.ascontiguousarray(blocks_NX).reshape(len(blocks_NX), -1, block.bytes))
    size = codes.shape[-1]
    real = [torch.from_numpy(np.ascontiguousarray(part.reshape(len(blocks_NX), -1))) for part in (scales, minima)]
    halved = [part.half() for part in real]
    if all(torch.equal(half.float(), part) for half, part in zip(halved, real, strict=True)):
        real = halved
    whole = torch.from_numpy(np.ascontiguousarray(codes.reshape(len(blocks_NX), -1, size)))
    return Groups(whole, *real)


def _half(blocks: Bytes, start: int) -> Array:
    """The number of float16 at a byte of each block, `[N, B]` float32."""
    bits: Array = np.ascontiguousarray(blocks[..., start : start + 2]).view(np.float16)[..., 0]
    return bits.astype(np.float32)


def _nibbles(blocks: Bytes) -> Bytes:
    """The lower halves of the bytes, then the upper ones."""
    return np.concatenate((blocks & 15, blocks >> 4), axis=-1)


def _fifth_bits(blocks: Bytes) -> Bytes:
    """The 32 bits of four bytes, as the fifth bits of codes."""
    bits: Bytes = np.unpackbits(blocks, axis=-1, bitorder="little") * np.uint8(16)
    return bits


def _q4_0(blocks: Bytes) -> tuple[Array, Array, Array]:
    scale = _half(blocks, 0)
    return _nibbles(blocks[..., 2:]), scale, -8 * scale


def _q4_1(blocks: Bytes) -> tuple[Array, Array, Array]:
    return _nibbles(blocks[..., 4:]), _half(blocks, 0), _half(blocks, 2)


def _q5_0(blocks: Bytes) -> tuple[Array, Array, Array]:
    scale = _half(blocks, 0)
    return _nibbles(blocks[..., 6:]) | _fifth_bits(blocks[..., 2:6]), scale, -16 * scale


def _q5_1(blocks: Bytes) -> tuple[Array, Array, Array]:
    return _nibbles(blocks[..., 8:]) | _fifth_bits(blocks[..., 4:8]), _half(blocks, 0), _half(blocks, 2)


def _q8_0(blocks: Bytes) -> tuple[Array, Array, Array]:
    scale = _half(blocks, 0)
    return blocks[..., 2:] ^ 128, scale, -128 * scale


def _k_scales(blocks: Bytes) -> tuple[Array, Array]:
    """Scales and minima of the eight groups of a block of 256, from six bits each, `[N, B, 8]`."""
    low, high, rest = (blocks[..., start : start + 4] for start in (4, 8, 12))
    scales = np.concatenate((low & 63, (rest & 15) | (low >> 6 << 4)), axis=-1)
    minima = np.concatenate((high & 63, (rest >> 4) | (high >> 6 << 4)), axis=-1)
    return _half(blocks, 0)[..., None] * scales, -_half(blocks, 2)[..., None] * minima


def _k_nibbles(blocks: Bytes) -> Bytes:
    """Eight groups of 32 codes, two of which share 32 bytes."""
    pairs = blocks.reshape(*blocks.shape[:2], 4, 32)
    return np.stack((pairs & 15, pairs >> 4), axis=3).reshape(*blocks.shape[:2], 8, 32)


def _q4_k(blocks: Bytes) -> tuple[Array, Array, Array]:
    return _k_nibbles(blocks[..., 16:]), *_k_scales(blocks)


def _q5_k(blocks: Bytes) -> tuple[Array, Array, Array]:
    shifts = np.arange(8, dtype=np.uint8)[:, None]
    fifth = (blocks[..., None, 16:48] >> shifts & 1) << 4
    return _k_nibbles(blocks[..., 48:]) | fifth, *_k_scales(blocks)


def _q6_k(blocks: Bytes) -> tuple[Array, Array, Array]:
    low = blocks[..., :128].reshape(*blocks.shape[:2], 2, 2, 32)  # halves of 128 codes, of which 64 share 64 bytes
    high = blocks[..., 128:192].reshape(*blocks.shape[:2], 2, 1, 32)
    nibbles = np.concatenate((low & 15, low >> 4), axis=3)
    codes = nibbles | (high >> np.array([0, 2, 4, 6], dtype=np.uint8)[:, None] & 3) << 4
    scales = _half(blocks, 208)[..., None] * np.ascontiguousarray(blocks[..., 192:208]).view(np.int8)
    return codes.reshape(*blocks.shape[:2], 16, 16), scales, -32 * scales


BLOCKS: Mapping[str, BlockType] = {
    "Q4_0": BlockType(18, 4, _q4_0),
    "Q4_1": BlockType(20, 4, _q4_1),
    "Q5_0": BlockType(22, 8, _q5_0),
    "Q5_1": BlockType(24, 8, _q5_1),
    "Q8_0": BlockType(34, 8, _q8_0),
    "Q4_K": BlockType(144, 4, _q4_k),
    "Q5_K": BlockType(176, 8, _q5_k),
    "Q6_K": BlockType(210, 8, _q6_k),
}
"""The types that are kept as they are. All others are dequantised and rounded to 8 bits."""
