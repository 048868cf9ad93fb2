"""Linearised attention: the softmax over evicted tokens, to first order around the mean query of each head.

Shapes as in `ahn.memories.base`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F

from ahn import ops
from ahn.errors import ShapeError
from ahn.memories._parts import Gating
from ahn.memories.base import Memory, MemoryShape
from ahn.ops import at_least_float32
from ahn.tokens import Attended

_HIGHEST_TILT = 60.0  # of a token's score with the mean query; e^60 tokens fit into float32
_NO_WEIGHT = -1e4  # a lower log-sum is that of padding, which reads nothing
_EMPTY = 1e-12  # a sum of weights of at most this much: nothing has been written


class Sums(NamedTuple):
    """What queries read from a state: sums over the evicted tokens, by their weights.

    Attributes:
        both: Of score times value, `[B, T, H, V]`.
        values: Of values, `[B, T or 1, H, V]`.
        scores: Of scores, `[B, T, H]`.
        weights: Of the weights alone, `[B, T or 1, H]`.
        own: `(q - u) . share_key / sqrt(K)` of the query itself, `[B, T, H]`.
    """

    both: torch.Tensor
    values: torch.Tensor
    scores: torch.Tensor
    weights: torch.Tensor
    own: torch.Tensor


class LinearizedAttention(Memory):
    """What full attention would add for evicted tokens, from the moments of their keys and values.

    A token with key k and value v is written with weight `w = exp(u . k / sqrt(K) - offset)`, where u is the mean query
    of the head: `S <- S + w [v; 1] [k; 1]^T`. A query q scores a token by `(q - u) . k / sqrt(K)` beyond that. To first
    order in this score the softmax over all evicted tokens gives, with means weighted by w,

        far = mean(v) + mean((score - mean(score)) v).

    How much of the whole softmax these tokens would take follows from how many there are, how well they match, and how
    much weight the exact tokens have, whose scores are s:

        share = sigmoid(g_proj x + size_weight log(sum(w)) + match_weight mean(score) + (q - u) . share_key / sqrt(K)
                        - exact_weight log(sum(exp(s)))).

    In a softmax itself the three weights are 1. The output projection takes `share (far - local)`, where local is the
    output of the exact tokens. It starts at zero.

    Anchors are exact tokens, so they are left out of the state until they are given up. They are in it, too, with
    `memory_positions="none"`, because what is kept of them has been rotated.

    Attributes:
        mean_query: The query u that each head expands around, `[H, K]`.
        share_key: A key that raises the share where a query matches it, `[H, K]`.
        size_weight: Weight of the logarithm of the sum of weights, `[H]`.
        match_weight: Weight of the mean score, `[H]`.
        exact_weight: Weight of the log-sum of the exact tokens' scores, `[H]`.
    """

    rule = "additive"
    bias = True
    normalizes = False
    reads_log_sum = True
    leaves_anchors_out = True
    gate_parameters: ClassVar = {"offset": torch.zeros}

    def __init__(self, shape: MemoryShape) -> None:
        super().__init__(shape)
        self.mean_query = torch.nn.Parameter(torch.zeros(shape.query_heads, shape.key_size))
        self.share_key = torch.nn.Parameter(torch.zeros(shape.query_heads, shape.key_size))
        self.size_weight = torch.nn.Parameter(torch.zeros(shape.query_heads))
        self.match_weight = torch.nn.Parameter(torch.zeros(shape.query_heads))
        self.exact_weight = torch.nn.Parameter(torch.zeros(shape.query_heads))

    @staticmethod
    def activate(offset: torch.Tensor) -> tuple[None, torch.Tensor]:
        """No decay, and write strength exp(-offset), so that weights are about 1; see `Memory.activate`."""
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
        """As `Memory.scan`; a query reads weighted sums over the tokens, and how well it matches the share's key.

        Returns:
            What each query read, `[B, T, H, 2 V + 3]` float32, and the state after the last token. Sums of score times
            value, of values, of scores, and of weights, then `(q - u) . share_key / sqrt(K)`.
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
        match_BTH1 = (keys_BTHK * q_BTHK).sum(-1, keepdim=True)
        left = torch.cat((both, keys_BTHK[:, -1, :, None]), dim=2)
        right = torch.cat((values_BTHV[:, -1], size_BTH[:, -1, :, None]), dim=2)
        own_BTH1 = (q_BTHK * at_least_float32(self.share_key)).sum(-1, keepdim=True)
        read = torch.cat((read_BTHV, values_BTHV, match_BTH1, size_BTH[..., None], own_BTH1), dim=-1)
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
        """As `Memory.read`; see `scan` for what is read, `[B, T, H, 2 V + 3]`."""
        both, values, *numbers = self._sums(q_BTHK, state)
        return torch.cat(
            (both, values.expand_as(both), *(each[..., None].expand(*both.shape[:3], 1) for each in numbers)), -1
        )

    def _sums(self, q_BTHK: torch.Tensor, state: torch.Tensor) -> Sums:
        """What queries read from a state as it is, in parts that broadcast."""
        q_BTHK = self.scaled_queries(q_BTHK).to(state.dtype)
        with ops.full_precision(state):
            both_BTHX = torch.matmul(q_BTHK.transpose(1, 2), state[..., :-1].mT).transpose(1, 2)
        own_BTH, last_B1HX = (q_BTHK * self.share_key).sum(-1), state[:, None, :, :, -1]
        return Sums(both_BTHX[..., :-1], last_B1HX[..., :-1], both_BTHX[..., -1], last_B1HX[..., -1], own_BTH)

    def gated(self, read_BTHV: torch.Tensor, x_BTD: torch.Tensor, local: Attended) -> torch.Tensor:
        """The share of the softmax that evicted tokens take, times what is different in them; see `Memory.gated`.

        Raises:
            ShapeError: The log-sum is missing.
        """
        size = self.shape.value_size
        both, values, numbers = read_BTHV.split((size, size, 3), dim=-1)
        return self._mixed(Sums(both, values, *numbers.unbind(-1)), x_BTD, local)

    def _mixed(self, sums: Sums, x_BTD: torch.Tensor, local: Attended) -> torch.Tensor:
        """What `gated` gives, from sums that broadcast; zero where nothing has been written."""
        if local.log_sum is None:
            raise ShapeError("linearised attention needs the log-sum of the exact tokens' scores beside their output")
        size_BTH = sums.weights.clamp(min=_EMPTY)
        mean_BTH = sums.scores / size_BTH
        gate_BTH = torch.addcmul(at_least_float32(self.g_proj(x_BTD)) + sums.own, self.match_weight, mean_BTH)
        gate_BTH = torch.addcmul(gate_BTH, self.size_weight, size_BTH.log())
        gate_BTH = torch.addcmul(gate_BTH, self.exact_weight, local.log_sum.clamp(min=_NO_WEIGHT), value=-1)
        share_BTH = gate_BTH.sigmoid() * (size_BTH > _EMPTY)
        far_BTHV = torch.addcmul(sums.both, (1 - mean_BTH)[..., None], sums.values) / size_BTH[..., None]
        return share_BTH[..., None] * (far_BTHV - local.output)

    def _answer(self, q_B1HK: torch.Tensor, x_B1D: torch.Tensor, local: Attended, state: torch.Tensor) -> torch.Tensor:
        return self._projected(self._mixed(self._sums(q_B1HK, state), x_B1D, local))

    def output_weights(self) -> ops.LinearizedWeights:
        """As `Memory.output_weights`."""
        gate = self.g_proj
        of_share = self.share_key, gate.weight, gate.bias, self.size_weight, self.match_weight, self.exact_weight
        return ops.LinearizedWeights(self.mean_query, *of_share, self.o_proj)

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

    def linear_maps(self, state: torch.Tensor) -> torch.Tensor:
        """As `Memory.linear_maps`: the weighted covariances of values and keys, `[B, H, V, K]`; zero where empty."""
        size_BH11 = state[..., -1:, -1:]
        is_empty = size_BH11 <= _EMPTY
        mean = state / torch.where(is_empty, torch.ones_like(size_BH11), size_BH11)
        covariance: torch.Tensor = mean[..., :-1, :-1] - mean[..., :-1, -1:] * mean[..., -1:, :-1]
        return covariance.masked_fill(is_empty, 0)

    def scaled_queries(self, q_BTHK: torch.Tensor) -> torch.Tensor:
        """Queries beyond the mean query, scaled as attention scales them, `[B, T, H, K]`, at least in float32."""
        return (at_least_float32(q_BTHK) - at_least_float32(self.mean_query)) * float(self.shape.key_size**-0.5)


def _tilt(mean_query_HK: torch.Tensor, k_GK: torch.Tensor) -> torch.Tensor:
    """Weights of keys `[..., G, K]` by the mean queries `[..., H, K]` of their heads, `[..., H]`."""
    groups, key_size = k_GK.shape[-2:]
    heads = mean_query_HK.unflatten(-2, (groups, -1))
    scores: torch.Tensor = (heads @ k_GK[..., None]).flatten(-3) * key_size**-0.5
    return scores.clamp(max=_HIGHEST_TILT).exp()
