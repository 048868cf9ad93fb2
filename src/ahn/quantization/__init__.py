"""Weights in few bits: formats, the layers that use them, and how a model gets them."""

from ahn.quantization.groups import Groups, round_to_groups
from ahn.quantization.layers import QuantizedEmbedding, QuantizedLinear
from ahn.quantization.model import QUANTIZE, Quantize, check_quantize, quantize_model, slots, store
from ahn.quantization.weights import GroupedWeight, HalfWeight, StoredWeight

__all__ = [
    "QUANTIZE",
    "GroupedWeight",
    "Groups",
    "HalfWeight",
    "Quantize",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "StoredWeight",
    "check_quantize",
    "quantize_model",
    "round_to_groups",
    "slots",
    "store",
]
