"""Linear maps and embeddings whose weight is stored in few bits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ahn.quantization.weights import StoredWeight, WeightFacts


class QuantizedLinear(nn.Linear):
    """A linear map with a frozen weight in few bits; what it gives is float32 work in the dtype of its input.

    It is a kind of `nn.Linear`, so that peft puts its adapters on it.

    Args:
        stored: The weight; several modules may hold the same one.
        bias: The bias, if there is one.
    """

    def __init__(self, stored: StoredWeight, bias: Tensor | None = None) -> None:
        nn.Module.__init__(self)  # that of nn.Linear would make the weight
        self.stored = stored
        self.in_features, self.out_features = stored.columns, stored.rows
        self.bias = None if bias is None else nn.Parameter(bias.detach().float(), requires_grad=False)  # type: ignore[assignment]

    @property
    def weight(self) -> WeightFacts:  # type: ignore[override]
        """What is known of the weight; `dequantize` makes it."""
        return self.stored.facts

    def dequantize(self) -> Tensor:
        """The weight, `[N, D]` float32, made anew."""
        return self.stored.dequantize()

    def forward(self, x: Tensor) -> Tensor:
        """The map of vectors `[..., D]`, `[..., N]`."""
        out = self.stored.multiply(x.float(), None if self.bias is None else self.bias.float())
        return out.to(x.dtype)

    def extra_repr(self) -> str:
        """Sizes, for people."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class QuantizedEmbedding(nn.Module):
    """An embedding with a frozen weight in few bits.

    Args:
        stored: The weight; the head of a model may hold the same one.
        padding_idx: As of `nn.Embedding`.
    """

    def __init__(self, stored: StoredWeight, padding_idx: int | None = None) -> None:
        super().__init__()
        self.stored, self.padding_idx = stored, padding_idx
        self.num_embeddings, self.embedding_dim = stored.rows, stored.columns

    @property
    def weight(self) -> WeightFacts:
        """What is known of the weight; `dequantize` makes it."""
        return self.stored.facts

    def dequantize(self) -> Tensor:
        """The weight, `[N, D]` float32, made anew."""
        return self.stored.dequantize()

    def forward(self, ids: Tensor) -> Tensor:
        """Rows of the weight, `[..., D]` float32.

        Raises:
            IndexError: An id is none of a row.
        """
        if ids.is_cpu and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.num_embeddings:
            raise IndexError(f"index out of range: the embedding has {self.num_embeddings} rows")
        return self.stored.lookup(ids.to(torch.int64))

    def extra_repr(self) -> str:
        """Sizes, for people."""
        return f"{self.num_embeddings}, {self.embedding_dim}"
