"""Linearised attention: the softmax over evicted tokens, to first order around the mean query of each head.

Shapes as in `ahn.memories.base`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F

from ahn import ops
from ahn.memories.base import Gating, Memory, MemoryShape
from ahn.ops import at_least_float32

_HIGHEST_TILT = 60.0  # of a token's score with the mean query; e^60 tokens fit into float32
_EMPTY = 1e-30  # a sum of weights of at most this much: nothing has been written


class LinearizedAttention(Memory):
    """What full attention would add for evicted tokens, from the moments of their keys and values.

    A token with key k and value v is written with weight `w = exp(u . k / sqrt(K) - offset)`, where u is the mean query
    of the head: `S <- S + w [v; 1] [k; 1]^T`. A query q scores a token by `(q - u) . k / sqrt(K)` beyond that. To first
    order in this score the softmax over all evicted tokens gives, with means weighted by w,

        far = mean(v) + mean((score - mean(score)) v).

    How much of the whole softmax these tokens would take follows from how many there are and how well they match:

        share = sigmoid(g_proj x + size_weight log(sum of w) + match_weight mean(score) + (q - u) . share_key / sqrt(K)).

    The output projection takes `share (far - local)`, where local is the output of the exact tokens. It starts at zero.

    Attributes:
        mean_query: The query u that each head expands around, `[H, K]`.
        share_key: A key that raises the share where a query matches it, `[H, K]`.
        size_weight: Weight of the logarithm of the sum of weights, `[H]`.
        match_weight: Weight of the mean score, `[H]`.
    """

    rule = "additive"
    bias = True
    normalizes = False
    gate_parameters: ClassVar = {"offset": torch.zeros}

    def __init__(self, shape: MemoryShape) -> None:
        super().__init__(shape)
        self.mean_query = torch.nn.Parameter(torch.zeros(shape.query_heads, shape.key_size))
        self.share_key = torch.nn.Parameter(torch.zeros(shape.query_heads, shape.key_size))
        self.size_weight = torch.nn.Parameter(torch.zeros(shape.query_heads))
        self.match_weight = torch.nn.Parameter(torch.zeros(shape.query_heads))

    @staticmethod
    def activate(offset: torch.Tensor) -> tuple[None, torch.Tensor]:
        """No decay, and write strength exp(-offset), which keeps the sum of the weights near 1; see `Memory.activate`."""
        return None, torch.exp(-offset)

    def writing(self, k_BTGK: torch.Tensor, gates_BTNH: torch.Tensor) -> Gating:
        """As `Memory.writing`: the strength is the weight w."""
        write_BTH, _ = self.gating(gates_BTNH)
        return Gating(write_BTH * _tilt(at_least_float32(self.mean_query), at_least_float32(k_BTGK)), None)

    def scan(
        self,
        q_BTHK: torch.Tensor,
        k_BTGK: torch.Tensor,
        v_BTGV: torch.Tensor,
        gates_BTNH: torch.Tensor,
        state: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Memory.scan`; a query reads `far` and three numbers for its share.

        Returns:
            What each query read, `[B, T, H, V + 3]` float32, and the state after the last token. Behind `far` are the
            logarithm of the sum of weights, the mean score, and `(q - u) . share_key / sqrt(K)`.
        """
        q_BTHK, k_BTGK, v_BTGV = self.scaled_queries(q_BTHK), at_least_float32(k_BTGK), at_least_float32(v_BTGV)
        with ops.full_precision(q_BTHK):
            weight_BTH = gates_BTNH[..., 0, :] * _tilt(at_least_float32(self.mean_query), k_BTGK)
            state = self.empty_state(q_BTHK.size(0), q_BTHK.device).to(q_BTHK.dtype) if state is None else state
            repeats = self.shape.query_heads // self.shape.kv_heads
            k_BTHK, v_BTHV = (x.repeat_interleave(repeats, 2) * weight_BTH[..., None] for x in (k_BTGK, v_BTGV))
            keys_BTHK = state[:, None, :, -1, :-1] + k_BTHK.cumsum(1)
            values_BTHV = state[:, None, :, :-1, -1] + v_BTHV.cumsum(1)
            size_BTH = state[:, None, :, -1, -1] + weight_BTH.cumsum(1)
        read_BTHV, both = ops.state_space(
            q_BTHK, k_BTGK, v_BTGV, torch.zeros_like(weight_BTH), weight_BTH, state[:, :, :-1, :-1].contiguous()
        )
        left = torch.cat((both, keys_BTHK[:, -1, :, None]), dim=2)
        right = torch.cat((values_BTHV[:, -1], size_BTH[:, -1, :, None]), dim=2)
        match_BTH = (keys_BTHK * q_BTHK).sum(-1)
        return self._first_order(q_BTHK, (read_BTHV, values_BTHV, match_BTH, size_BTH)), torch.cat((left, right[..., None]), dim=3)

    @classmethod
    def update(
        cls,
        memories: Sequence[Memory],
        k_LBGK: torch.Tensor,
        v_LBGV: torch.Tensor,
        gates_LBNH: torch.Tensor,
        state_LB: torch.Tensor,
        rows_B: torch.Tensor | None = None,
        former_LB: torch.Tensor | None = None,
    ) -> None:
        """As `Memory.update`."""
        if rows_B is not None:
            own = state_LB[:, rows_B]
            cls.update(memories, k_LBGK, v_LBGV, gates_LBNH, own)
            state_LB[:, rows_B] = own
            return
        shape = memories[0].shape
        mean_query = torch.stack([memory.get_parameter("mean_query") for memory in memories])[:, None]
        k_LBGK, v_LBGV = at_least_float32(k_LBGK), at_least_float32(v_LBGV)
        with ops.full_precision(state_LB):
            weight_LBH = gates_LBNH[..., 0, :] * _tilt(mean_query, k_LBGK)
            repeats = shape.query_heads // shape.kv_heads
            k, v = (F.pad(x, (0, 1), value=1.0).repeat_interleave(repeats, 2) for x in (k_LBGK, v_LBGV))
            written = (v * weight_LBH[..., None])[..., None] * k[..., None, :]
            torch.add(state_LB if former_LB is None else former_LB, written, out=state_LB)

    def read(self, q_BTHK: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """As `Memory.read`; see `scan` for what is read, `[B, T, H, V + 3]`."""
        q_BTHK = self.scaled_queries(q_BTHK).to(state.dtype)
        with ops.full_precision(state):
            both_BTHX = torch.einsum("bthk,bhxk->bthx", q_BTHK, state[..., :-1])
        last_B1HX = state[:, None, :, :, -1].expand_as(both_BTHX)
        sums = both_BTHX[..., :-1], last_B1HX[..., :-1], both_BTHX[..., -1], last_B1HX[..., -1]
        return self._first_order(q_BTHK, sums)

    def gated(self, read_BTHV: torch.Tensor, x_BTD: torch.Tensor, local_BTHV: torch.Tensor) -> torch.Tensor:
        """The share of the softmax that evicted tokens take, times what is different in them; see `Memory.gated`."""
        far_BTHV, size_BTH, match_BTH, own_BTH = read_BTHV[..., :-3], *read_BTHV[..., -3:].unbind(-1)
        is_empty = size_BTH == -torch.inf
        logit_BTH = self.size_weight * size_BTH.masked_fill(is_empty, 0) + self.match_weight * match_BTH + own_BTH
        logit_BTH = logit_BTH + at_least_float32(self.g_proj(x_BTD))
        share_BTH = torch.sigmoid(logit_BTH).masked_fill(is_empty, 0)
        return share_BTH[..., None] * (far_BTHV - at_least_float32(local_BTHV))

    def output_weights(self) -> None:
        """There is no kernel for its output."""

    @property
    def state_products(self) -> int:
        """As `Memory.state_products`: a token is written in one and read in another."""
        return 2

    def state_shape(self) -> tuple[int, int, int]:
        """Shape of one sequence's state, `[H, V + 1, K + 1]`: sums of products, and of keys, values and weights."""
        _, heads, _, key_size, value_size = self.shape
        return heads, value_size + 1, key_size + 1

    def linear_maps(self, state: torch.Tensor) -> torch.Tensor:
        """As `Memory.linear_maps`: the weighted covariances of values and keys, `[B, H, V, K]`; zero where empty."""
        size_BH11 = state[..., -1:, -1:]
        is_empty = size_BH11 <= _EMPTY
        mean = state / torch.where(is_empty, torch.ones_like(size_BH11), size_BH11)
        covariance: torch.Tensor = mean[..., :-1, :-1] - mean[..., :-1, -1:] * mean[..., -1:, :-1]
        return covariance.masked_fill(is_empty, 0)

    def scaled_queries(self, q_BTHK: torch.Tensor) -> torch.Tensor:
        """Queries beyond the mean query, scaled as attention scales them, `[B, T, H, K]`, at least in float32."""
        return (at_least_float32(q_BTHK) - at_least_float32(self.mean_query)) * self.shape.key_size**-0.5

    def _first_order(self, q_BTHK: torch.Tensor, sums: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """What queries read from the weighted sums of score times value, of values, of scores, and of ones."""
        both_BTHV, values_BTHV, match_BTH, size_BTH = sums
        is_empty = size_BTH <= _EMPTY
        divisor_BTH = torch.where(is_empty, torch.ones_like(size_BTH), size_BTH)
        mean_BTH = match_BTH / divisor_BTH
        far_BTHV = (both_BTHV + (1 - mean_BTH)[..., None] * values_BTHV) / divisor_BTH[..., None]
        size_BTH = divisor_BTH.log().masked_fill(is_empty, -torch.inf)
        own_BTH = (q_BTHK * at_least_float32(self.share_key)).sum(-1)
        return torch.cat((far_BTHV, torch.stack((size_BTH, mean_BTH, own_BTH), dim=-1)), dim=-1)


def _tilt(mean_query_HK: torch.Tensor, k_GK: torch.Tensor) -> torch.Tensor:
    """Weights of keys `[..., G, K]` by the mean queries `[..., H, K]` of their heads, `[..., H]`."""
    groups, key_size = k_GK.shape[-2:]
    heads = mean_query_HK.unflatten(-2, (groups, -1))
    scores = (heads @ k_GK[..., None]).flatten(-3) * key_size**-0.5
    return scores.clamp(max=_HIGHEST_TILT).exp()
