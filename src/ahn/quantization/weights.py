"""Weights that are stored in few bits, and multiplied as the float32 weights that they stand for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional

from ahn import native
from ahn.errors import ModelError, ShapeError
from ahn.native import packed as kernels
from ahn.native.packed import PANEL_ROWS, DescribedWeight, Packed
from ahn.quantization.groups import Bits, Groups, pack_spans, spans, unpack

_NUMBERS_AT_ONCE = 2**21  # of a weight that are float32 at the same time in a product of many rows
_NOTHING = torch.empty(0)


@dataclass(frozen=True)
class WeightFacts:
    """What is known of a weight that does not exist as a tensor.

    Attributes:
        shape: `[N, D]`.
        device: Where its codes lie.
        dtype: What it is multiplied in.
    """

    shape: torch.Size
    device: torch.device
    dtype: torch.dtype = torch.float32

    @property
    def data(self) -> NoReturn:
        """Its numbers, which can be neither changed nor merged with those of an adapter.

        Raises:
            ModelError: Always.
        """
        raise ModelError(
            "a weight that is stored in few bits cannot be changed: keep the adapter beside the model, or load the "
            "model without quantize to merge them"
        )

    @property
    def is_cuda(self) -> bool:
        """Whether it lies on a GPU."""
        return self.device.type == "cuda"

    @property
    def is_cpu(self) -> bool:
        """Whether it lies in main memory."""
        return self.device.type == "cpu"

    def numel(self) -> int:
        """Numbers of the weight."""
        return self.shape.numel()


class StoredWeight(nn.Module, ABC):
    """A frozen weight `[N, D]` in few bits. Its buffers are whole numbers, which no change of dtype touches.

    Args:
        rows: N.
        columns: D.
    """

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.rows, self.columns = rows, columns

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where it lies."""

    @abstractmethod
    def span(self, start: int, stop: int) -> Tensor:
        """Rows start..stop-1 as float32, `[stop - start, D]`; start is a multiple of `PANEL_ROWS`."""

    @abstractmethod
    def lookup(self, indices: Tensor) -> Tensor:
        """Rows by their indices as float32, `[..., D]`."""

    @abstractmethod
    def multiply_few(self, x: Tensor, bias_N: Tensor | None) -> Tensor | None:
        """A linear map of a few vectors by a kernel, `[..., N]`, or `None` where no kernel can do it."""

    @property
    def facts(self) -> WeightFacts:
        """Shape, device and dtype."""
        return WeightFacts(torch.Size((self.rows, self.columns)), self.device)

    def dequantize(self) -> Tensor:
        """The whole weight, `[N, D]` float32."""
        return self.span(0, self.rows)

    def multiply(self, x: Tensor, bias_N: Tensor | None) -> Tensor:
        """A linear map, `[..., N]`. Gradients flow to x and to the bias.

        Args:
            x: Vectors, `[..., D]` float32.
            bias_N: The bias, if there is one.
        """
        few = self.multiply_few(x, bias_N) if x.numel() <= kernels.MOST_ROWS * self.columns else None
        if few is not None:
            return few
        product: Tensor = _Product.apply(x.reshape(-1, self.columns), self)
        out = product.view(*x.shape[:-1], self.rows)
        return out if bias_N is None else out + bias_N

    def spans(self) -> list[tuple[int, int]]:
        """Spans of rows which are float32 at the same time in a product of many rows."""
        return [(span.start, span.stop) for span in spans(self.rows, self.columns, _NUMBERS_AT_ONCE)]


class _Product(torch.autograd.Function):
    """x W^T for many rows of x: a span of rows of W is dequantised into the cache and multiplied there."""

    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, weight: StoredWeight) -> Tensor:
        ctx.weight = weight
        spans = weight.spans()
        if len(spans) == 1:
            return functional.linear(x_MD, weight.dequantize())
        out = x_MD.new_empty(x_MD.size(0), weight.rows)
        for start, stop in spans:
            torch.mm(x_MD, weight.span(start, stop).t(), out=out[:, start:stop])
        return out

    @staticmethod
    def backward(ctx: Any, gradient_MN: Tensor) -> tuple[Tensor, None]:
        weight: StoredWeight = ctx.weight
        gradient_MN = gradient_MN.float()  # autocast gives it in half precision
        total = gradient_MN.new_zeros(gradient_MN.size(0), weight.columns)
        for start, stop in weight.spans():
            total.addmm_(gradient_MN[:, start:stop], weight.span(start, stop))
        return total, None


class GroupedWeight(StoredWeight):
    """A weight of 4 or 8 bits in groups with scale and minimum.

    Args:
        groups: What it is made of, or spans of its rows one after the other, each but the last of whole panels.
        bits: Of a code.
        rows: N, for spans of rows.

    Raises:
        ShapeError: There are more or fewer spans than rows, or nothing says how many rows there are.
    """

    codes: Tensor
    scale_bits: Tensor
    minimum_bits: Tensor

    def __init__(self, groups: Groups | Iterable[Groups], bits: Bits, rows: int | None = None) -> None:
        if isinstance(groups, Groups):
            rows, groups = groups.codes_NGC.size(0), [groups]
        if rows is None:
            raise ShapeError("spans of a weight need its number of rows")
        packed = pack_spans(groups, rows, bits)
        super().__init__(rows, packed.codes[0, :, :, 0].numel() * (32 // bits))
        self.bits = bits
        self.halved = packed.scales.dtype is torch.float16
        whole = torch.int16 if self.halved else torch.int32
        self.register_buffer("codes", packed.codes)
        self.register_buffer("scale_bits", packed.scales.view(whole))
        self.register_buffer("minimum_bits", packed.minima.view(whole))
        self._described: tuple[tuple[int, ...], DescribedWeight] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """All but addresses, which a copy does not share."""
        return {**self.__dict__, "_described": None}

    def described(self) -> DescribedWeight | None:
        """The weight as the kernels take it, made once; `None` where they cannot."""
        parts = self.codes, self.scale_bits, self.minimum_bits
        addresses = tuple(part.data_ptr() for part in parts)
        if self._described is not None and self._described[0] == addresses and native.ready():
            return self._described[1]
        if not kernels.can_multiply(_NOTHING, *parts):
            return None
        self._described = addresses, kernels.describe(self.packed)
        return self._described[1]

    @property
    def device(self) -> torch.device:
        """See `StoredWeight.device`."""
        return self.codes.device

    @property
    def packed(self) -> Packed:
        """As the kernels read it."""
        real = torch.float16 if self.halved else torch.float32
        return Packed(self.codes, self.scale_bits.view(real), self.minimum_bits.view(real), self.bits)

    def span(self, start: int, stop: int) -> Tensor:
        """See `StoredWeight.span`."""
        if (described := self.described()) is not None:
            return kernels.unpack(described, start, stop)
        first = start // PANEL_ROWS
        return unpack(self.packed, slice(first, -(-stop // PANEL_ROWS)), slice(None))[: stop - start]

    def lookup(self, indices: Tensor) -> Tensor:
        """See `StoredWeight.lookup`."""
        flat = indices.flatten()
        if flat.numel() == 1 and flat.is_cpu:
            first = int(flat) // PANEL_ROWS * PANEL_ROWS
            row = self.span(first, min(first + PANEL_ROWS, self.rows))[int(flat) - first]
            return row.view(*indices.shape, self.columns)
        rows = unpack(self.packed, flat // PANEL_ROWS, flat % PANEL_ROWS)
        return rows.view(*indices.shape, self.columns)

    def multiply_few(self, x: Tensor, bias_N: Tensor | None) -> Tensor | None:
        """See `StoredWeight.multiply_few`."""
        if not _is_plain(x, bias_N) or not native.ready(x.detach()) or (described := self.described()) is None:
            return None
        return kernels.multiply(x, described, bias_N, self.rows)


class HalfWeight(StoredWeight):
    """A weight in bfloat16.

    Args:
        weight_ND: The weight; rounded where it is not bfloat16.
    """

    weight_bits: Tensor

    def __init__(self, weight_ND: Tensor) -> None:
        super().__init__(*weight_ND.shape)
        self.register_buffer("weight_bits", weight_ND.detach().bfloat16().contiguous().view(torch.int16))

    @property
    def device(self) -> torch.device:
        """See `StoredWeight.device`."""
        return self.weight_bits.device

    def span(self, start: int, stop: int) -> Tensor:
        """See `StoredWeight.span`."""
        return self.weight_bits[start:stop].view(torch.bfloat16).float()

    def lookup(self, indices: Tensor) -> Tensor:
        """See `StoredWeight.lookup`."""
        return self.weight_bits[indices].view(torch.bfloat16).float()

    def multiply_few(self, x: Tensor, bias_N: Tensor | None) -> Tensor | None:
        """See `StoredWeight.multiply_few`."""
        weight = self.weight_bits.view(torch.bfloat16)
        if self.columns % PANEL_ROWS or not _is_plain(x, bias_N) or not kernels.can_multiply(x, weight):
            return None
        return kernels.multiply_half(x, weight, bias_N)


def _is_plain(x: Tensor, bias: Tensor | None) -> bool:
    """Whether no gradient is asked for, and the bias is one that a kernel takes."""
    asked = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    return not asked and (bias is None or (bias.dtype is torch.float32 and bias.is_cpu and bias.is_contiguous()))
