"""The contract of a memory: what it declares, and all that follows from it.

Legend of shapes: L layers, B batch, T tokens, D hidden size, H query heads, G key/value heads, K key size,
V value size, N gates per head.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ahn import ops
from ahn.errors import ConfigError
from ahn.memories._parts import Gating, are_plain, stacked
from ahn.ops import at_least_float32, rms_norm, unit
from ahn.tokens import Attended

_RULES = ("delta", "additive")


class MemoryShape(NamedTuple):
    """Sizes of the attention layer that a memory serves.

    Attributes:
        hidden_size: Width of the layer's input, D.
        query_heads: Number of query heads, H; the state has one matrix per query head.
        kv_heads: Number of key/value heads, G; H is a multiple of it.
        key_size: Size of one key or query head, K.
        value_size: Size of one value head, V.
    """

    hidden_size: int
    query_heads: int
    kv_heads: int
    key_size: int
    value_size: int


class Memory(nn.Module, abc.ABC):
    """A recurrent network that writes evicted tokens into a state of fixed size and answers queries from it.

    It reuses the attention's own queries, keys and values and learns only gates and an output. A subclass declares the
    attributes below and implements `activate`; everything else follows: parameters, scan, decoding, kernels, costs.
    With log decay g and write strength w of a token, the rules are, for every query head:

    - "delta": `S <- exp(g) S`, then `S <- S + w k (v - S^T k)^T`; a query reads `S^T q / sqrt(K)`.
    - "additive": `S <- exp(g) S + w v k^T`; a query reads `S q`.

    Keys and queries are l2-normalised. What was read passes a norm, a gate from the querying token, and the output
    projection, which starts at zero: an untrained memory changes nothing. Gates of zero leave the state as it is,
    which keeps padding out of it.

    Args:
        shape: Sizes of the attention layer.

    Raises:
        ConfigError: The rule that it declares is unknown.

    Attributes:
        rule: How a token is written: "delta", state `[H, K, V]`, or "additive", state `[H, V, K]`.
        projections: Names of linear maps from the hidden state to one number per head, from which `activate` makes
            gates.
        gate_parameters: Parameters per head that `activate` also needs: by name, a function that draws them, `[H]`.
        log_rate: Name of the gate parameter that is the log of a decay rate, if there is one.
        bias: Whether the projections and the output gate have biases.
        normalizes: Whether what is read passes a norm.
        norm_per_head: Whether the norm is taken over each head before the gate, or over all heads after it.
        reads_log_sum: Whether it asks how much weight the exact tokens have: the log-sum of their scores.
        leaves_anchors_out: Whether a token that becomes an anchor is written once it is one no more, so that nothing is
            read twice. For rules whose sums have no order, without `projections`: all tokens then have the same gates.
        gate_count: Gates per token and head, N: log decay, unless `activate` gives none, and write strength.
        g_proj: Output gate: a linear map from the querying token's hidden state to one number per head.

    Source: arXiv 2510.07318, section 3.2.
    """

    rule: ClassVar[Literal["delta", "additive"]]
    projections: ClassVar[tuple[str, ...]] = ()
    gate_parameters: ClassVar[Mapping[str, Callable[[int], torch.Tensor]]] = {}
    log_rate: ClassVar[str | None] = None
    bias: ClassVar[bool] = False
    normalizes: ClassVar[bool] = True
    norm_per_head: ClassVar[bool] = True
    reads_log_sum: ClassVar[bool] = False
    leaves_anchors_out: ClassVar[bool] = False
    g_proj: nn.Linear

    def __init__(self, shape: MemoryShape) -> None:
        super().__init__()
        if self.rule not in _RULES:
            raise ConfigError(f"{type(self).__name__}.rule is {self.rule!r}; declare one of {', '.join(_RULES)}")
        self.shape = shape
        _, heads, _, _, value_size = shape
        self.o_proj = nn.Parameter(torch.zeros(heads, value_size, value_size))
        for parameter, draw in self.gate_parameters.items():
            self.register_parameter(parameter, nn.Parameter(draw(heads)))
        for projection in (*self.projections, "g_proj"):
            linear = nn.Linear(shape.hidden_size, heads, bias=self.bias)
            nn.init.normal_(linear.weight, std=0.02)
            if self.bias:
                nn.init.zeros_(linear.bias)
            setattr(self, projection, linear)
        if self.normalizes and self.norm_per_head:
            self.o_norm = nn.Parameter(torch.ones(value_size))
        elif self.normalizes:
            self.norm = nn.Parameter(torch.ones(heads * value_size))
        with torch.no_grad():
            self.gate_count = self.gates(self.g_proj.weight.new_zeros(1, 1, shape.hidden_size)).size(-2)
        if self.leaves_anchors_out and (self.rule == "delta" or self.projections or self.gate_count > 1):
            raise ConfigError(f"{type(self).__name__} cannot leave anchors out: its state depends on how tokens come")

    @staticmethod
    @abc.abstractmethod
    def activate(*inputs: Any, **options: Any) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Log decay and write strength of tokens.

        Args:
            *inputs: What each of `projections` gives, `[..., H]` in the dtype of the model, then the tensors of
                `gate_parameters`, `[H]` or broadcastable, float32 (float64 for a float64 model).
            **options: None; a subclass gives its inputs names.

        Returns:
            Log decay (natural, at most 0), or `None` where nothing decays, and write strength, at least 0. Both are
            `[..., H]` or broadcast to it.
        """

    def gates(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Gates of tokens, computed when they are current and applied when they leave the window.

        Args:
            x_BTD: Input of the attention layer, `[B, T, D]`, after the layer's input norm.

        Returns:
            Gates, `[B, T, N, H]`, float32 (float64 for a float64 model).
        """
        projected = [getattr(self, name)(x_BTD) for name in self.projections]
        parameters = (at_least_float32(getattr(self, name)) for name in self.gate_parameters)
        return stacked(self.activate(*projected, *parameters), (*x_BTD.shape[:-1], self.shape.query_heads))

    @classmethod
    def gates_of_layers(cls, memories: Sequence[Memory], x_LBD: torch.Tensor) -> torch.Tensor:
        """Gates of one token in several layers at once, as `gates` gives them one by one; for decoding, no gradients.

        Args:
            memories: The memories of L layers, of one kind and shape.
            x_LBD: Inputs of their attention layers at the token, `[L, B, D]`.

        Returns:
            Gates, `[L, B, N, H]`, float32 (float64 for a float64 model).
        """
        linears = [[getattr(memory, name) for name in cls.projections] for memory in memories]
        parameters = (
            at_least_float32(torch.stack([getattr(memory, name) for memory in memories])[:, None])
            for name in cls.gate_parameters
        )
        return stacked(
            cls.activate(*ops.linear_each(x_LBD, linears), *parameters),
            (*x_LBD.shape[:-1], memories[0].shape.query_heads),
        )

    @staticmethod
    def gating(gates_BTNH: torch.Tensor) -> Gating:
        """What gates do to the state, as long as keys have no say in it; see `writing`.

        Args:
            gates_BTNH: Gates as `gates` gives them, `[B, T, N, H]`.
        """
        *log_decay, write_BTH = gates_BTNH.unbind(-2)
        return Gating(write_BTH, log_decay[0].exp() if log_decay else None)

    def writing(self, k_BTGK: torch.Tensor, gates_BTNH: torch.Tensor) -> Gating:
        """What tokens with these keys, `[B, T, G, K]`, and gates do to the state when they are evicted."""
        return self.gating(gates_BTNH)

    def scan(
        self,
        q_BTHK: torch.Tensor,
        k_BTGK: torch.Tensor,
        v_BTGV: torch.Tensor,
        gates_BTNH: torch.Tensor,
        state: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes evicted tokens into the state one after the other, reading it after each.

        Args:
            q_BTHK: Queries that read, `[B, T, H, K]`: query t reads after evicted token t was written.
            k_BTGK: Keys of the evicted tokens, `[B, T, G, K]`.
            v_BTGV: Values of the evicted tokens, `[B, T, G, V]`.
            gates_BTNH: Their gates, `[B, T, N, H]`.
            state: State before the first of them, `[B, *state_shape()]` float32, or `None` for an empty memory.

        Returns:
            What each query read, `[B, T, H, V]` float32, and the state after the last token.
        """
        q_BTHK, k_BTGK, v_BTGV = self._queries(q_BTHK), unit(k_BTGK), at_least_float32(v_BTGV)
        *log_decay, write_BTH = gates_BTNH.unbind(-2)
        if self.rule == "additive":
            g_BTH = log_decay[0] if log_decay else torch.zeros_like(write_BTH)
            return ops.state_space(q_BTHK, k_BTGK, v_BTGV, g_BTH, write_BTH, state)
        if log_decay:
            return ops.gated_delta_rule(q_BTHK, k_BTGK, v_BTGV, log_decay[0], write_BTH, state)
        return ops.delta_rule(q_BTHK, k_BTGK, v_BTGV, write_BTH, state)

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
        """Writes one evicted token into the states of several layers at once; for decoding, no gradients.

        Args:
            memories: The memories of L layers, of one kind and shape.
            k_LBGK: The token's keys, `[L, B, G, K]`.
            v_LBGV: Its values, `[L, B, G, V]`.
            gates_LBNH: Its gates, `[L, B, N, H]`.
            state_LB: The states, `[L, B, *state_shape()]` float32, contiguous; with `rows_B` those of any rows, and as
                they lie.
            rows_B: Which of these rows is whose, int64; `None` where they are those of the batch.
            former_LB: The states before the token, contiguous, which stay as they are; `None` where `state_LB` holds
                them, as it does with `rows_B`.
        """
        starts = None if rows_B is None else ops.state_places(state_LB, rows_B)
        if rows_B is not None and starts is None:
            own = state_LB[:, rows_B]
            cls.update(memories, k_LBGK, v_LBGV, gates_LBNH, own)
            state_LB[:, rows_B] = own
            return
        write_LBH, decay_LBH = cls.gating(gates_LBNH)
        k, v, strength = (x.flatten(0, 1) for x in (unit(k_LBGK), at_least_float32(v_LBGV), write_LBH))
        decay = None if decay_LBH is None else decay_LBH.flatten(0, 1)
        state = state_LB.flatten(0, 1) if starts is None else state_LB
        former = None if former_LB is None else former_LB.flatten(0, 1)
        with ops.full_precision(state):
            if cls.rule == "delta":
                ops.write_delta_(k, v, decay, strength, state, starts, former)
            else:
                decay = torch.ones_like(strength) if decay is None else decay
                ops.write_state_space_(k, v, decay, strength, state, starts, former)

    def read(self, q_BTHK: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """What queries read from a state as it is, `[B, T, H, V]` in the dtype of the state; for decoding.

        Args:
            q_BTHK: Queries, `[B, T, H, K]`.
            state: The state, `[B, *state_shape()]` float32.
        """
        state_BHKV = state if self.rule == "delta" else state.mT
        with ops.full_precision(state):
            return torch.matmul(self._queries(q_BTHK).transpose(1, 2).to(state.dtype), state_BHKV).transpose(1, 2)

    def gated(self, read_BTHV: torch.Tensor, x_BTD: torch.Tensor, local: Attended) -> torch.Tensor:
        """What goes into the output projection, `[B, T, H, V]` float32: here norm and gate of what was read.

        Args:
            read_BTHV: What the queries read, as `scan` and `read` give it, float32.
            x_BTD: Input of the attention layer at the *querying* tokens, `[B, T, D]`.
            local: What the exact tokens give them; with the log-sum where the memory `reads_log_sum`.
        """
        gate_BTH1 = F.silu(at_least_float32(self.g_proj(x_BTD)))[..., None]
        if self.norm_per_head:
            return rms_norm(read_BTHV, self._norm) * gate_BTH1
        return rms_norm((read_BTHV * gate_BTH1).flatten(-2), self._norm).view_as(read_BTHV)

    def project_out(self, read_BTHV: torch.Tensor, x_BTD: torch.Tensor, local: Attended) -> torch.Tensor:
        """What the memory adds to the attention output before the model's own output projection.

        Args:
            read_BTHV: As for `gated`.
            x_BTD: The same.
            local: The same.

        Returns:
            `[B, T, H, V]` in the dtype of the model. Zero wherever the state was still empty.
        """
        return self._projected(self.gated(read_BTHV, x_BTD, local))

    def _projected(self, gated_BTHV: torch.Tensor) -> torch.Tensor:
        """Each head by its output projection, in the dtype of the model."""
        gated_BTHV = gated_BTHV.to(self.o_proj.dtype)
        out_HXV = torch.bmm(gated_BTHV.flatten(0, 1).transpose(0, 1), self.o_proj)
        return out_HXV.transpose(0, 1).view(gated_BTHV.shape)

    def decode_add(
        self,
        local: Attended,
        q_B1HK: torch.Tensor,
        x_B1D: torch.Tensor,
        state: torch.Tensor,
        rows_B: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The attention output of one token with what the memory adds to it, `[B, 1, H, V]`; for decoding.

        Args:
            local: As for `gated`; its output may be overwritten.
            q_B1HK: The token's query, `[B, 1, H, K]`.
            x_B1D: Input of the attention layer, `[B, 1, D]`.
            state: The state, `[B, *state_shape()]` float32; with `rows_B` that of any rows.
            rows_B: Which of these rows is whose, int64; `None` where they are those of the batch.
        """
        weights, output = self.output_weights(), local.output
        if weights is not None and ops.decode_add_(output, q_B1HK, x_B1D, state, weights, rows_B, local.log_sum):
            return output
        state = state if rows_B is None else state[rows_B]
        return output + self._answer(q_B1HK, x_B1D, local, state).to(output.dtype)

    def _answer(self, q_B1HK: torch.Tensor, x_B1D: torch.Tensor, local: Attended, state: torch.Tensor) -> torch.Tensor:
        """What `decode_add` adds, in torch."""
        return self.project_out(self.read(q_B1HK, state), x_B1D, local)

    def output_weights(self) -> ops.OutputWeights | ops.LinearizedWeights | None:
        """What its output is computed from, for kernels; `None` where none serves it."""
        gate, key_first = self.g_proj, self.rule == "delta"
        return ops.OutputWeights(
            gate.weight, gate.bias, self._norm, self.o_proj, self._scale, self.norm_per_head, key_first
        )

    def is_plain(self) -> bool:
        """Whether its weights can be taken without calling its maps: nothing has replaced, wrapped or hooked them.

        Adapters of other libraries, quantised or offloaded weights and hooks act where a module is called.
        """
        weight = self._parameters.get("o_proj")
        if type(weight) is not nn.Parameter or weight.is_meta:
            return False
        return are_plain(self._modules, ("g_proj", *self.projections))

    @property
    def state_products(self) -> int:
        """Products of a vector with a head's state, `2 K V` FLOPs each, of writing one token and reading once.

        The delta rule takes one more: it reads what the state holds for the key before it writes.
        """
        return 3 if self.rule == "delta" else 2

    @property
    def write_products(self) -> int:
        """Products of numbers, beside those with the state, of writing one token once its gates are known."""
        return 0

    def state_shape(self) -> tuple[int, int, int]:
        """Shape of one sequence's state: `[H, K, V]` by the delta rule, `[H, V, K]` by the additive one."""
        _, heads, _, key_size, value_size = self.shape
        return (heads, key_size, value_size) if self.rule == "delta" else (heads, value_size, key_size)

    def empty_state(self, batch: int, device: torch.device) -> torch.Tensor:
        """An empty state, `[B, *state_shape()]` float32."""
        return torch.zeros(batch, *self.state_shape(), device=device)

    def linear_maps(self, state: torch.Tensor) -> torch.Tensor:
        """The matrices from queries to what they read in a state, `[B, H, ...]`, for a look at how full it is."""
        return state

    @property
    def _norm(self) -> nn.Parameter:
        """Weight of the norm, under the name that published checkpoints give it."""
        return self.o_norm if self.norm_per_head else self.norm

    @property
    def _scale(self) -> float:
        """Length of queries when they read."""
        return float(self.shape.key_size**-0.5) if self.rule == "delta" else 1.0

    def _queries(self, q_BTHK: torch.Tensor) -> torch.Tensor:
        """Queries as they read, `[B, T, H, K]`, at least in float32."""
        return unit(q_BTHK) * self._scale if self.rule == "delta" else unit(q_BTHK)
