"""How the chunked forms cut a sequence: groups, chunks, and the decays inside a chunk.

Shapes: B batch, T tokens, H query heads, K key size. Inside a group: N chunks, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ahn.ops._shared import clamp_log_decay

# 32 beats 64 and 128 on a CPU: the cost of the triangular part grows with the square.
_CHUNK_TOKENS = 32
# 256 KiB of float32 per tensor and thread: a group then fits the caches. Elsewhere launches are dear, not memory.
_CPU_ELEMENTS_PER_THREAD = 2**16
_DEVICE_ELEMENTS = 2**24


def token_groups(q_BTHK: Tensor, *others: Tensor) -> Iterator[tuple[tuple[Tensor, ...], int]]:
    """Yield (parts of all tensors, tokens of a chunk): groups of whole chunks, then what is left as a shorter chunk.

    The tensors are split at once: a slice of its own for each part would have a gradient as large as the whole.
    """
    B, T, H, K = q_BTHK.shape
    on_cpu = q_BTHK.device.type == "cpu"
    elements = _CPU_ELEMENTS_PER_THREAD * max(2, torch.get_num_threads()) if on_cpu else _DEVICE_ELEMENTS
    step = _CHUNK_TOKENS * max(1, elements // (_CHUNK_TOKENS * max(1, B * H * K)))
    whole = T - T % _CHUNK_TOKENS
    sizes = [min(step, whole - start) for start in range(0, whole, step)]
    sizes += [T - whole] if whole < T else []
    for parts in zip(*(x.split(sizes, dim=1) for x in (q_BTHK, *others))):
        yield parts, min(_CHUNK_TOKENS, parts[0].size(1))


def by_chunk(x: Tensor, C: int) -> Tensor:
    """Bring `[B, N * C, heads, ...]` into the order `[N, B, heads, C, ...]`, contiguous."""
    B, T = x.shape[:2]
    return x.reshape(B, T // C, C, *x.shape[2:]).transpose(0, 1).transpose(2, 3).contiguous()


class DecayFactors(NamedTuple):
    """Factors by which a state shrinks inside a chunk; each is in [0, 1] where g <= 0."""

    since_start_NBHC: Tensor  # from the chunk's start up to and including a token
    until_end_NBHC: Tensor  # after a token, up to the chunk's end
    between_NBHCC: Tensor  # [reader, writer]: after the writer, up to and including the reader; 0 where it came later
    whole_NBH: Tensor  # over the whole chunk


def decay_factors(g_NBHC: Tensor) -> DecayFactors:
    """Turn log decays into the factors that a chunk needs."""
    G_NBHC = clamp_log_decay(g_NBHC).cumsum(-1)
    C = G_NBHC.shape[-1]
    later_CC = torch.ones(C, C, dtype=torch.bool, device=G_NBHC.device).triu(1)
    # Masked before exp: above the diagonal the difference is positive and may overflow, and 0 * inf has no gradient.
    log_NBHCC = (G_NBHC.unsqueeze(-1) - G_NBHC.unsqueeze(-2)).masked_fill_(later_CC, float("-inf"))
    end_NBH1 = G_NBHC[..., -1:]
    return DecayFactors(G_NBHC.exp(), (end_NBH1 - G_NBHC).exp(), log_NBHCC.exp_(), end_NBH1.squeeze(-1).exp())
