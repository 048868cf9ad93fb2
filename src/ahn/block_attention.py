"""Local attention with gradients: block by block in both directions, so that nothing is kept of a block.

Autograd would keep the keys and values of every block, and fill a tensor as large as all queries for each of them on
the way back. Here the backward pass adds what a block contributes in place. For the CPU; elsewhere autograd serves.

Legend of shapes: B batch, T queries, H query heads, G key/value heads (H = r * G), K key size, V value size,
W tokens of the window, S sinks, N extra keys, M keys of a block.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

_FORWARD = "_scaled_dot_product_flash_attention_for_cpu"
_BACKWARD = "_scaled_dot_product_flash_attention_for_cpu_backward"


class Block(NamedTuple):
    """Some consecutive queries and what they read, the same in all layers of a call.

    Attributes:
        rows: The queries, of all T.
        reach: Tokens of the window that some of them read, of all W.
        extra: Extra keys that some of them read, `[n]` int64, of all N.
        mask: Additive, `[r * queries, M]`, over those of the window, then the sinks, then the extra keys.
    """

    rows: slice
    reach: slice
    extra: torch.Tensor
    mask: torch.Tensor


class Keys(NamedTuple):
    """Keys or values of everything that may be read, `[B, G, W, K]`, `[B, G, S, K]` and `[B, G, N, K]`."""

    window: torch.Tensor
    sinks: torch.Tensor
    extra: torch.Tensor

    def of(self, block: Block) -> torch.Tensor:
        """Those of a block, `[B, G, M, K]`."""
        parts = [self.window[:, :, block.reach], self.sinks, self.extra.index_select(2, block.extra)]
        return torch.cat(parts, dim=2)

    def zeros(self) -> Keys:
        """Zeros of the same shapes, float32."""
        return Keys(*(torch.zeros_like(part, dtype=torch.float32) for part in self))

    def add(self, block: Block, gradient_BGMK: torch.Tensor) -> None:
        """Adds to those of a block."""
        sizes = [block.reach.stop - block.reach.start, self.sinks.size(2), block.extra.numel()]
        window, sinks, extra = gradient_BGMK.split(sizes, dim=2)
        self.window[:, :, block.reach] += window
        self.sinks.add_(sinks)
        self.extra.index_add_(2, block.extra, extra.float())


def can_attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether this is of use for a call: on a CPU, with gradients, where torch has the kernels."""
    there = hasattr(torch.ops.aten, _FORWARD) and hasattr(torch.ops.aten, _BACKWARD)
    needed = torch.is_grad_enabled() and any(each.requires_grad for each in (query, key, value))
    return there and needed and query.device.type == "cpu" and key.size(-1) == value.size(-1)


def block_attention(
    q_BHTK: torch.Tensor, keys: Keys, values: Keys, blocks: list[Block], scaling: float
) -> torch.Tensor:
    """One softmax over window, sinks and extra keys, `[B, H, T, V]`.

    Args:
        q_BHTK: Queries.
        keys: Keys.
        values: Values.
        blocks: The queries in blocks, in their order.
        scaling: Factor on the products of queries and keys.
    """
    tensors: tuple[torch.Tensor, ...] = (q_BHTK, *keys, *values)
    if torch.is_autocast_enabled("cpu"):
        tensors = tuple(tensor.to(torch.get_autocast_dtype("cpu")) for tensor in tensors)
    out: torch.Tensor = _Blocks.apply(blocks, scaling, *tensors)
    return out


class _Blocks(torch.autograd.Function):
    """The fused kernel on every block, query heads stacked on their kv head."""

    @staticmethod
    def forward(ctx: Any, blocks: list[Block], scaling: float, *tensors: torch.Tensor) -> torch.Tensor:
        query, keys, values = tensors[0], Keys(*tensors[1:4]), Keys(*tensors[4:7])
        outputs, log_sums = [], []
        for block in blocks:
            rows = query[:, :, block.rows]
            stacked, ours, theirs = _stacked(rows, keys.window.size(1)), keys.of(block), values.of(block)
            kernel = getattr(torch.ops.aten, _FORWARD)
            out, log_sum = kernel(stacked, ours, theirs, 0.0, False, attn_mask=block.mask, scale=scaling)
            outputs.append(out.reshape(*rows.shape[:3], -1))
            log_sums.append(log_sum)
        out = torch.cat(outputs, dim=2)
        ctx.save_for_backward(*tensors, out, *log_sums)
        ctx.blocks, ctx.scaling = blocks, scaling
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        query, *others = ctx.saved_tensors
        others, out, log_sums = others[:6], others[6], others[7:]
        keys, values, groups = Keys(*others[:3]), Keys(*others[3:]), others[0].size(1)
        to_query, to_keys, to_values = torch.empty_like(query), keys.zeros(), values.zeros()
        kernel = getattr(torch.ops.aten, _BACKWARD)
        for block, log_sum in zip(ctx.blocks, log_sums, strict=True):
            each = (_stacked(tensor[:, :, block.rows], groups) for tensor in (gradients[0], query, out))
            gradient, stacked, output = each
            q, k, v = kernel(
                gradient,
                stacked,
                keys.of(block),
                values.of(block),
                output,
                log_sum,
                0.0,
                False,
                attn_mask=block.mask,
                scale=ctx.scaling,
            )
            to_query[:, :, block.rows] = q.reshape(to_query[:, :, block.rows].shape)
            to_keys.add(block, k)
            to_values.add(block, v)
        return None, None, to_query, *(part.to(query.dtype) for part in (*to_keys, *to_values))


def _stacked(x_BHTK: torch.Tensor, groups: int) -> torch.Tensor:
    """Query heads stacked on their kv head, `[B, G, r * T, K]`."""
    return x_BHTK.reshape(x_BHTK.size(0), groups, -1, x_BHTK.size(3))
