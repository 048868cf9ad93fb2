"""The contract of a memory: gates from the hidden state, a scan over evicted tokens, a read-out.

Legend of shapes: B batch, T tokens, D hidden size, H query heads, G key/value heads, K key size, V value size,
N gates per head.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import nn

from ahn import native


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


class Gating(NamedTuple):
    """What the gates of tokens do to the state, in numbers that people can read.

    Attributes:
        write_BTH: How strongly each token is written, `[B, T, H]`, at least 0: beta of the delta rules, in (0, 1), or
            the step dt of Mamba2.
        decay_BTH: Share of the state that each token lets live, `[B, T, H]`, in (0, 1]; `None` where nothing decays.
    """

    write_BTH: torch.Tensor
    decay_BTH: torch.Tensor | None


class Memory(nn.Module, abc.ABC):
    """A recurrent network that folds evicted tokens into a state of fixed size and answers queries from it.

    It reuses the attention's own queries, keys and values and learns only gates and a read-out. A subclass declares
    `gate_count` and `state_products` and implements `gates`, `gating`, `scan`, `gated_norm` and `state_shape`; gates of
    zero must leave the state unchanged, which is how padding is kept out of it. `gates_of_layers`, `update`, `read`,
    `decode_add` and `output_weights` serve decoding and follow from these; a subclass has its own only to be fast.
    The output projection starts at zero, so that an untrained memory changes nothing.

    Args:
        shape: Sizes of the attention layer.

    Attributes:
        gate_count: Gates per token and head, N, each a projection of the hidden state.
        state_products: Products of a vector with a head's state, `2 K V` FLOPs each, that folding one token in and
            reading once take together.

    Source: arXiv 2510.07318, section 3.2.
    """

    gate_count: ClassVar[int]
    state_products: ClassVar[int]

    def __init__(self, shape: MemoryShape) -> None:
        super().__init__()
        self.shape = shape
        self.o_proj = nn.Parameter(torch.zeros(shape.query_heads, shape.value_size, shape.value_size))

    @abc.abstractmethod
    def state_shape(self) -> tuple[int, int, int]:
        """Shape of one sequence's state, `[H, K, V]` or as the memory documents."""

    @abc.abstractmethod
    def gates(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Gates of tokens, computed when they are current and applied when they leave the window.

        Args:
            x_BTD: Input of the attention layer, `[B, T, D]`, after the layer's input norm.

        Returns:
            Gates, `[B, T, N, H]`, float32 (float64 for a float64 model).
        """

    @abc.abstractmethod
    def gating(self, gates_BTNH: torch.Tensor) -> Gating:
        """What gates do to the state.

        Args:
            gates_BTNH: Gates as `gates` gives them, `[B, T, N, H]`.
        """

    @abc.abstractmethod
    def scan(
        self,
        q_BTHK: torch.Tensor,
        k_BTGK: torch.Tensor,
        v_BTGV: torch.Tensor,
        gates_BTNH: torch.Tensor,
        state: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Folds evicted tokens into the state one after the other, reading it after each.

        Args:
            q_BTHK: Queries that read, `[B, T, H, K]`: query t reads after evicted token t was folded in.
            k_BTGK: Keys of the evicted tokens, `[B, T, G, K]`.
            v_BTGV: Values of the evicted tokens, `[B, T, G, V]`.
            gates_BTNH: Their gates, `[B, T, N, H]`.
            state: State before the first of them, `[B, *state_shape()]` float32, or `None` for an empty memory.

        Returns:
            What each query read, `[B, T, H, V]` float32, and the state after the last token.
        """

    @classmethod
    def gates_of_layers(cls, memories: Sequence[Memory], x_LBD: torch.Tensor) -> torch.Tensor:
        """Gates of one token in several layers at once, as `gates` gives them one by one; for decoding, no gradients.

        Args:
            memories: The memories of L layers, of one kind and shape.
            x_LBD: Inputs of their attention layers at the token, `[L, B, D]`.

        Returns:
            Gates, `[L, B, N, H]`, float32 (float64 for a float64 model).
        """
        return torch.stack([memory.gates(x_BD[:, None])[:, 0] for memory, x_BD in zip(memories, x_LBD, strict=True)])

    @classmethod
    def update(
        cls,
        memories: Sequence[Memory],
        k_LBGK: torch.Tensor,
        v_LBGV: torch.Tensor,
        gates_LBNH: torch.Tensor,
        state_LB: torch.Tensor,
    ) -> None:
        """Folds one evicted token into the states of several layers at once, in place; for decoding, no gradients.

        Args:
            memories: The memories of L layers, of one kind and shape.
            k_LBGK: The token's keys, `[L, B, G, K]`.
            v_LBGV: Its values, `[L, B, G, V]`.
            gates_LBNH: Its gates, `[L, B, N, H]`.
            state_LB: The states, `[L, B, *state_shape()]` float32, contiguous.
        """
        heads = memories[0].shape.query_heads
        q_B1HK = k_LBGK.new_zeros(k_LBGK.size(1), 1, heads, k_LBGK.size(3))
        for memory, k, v, gates, state in zip(memories, k_LBGK, v_LBGV, gates_LBNH, state_LB, strict=True):
            state.copy_(memory.scan(q_B1HK, k[:, None], v[:, None], gates[:, None], state)[1])

    def read(self, q_BTHK: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """What queries read from a state as it is, `[B, T, H, V]` float32; for decoding.

        Args:
            q_BTHK: Queries, `[B, T, H, K]`.
            state: The state, `[B, *state_shape()]` float32.
        """
        batch, length = q_BTHK.shape[:2]
        _, heads, kv_heads, key_size, value_size = self.shape
        key, value = (q_BTHK.new_zeros(batch, length, kv_heads, size) for size in (key_size, value_size))
        nothing = state.new_zeros(batch, length, self.gate_count, heads)
        return self.scan(q_BTHK, key, value, nothing, state)[0]

    def decode_add(
        self, local_B1HV: torch.Tensor, q_B1HK: torch.Tensor, x_B1D: torch.Tensor, state: torch.Tensor
    ) -> torch.Tensor:
        """The attention output of one token with what the memory adds to it, `[B, 1, H, V]`; for decoding.

        Args:
            local_B1HV: Output of the attention over exact tokens; it may be overwritten.
            q_B1HK: The token's query, `[B, 1, H, K]`.
            x_B1D: Input of the attention layer, `[B, 1, D]`.
            state: The state, `[B, *state_shape()]` float32.
        """
        how = self.output_weights()
        if how is not None and native.can_decode_add(local_B1HV, q_B1HK, x_B1D, state, how):
            native.decode_add_(local_B1HV, q_B1HK, x_B1D, state, how)
            return local_B1HV
        return local_B1HV + self.project_out(self.read(q_B1HK, state), x_B1D).to(local_B1HV.dtype)

    def output_weights(self) -> native.OutputWeights | None:
        """What the kernel of `decode_add` needs to know, or `None` where there is no kernel for this memory."""
        return None

    @abc.abstractmethod
    def gated_norm(self, read_BTHV: torch.Tensor, x_BTD: torch.Tensor) -> torch.Tensor:
        """Gated norm of what was read, `[B, T, H, V]` float32, before the output projection.

        Args:
            read_BTHV: What the queries read, `[B, T, H, V]` float32.
            x_BTD: Input of the attention layer at the *querying* tokens, `[B, T, D]`.
        """

    def project_out(self, read_BTHV: torch.Tensor, x_BTD: torch.Tensor) -> torch.Tensor:
        """What the memory adds to the attention output before its `o_proj`.

        Args:
            read_BTHV: What the queries read, `[B, T, H, V]` float32.
            x_BTD: Input of the attention layer at the querying tokens, `[B, T, D]`.

        Returns:
            `[B, T, H, V]` in the dtype of the model. Zero wherever the state was still empty.
        """
        normed_BTHV = self.gated_norm(read_BTHV, x_BTD).to(self.o_proj.dtype)
        out_HXV = torch.bmm(normed_BTHV.flatten(0, 1).transpose(0, 1), self.o_proj)
        return out_HXV.transpose(0, 1).view(normed_BTHV.shape)

    def empty_state(self, batch: int, device: torch.device) -> torch.Tensor:
        """An empty state, `[B, *state_shape()]` float32."""
        return torch.zeros(batch, *self.state_shape(), device=device)


def read_rows(q_BTHK: torch.Tensor, state_BHKV: torch.Tensor) -> torch.Tensor:
    """Queries times the state, `[B, T, H, V]`, in the dtype of the state."""
    return torch.matmul(q_BTHK.transpose(1, 2).to(state_BHKV.dtype), state_BHKV).transpose(1, 2)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """Root-mean-square norm over the last dimension, in the dtype of `x` (float32 or float64)."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.to(x.dtype)


def unit(x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """`x` scaled to length 1 along the last dimension, at least in float32; zeros stay zeros."""
    x = at_least_float32(x)
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """`x` in float32, or in float64 if it is that already."""
    return x if x.dtype == torch.float64 else x.float()


def inverse_softplus(y: torch.Tensor) -> torch.Tensor:
    """The x with softplus(x) = y, for y > 0."""
    return y + torch.log(-torch.expm1(-y))


def draw_decay(heads: int) -> nn.Parameter:
    """Published start of the decay rate per head, log U(0, 16), `[H]`."""
    return nn.Parameter(torch.empty(heads).uniform_(0, 16).clamp_(min=1e-4).log())


def draw_step(heads: int) -> nn.Parameter:
    """Published start of the step bias per head, `[H]`: softplus of it is log-uniform in (0.001, 0.1)."""
    low, high = torch.tensor(0.001).log(), torch.tensor(0.1).log()
    step = (torch.rand(heads) * (high - low) + low).exp()
    return nn.Parameter(inverse_softplus(step))


def project_layers(x_LBD: torch.Tensor, linears: Sequence[Sequence[nn.Linear]]) -> tuple[torch.Tensor, ...]:
    """Several linear maps of each layer's hidden state at once.

    Args:
        x_LBD: Hidden states of L layers, `[L, B, D]`.
        linears: For each layer its maps, from D to the same size each.

    Returns:
        What each of a layer's maps gives, `[L, B, H]`.
    """
    maps = [linear.weight for row in linears for linear in row]
    if native.can_multiply(*x_LBD.shape[1:]) and native.ready(x_LBD, *maps):
        return native.linear_each(x_LBD, maps).unbind(1)
    weights = torch.stack(maps)  # [L * maps, H, D]
    out_LBR = torch.bmm(x_LBD, weights.view(x_LBD.size(0), -1, x_LBD.size(2)).mT)
    return out_LBR.chunk(len(linears[0]), dim=-1)


def gate_projection(hidden_size: int, heads: int, bias: bool = False) -> nn.Linear:
    """A linear map from the hidden state to one number per head, started at N(0, 0.02)."""
    linear = nn.Linear(hidden_size, heads, bias=bias)
    nn.init.normal_(linear.weight, std=0.02)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear
