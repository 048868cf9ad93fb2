"""Which modules of a model are quantised, and their exchange."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NoReturn, get_args

from torch import Tensor, nn

from ahn.config import Quantize
from ahn.errors import ModelError
from ahn.quantization.groups import fits, round_to_groups, spans
from ahn.quantization.layers import QuantizedEmbedding, QuantizedLinear
from ahn.quantization.weights import GroupedWeight, HalfWeight, StoredWeight

QUANTIZE = get_args(Quantize)
"""The formats of weights by name."""
_NUMBERS_AT_ONCE = 2**22  # of a weight that are rounded at the same time


def check_quantize(name: object) -> Quantize:
    """Checks the name of a format.

    Raises:
        ModelError: There is no such format.
    """
    if name not in QUANTIZE:
        raise ModelError(f"quantize must be one of {', '.join(QUANTIZE)}, not {name!r}")
    return name  # type: ignore[return-value]


def store(weight_ND: Tensor, quantize: Quantize, of_words: bool = False) -> StoredWeight:
    """A weight in a format.

    Args:
        weight_ND: The weight, in any floating dtype.
        quantize: The format.
        of_words: Whether it is an embedding or the head, which take 8 bits where the layers take 4.
    """
    if quantize == "bf16":
        return HalfWeight(weight_ND)
    bits: Literal[4, 8] = 4 if quantize == "int4" and not of_words else 8
    weight_ND = weight_ND.detach()
    parts = (
        round_to_groups(weight_ND[span], bits) for span in spans(weight_ND.size(0), weight_ND.size(1), _NUMBERS_AT_ONCE)
    )
    return GroupedWeight(parts, bits, weight_ND.size(0))


class Slot:
    """A weight of a model that can be quantised, and all modules that use it.

    Args:
        parameter: The weight.

    Attributes:
        owners: Each module with its parent and its name there.
        of_words: Whether it is an embedding's or the head's.
    """

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter
        self.owners: list[tuple[nn.Module, str, Any]] = []
        self.of_words = False

    def fill(self, stored: StoredWeight) -> None:
        """Puts modules that use the stored weight in place of those that use the parameter."""
        for parent, name, module in self.owners:
            new: nn.Module
            if isinstance(module, nn.Embedding):
                new = QuantizedEmbedding(stored, module.padding_idx)
            else:
                new = QuantizedLinear(stored, module.bias)
            setattr(parent, name, new.train(module.training))


def slots(model: nn.Module) -> list[Slot]:
    """The weights of a model that can be quantised: those of plain linear maps and embeddings, whose rows fit.

    A weight that something else uses too stays as it is.
    """
    by_weight: dict[int, Slot] = {}
    others: set[int] = set()
    find_head: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = find_head()
    for parent in model.modules():
        for name, module in parent.named_children():
            weight: Any = getattr(module, "weight", None)
            if type(module) in (nn.Linear, nn.Embedding) and fits(weight.size(1)):
                slot = by_weight.setdefault(id(weight), Slot(weight))
                slot.owners.append((parent, name, module))
                slot.of_words |= module is head or isinstance(module, nn.Embedding)
            else:
                others |= {id(parameter) for parameter in module.parameters(recurse=False)}
    return [slot for key, slot in by_weight.items() if key not in others]


def is_quantized(model: nn.Module) -> bool:
    """Whether some weights of a model are stored in few bits."""
    return any(isinstance(module, StoredWeight) for module in model.modules())


def refuse_saving(*args: Any, **kwargs: Any) -> NoReturn:
    """Stands in for `save_pretrained` of a quantised model: transformers has no format for such weights.

    Raises:
        ModelError: Always.
    """
    raise ModelError(
        "the weights of this model are stored in few bits, which save_pretrained cannot write: load it without "
        "quantize to save it whole, or write its memory alone with ahn.save(model, path)"
    )


def quantize_model(model: nn.Module, quantize: Quantize, choose: Callable[[Slot], bool] = lambda _: True) -> None:
    """Quantises the weights of a loaded model, one after the other.

    Args:
        model: The model.
        quantize: The format.
        choose: Says which weights to take.
    """
    for slot in slots(model):
        if choose(slot):
            slot.fill(store(slot.parameter, quantize, slot.of_words))
    model.__dict__["save_pretrained"] = refuse_saving
