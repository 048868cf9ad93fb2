"""Linearised attention: the softmax over evicted tokens, to first order around the mean query of each head.

Shapes as in `ahn.memories.base`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F

from ahn import ops
from ahn.memories.base import Memory, MemoryShape
from ahn.ops import at_least_float32

_HIGHEST_TILT = 60.0  # of a token's score with the mean query; e^60 tokens fit into float32
_EMPTY = 1e-30  # a sum of weights of at most this much: nothing has been written


class LinearizedAttention(Memory):
    """What full attention would add for evicted tokens, from the moments of their keys and values.

    A token with key k and value v is written with weight `w = exp(u . k / sqrt(K)) / exp(offset)`, where u is the mean
    query of the head: `S <- S + w [v; 1] [k; 1]^T`. A query q scores a token `(q - u) . k / sqrt(K)` beyond that. To
    first order in this score the softmax over all evicted tokens gives

        far = mean(v) + mean((score - mean(score)) v),

    with means weighted by w. The sum of the weights and the mean score say how much of the whole softmax these tokens
    would take; a query mixes `share = sigmoid(g_proj x + size_weight log(sum w) + match_weight mean(score))` of `far`
    into the output of the exact tokens. The output projection takes `share (far - local)`, and starts at zero.

    Attributes:
        mean_query: The query u that each head expands around, `[H, K]`.
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
        self.size_weight = torch.nn.Parameter(torch.zeros(shape.query_heads))
        self.match_weight = torch.nn.Parameter(torch.zeros(shape.query_heads))

    @staticmethod
    def activate(offset: torch.Tensor) -> tuple[None, torch.Tensor]:
        """No decay, and write strength exp(-offset), which keeps the sum of weights near 1; see `Memory.activate`."""
        return None, torch.exp(-offset)

    def scan(
        self,
        q_BTHK: torch.Tensor,
        k_BTGK: torch.Tensor,
        v_BTGV: torch.Tensor,
        gates_BTNH: torch.Tensor,
        state: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Memory.scan`; what a query reads is `far`, the mean score, and the sum of weights.

        Returns:
            What each query read, `[B, T, H, V + 2]` float32, and the state after the last token.
        """
        q_BTHK, k_BTGK, v_BTGV = self._queries(q_BTHK), at_least_float32(k_BTGK), at_least_float32(v_BTGV)
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
        match_BTH1 = (keys_BTHK * q_BTHK).sum(-1, keepdim=True)
        left = torch.cat((both, keys_BTHK[:, -1, :, None]), dim=2)
        right = torch.cat((values_BTHV[:, -1], size_BTH[:, -1, :, None]), dim=2)
        read = _first_order(read_BTHV, values_BTHV, match_BTH1, size_BTH[..., None])
        return read, torch.cat((left, right[..., None]), dim=3)

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
        mean_query_LHK = at_least_float32(torch.stack([memory.get_parameter("mean_query") for memory in memories]))
        k_LBGK, v_LBGV = at_least_float32(k_LBGK), at_least_float32(v_LBGV)
        token = k_LBGK, v_LBGV, gates_LBNH[..., 0, :], mean_query_LHK
        if ops.write_linearized_(*token, state_LB, rows_B, former_LB):
            return
        if rows_B is not None:
            own = state_LB[:, rows_B]
            cls.update(memories, k_LBGK, v_LBGV, gates_LBNH, own)
            state_LB[:, rows_B] = own
            return
        with ops.full_precision(state_LB):
            weight_LBH = gates_LBNH[..., 0, :] * _tilt(mean_query_LHK[:, None], k_LBGK)
            repeats = gates_LBNH.size(-1) // k_LBGK.size(2)
            k, v = (F.pad(x, (0, 1), value=1.0).repeat_interleave(repeats, 2) for x in (k_LBGK, v_LBGV))
            v = (v * weight_LBH[..., None])[..., None]
            torch.addcmul(state_LB if former_LB is None else former_LB, v, k[..., None, :], out=state_LB)

    def read(self, q_BTHK: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """As `Memory.read`; see `scan` for what is read, `[B, T, H, V + 2]`."""
        q_BTHK = self._queries(q_BTHK).to(state.dtype)
        with ops.full_precision(state):
            both_BTHX = torch.matmul(q_BTHK.transpose(1, 2), state[..., :-1].mT).transpose(1, 2)
        sizes = self.shape.value_size, 1
        both_BTHV, match_BTH1 = both_BTHX.split(sizes, dim=-1)
        values_B1HV, size_B1H1 = state[:, None, :, :, -1].split(sizes, dim=-1)
        return _first_order(both_BTHV, values_B1HV, match_BTH1, size_B1H1.expand_as(match_BTH1))

    def gated(self, read_BTHV: torch.Tensor, x_BTD: torch.Tensor, local_BTHV: torch.Tensor) -> torch.Tensor:
        """The share of the softmax that evicted tokens take, times what is different in them; see `Memory.gated`."""
        far_BTHV, match_BTH, size_BTH = read_BTHV[..., :-2], read_BTHV[..., -2], read_BTHV[..., -1]
        is_empty = size_BTH <= _EMPTY
        gate_BTH = torch.addcmul(at_least_float32(self.g_proj(x_BTD)), self.match_weight, match_BTH)
        gate_BTH = torch.addcmul(gate_BTH, self.size_weight, size_BTH.masked_fill(is_empty, 1).log())
        share_BTH = gate_BTH.sigmoid().masked_fill(is_empty, 0)
        return share_BTH[..., None] * (far_BTHV - local_BTHV)

    def decode_add(
        self,
        local_B1HV: torch.Tensor,
        q_B1HK: torch.Tensor,
        x_B1D: torch.Tensor,
        state: torch.Tensor,
        rows_B: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `Memory.decode_add`, by a kernel of its own."""
        gate = self.g_proj
        weights = ops.LinearizedWeights(
            self.mean_query, gate.weight, gate.bias, self.size_weight, self.match_weight, self.o_proj
        )
        if ops.decode_add_linearized_(local_B1HV, q_B1HK, x_B1D, state, weights, rows_B):
            return local_B1HV
        return super().decode_add(local_B1HV, q_B1HK, x_B1D, state, rows_B)

    def output_weights(self) -> None:
        """The kernels for the output of other memories do not serve it."""

    @property
    def state_products(self) -> int:
        """As `Memory.state_products`: a token is written in one and read in another."""
        return 2

    @property
    def write_products(self) -> int:
        """As `Memory.write_products`: each mean query is multiplied by the token's key."""
        return self.mean_query.numel()

    def state_shape(self) -> tuple[int, int, int]:
        """Shape of one sequence's state, `[H, V + 1, K + 1]`: sums of products, and of keys, values and weights."""
        _, heads, _, key_size, value_size = self.shape
        return heads, value_size + 1, key_size + 1

    def _queries(self, q_BTHK: torch.Tensor) -> torch.Tensor:
        """Queries beyond the mean query, scaled as attention scales them, `[B, T, H, K]`, at least in float32."""
        return (at_least_float32(q_BTHK) - at_least_float32(self.mean_query)) * float(self.shape.key_size**-0.5)


def _tilt(mean_query_HK: torch.Tensor, k_GK: torch.Tensor) -> torch.Tensor:
    """Weights of keys `[..., G, K]` by the mean queries `[..., H, K]` of their heads, `[..., H]`."""
    groups, key_size = k_GK.shape[-2:]
    heads = mean_query_HK.unflatten(-2, (groups, -1))
    scores: torch.Tensor = (heads @ k_GK[..., None]).flatten(-3) * key_size**-0.5
    return scores.clamp(max=_HIGHEST_TILT).exp()


def _first_order(
    both_V: torch.Tensor, values_V: torch.Tensor, match_1: torch.Tensor, size_1: torch.Tensor
) -> torch.Tensor:
    """What a query reads from weighted sums of score times value, value, score, and 1; see `scan`."""
    divisor_1 = size_1.masked_fill(size_1 <= _EMPTY, 1)
    mean_1 = match_1 / divisor_1
    far_V = torch.addcmul(both_V, 1 - mean_1, values_V) / divisor_1
    return torch.cat((far_V, mean_1, size_1), dim=-1)
