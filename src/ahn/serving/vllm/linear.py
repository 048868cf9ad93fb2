"""vLLM's linear maps while few tokens are read, and as the kernels of whole decoder layers take them.

vLLM packs the weights for its own products on a CPU and frees them. The kernels read them as they were loaded. So the
maps of decoder layers that the kernels take keep these weights, and none are held twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from ahn import native
from ahn.attention.decoder_parts import Activation, PartReader, activation_of
from ahn.native.layer import LinearWeight

_MERGED = {"qkv_proj": ("query", "key", "value"), "gate_up_proj": ("gate", "up")}
"""Maps that vLLM makes one of, by the names in `LayerWeights`."""


class LoadedWeights(UnquantizedLinearMethod):  # type: ignore[misc]
    """How vLLM multiplies by a weight that stays as it was loaded."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """See vLLM's `QuantizeMethodBase`: packs nothing."""
        layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """See vLLM's `LinearMethodBase`."""
        few = _by_kernel(layer, x, bias)
        return functional.linear(x, layer.weight, bias) if few is None else few


class LoadedHead(UnquantizedEmbeddingMethod):  # type: ignore[misc]
    """How vLLM multiplies by the weight of a head, which it keeps beside a packed one."""

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """See vLLM's `QuantizeMethodBase`."""
        few = _by_kernel(layer, x, bias)
        return super().apply(layer, x, bias) if few is None else few


def _by_kernel(layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
    """The product with a few vectors; `None` where the kernels do not take it."""
    size = x.size(-1)
    tensors = (x, layer.weight) if bias is None else (x, layer.weight, bias)
    if not native.can_multiply(x.numel() // size, size) or not native.ready(*tensors):
        return None
    return native.linear(x, layer.weight, bias)


def keep_weights(layers: Iterable[nn.Module], head: nn.Module | None) -> None:
    """Lets linear maps keep their weights as they are loaded. Called before vLLM packs them.

    Args:
        layers: The decoder layers that the kernels take.
        head: The map from the last layer to logits, or `None` where this process has none.
    """
    for layer in layers:
        for module in layer.modules():
            if isinstance(module, LinearBase) and type(module.quant_method) is UnquantizedLinearMethod:
                module.quant_method = LoadedWeights()
    if head is not None and type(getattr(head, "quant_method", None)) is UnquantizedEmbeddingMethod:
        head.quant_method = LoadedHead()


class ServedReader(PartReader):
    """Reads the weights of a decoder layer off vLLM's modules, of which one may hold several maps."""

    def maps(self, parent: nn.Module, names: Mapping[str, str]) -> tuple[dict[str, LinearWeight], set[str]]:
        """See `PartReader.maps`."""
        maps: dict[str, LinearWeight] = {}
        children: set[str] = set()
        for child, parts in _MERGED.items():
            if child in parent._modules and set(parts) <= set(names):
                maps |= dict(zip(parts, _split(parent._modules[child]), strict=True))
                children.add(child)
        for name in names.keys() - maps.keys():
            (maps[name],) = _split(parent._modules.get(names[name]))
            children.add(names[name])
        return maps, children

    def knows(self, module: nn.Module) -> bool:
        """See `PartReader.knows`: vLLM rewrites the forward of a module for the maps that it makes one of."""
        return not _MERGED.keys().isdisjoint(module._modules)

    def activation(self, mlp: Any) -> Activation:
        """See `PartReader.activation`; vLLM's take both halves of what they multiply."""
        if "gate_up_proj" not in mlp._modules:
            return super().activation(mlp)
        return activation_of(lambda x: mlp.act_fn(torch.cat((x, torch.ones_like(x)), dim=-1)))


def _split(module: Any) -> list[LinearWeight]:
    """The maps that one of vLLM's holds, in their order.

    Raises:
        LookupError: The kernels do not take them.
    """
    is_plain = isinstance(module, LinearBase) and isinstance(module.quant_method, UnquantizedLinearMethod)
    weight = module.weight.data if is_plain else None
    if weight is None or weight.dim() != 2 or not native.ready(weight) or not weight.is_contiguous():
        raise LookupError("a linear map holds no weights that the kernels take")
    if module.tp_size > 1 or getattr(module, "skip_bias_add", False):
        raise LookupError("a linear map gives a part of its output")
    sizes = list(getattr(module, "output_sizes", [weight.size(0)]))
    bias = None if module.bias is None else module.bias.data
    biases = [None] * len(sizes) if bias is None else bias.split(sizes)
    return [LinearWeight(w, w.size(0), b) for w, b in zip(weight.split(sizes), biases, strict=True)]
