"""Weights in few bits: formats, the layers that use them, and how a model gets them."""

from ahn.config import Quantize
from ahn.quantization.groups import Groups, round_to_groups
from ahn.quantization.layers import QuantizedEmbedding, QuantizedLinear
from ahn.quantization.model import (
    QUANTIZE,
    Slot,
    check_quantize,
    is_quantized,
    quantize_model,
    refuse_saving,
    slots,
    store,
)
from ahn.quantization.weights import GroupedWeight, HalfWeight, StoredWeight

__all__ = [
    "QUANTIZE",
    "GroupedWeight",
    "Groups",
    "HalfWeight",
    "Quantize",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "Slot",
    "StoredWeight",
    "check_quantize",
    "is_quantized",
    "quantize_model",
    "refuse_saving",
    "round_to_groups",
    "slots",
    "store",
]
