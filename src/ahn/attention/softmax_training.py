"""Local attention with gradients on a CPU: a backward pass of its own, so that nothing is kept of a block of queries.

Autograd would keep the keys and values of every block. On the way back it would fill a tensor as large as all queries
for each of them. Here the backward pass adds the gradients of a block in place. `softmax.py` does all other cases.

Legend of shapes: B batch, T queries, H query heads, G key/value heads (H = r * G), K key size, V value size,
W tokens of the window, S sinks, N extra keys, M keys of a block.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ahn.attention.call import Call, LocalRead
from ahn.attention.masks import beside, block_mask, extra_mask, read_by_any
from ahn.attention.softmax import block_size, log_sums
from ahn.tokens import Attended, VisibleKV

_FORWARD = "_scaled_dot_product_flash_attention_for_cpu"
_BACKWARD = "_scaled_dot_product_flash_attention_for_cpu_backward"


class QueryBlock(NamedTuple):
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

    def select(self, block: QueryBlock) -> torch.Tensor:
        """Those of a block, `[B, G, M, K]`."""
        parts = [self.window[:, :, block.reach], self.sinks, self.extra.index_select(2, block.extra)]
        return torch.cat(parts, dim=2)

    def zeros(self) -> Keys:
        """Zeros of the same shapes, float32."""
        return Keys(*(torch.zeros_like(part, dtype=torch.float32) for part in self))

    def add(self, block: QueryBlock, gradient_BGMK: torch.Tensor) -> None:
        """Adds to those of a block."""
        sizes = [block.reach.stop - block.reach.start, self.sinks.size(2), block.extra.numel()]
        window, sinks, extra = gradient_BGMK.split(sizes, dim=2)
        self.window[:, :, block.reach] += window
        self.sinks.add_(sinks)
        self.extra.index_add_(2, block.extra, extra.float())


def can_attend(local: LocalRead) -> bool:
    """Whether `attend` serves: gradients on a CPU, a plain softmax, rows that are all alike."""
    call, view, query, sink_query, softmax, _ = local
    if not torch.is_grad_enabled() or query.device.type != "cpu" or not view.ordered or sink_query is not None:
        return False
    key, value = view.local.keys, view.local.values
    needed = any(each.requires_grad for each in (query, key, value))
    has_kernels = hasattr(torch.ops.aten, _FORWARD) and hasattr(torch.ops.aten, _BACKWARD)
    alike = call.padding is None and (view.extra is None or view.extra.visible_from.size(0) == 1)
    return needed and has_kernels and alike and softmax.is_plain and key.size(3) == value.size(3)


def attend(local: LocalRead) -> Attended:
    """As `ahn.attention.softmax.attend`, and all products in the dtype of autocast where it is on.

    The call keeps the masks for its other layers. There is no `sink_query`, and the softmax is a plain one.
    """
    call, view, query, _, softmax, _ = local
    extra = view.sinks.span(0, 0) if view.extra is None else view.extra
    keys, values = (Keys(view.local[index], view.sinks[index], extra[index]) for index in (0, 1))
    tensors: tuple[torch.Tensor, ...] = (query, *keys, *values)
    if torch.is_autocast_enabled("cpu"):
        tensors = tuple(tensor.to(torch.get_autocast_dtype("cpu")) for tensor in tensors)
    like, repeats = tensors[0], query.size(1) // view.local.keys.size(1)
    name = f"blocks of {repeats} heads in {like.dtype} over {view.window}"  # the same in all such layers
    source = call.attachment if view.extra is None else view.extra.visible_from
    blocks = call.shared(name, source, lambda: _blocks(call, view, repeats, like))
    out: torch.Tensor = _Blocks.apply(blocks, softmax.scaling, *tensors)
    return Attended(out.transpose(1, 2), log_sums(local) if local.wants_log_sum else None)


def _blocks(call: Call, view: VisibleKV, repeats: int, like_BHTK: torch.Tensor) -> list[QueryBlock]:
    """The queries of a call in blocks, with what each reads."""
    first, size = view.seen - like_BHTK.size(2), block_size(view.window, like_BHTK)
    blocks = []
    for start in range(first, view.seen, size):
        stop = min(start + size, view.seen)
        keys_from = max(view.first, start - view.window + 1)
        mask = block_mask(call, view, (start, stop), keys_from, repeats, like_BHTK)
        extra_indices = torch.zeros(0).long()
        if view.extra is not None:
            extra_indices = read_by_any(view.extra, start, stop).nonzero().flatten()
            mask = beside(mask, extra_mask(view.extra, (start, stop), repeats, like_BHTK)[:, extra_indices])
        reach = slice(keys_from - view.first, max(keys_from, stop) - view.first)
        blocks.append(QueryBlock(slice(start - first, stop - first), reach, extra_indices, mask))
    return blocks


class _Blocks(torch.autograd.Function):
    """The fused kernel on every block, query heads stacked on their kv head."""

    @staticmethod
    def forward(ctx: Any, blocks: list[QueryBlock], scaling: float, *tensors: torch.Tensor) -> torch.Tensor:
        query, keys, values = tensors[0], Keys(*tensors[1:4]), Keys(*tensors[4:7])
        outputs, log_sums = [], []
        for block in blocks:
            rows = query[:, :, block.rows]
            stacked, ours, theirs = _stacked(rows, keys.window.size(1)), keys.select(block), values.select(block)
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
                keys.select(block),
                values.select(block),
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
