"""Decoder layers of the usual build: norm, attention with rotary positions, norm, gated MLP.

Which parts a layer has is read off its modules by the names that most families give them. Whether it computes what
these parts suggest is for the caller to verify.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional

from ahn import native
from ahn.attention.module_state import ModuleState
from ahn.backbone import linear
from ahn.backbone.survey import norm_epsilon
from ahn.memories import Memory
from ahn.native.layer import LayerWeights, LinearWeight, NormWeight
from ahn.quantization import GroupedWeight, HalfWeight, QuantizedLinear

Activation = Literal["silu", "gelu_tanh"]
_ATTENTION = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
_HEAD_NORMS = {"query_norm": "q_norm", "key_norm": "k_norm"}
_MLP = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
_NORMS = {"first": "input_layernorm", "second": "post_attention_layernorm"}
_ACTIVATION = "act_fn"


def decoder_layers(backbone: nn.Module, attention: Collection[nn.Module]) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Each module that holds an attention module, with that."""
    inside = {id(module) for module in attention}
    for parent in backbone.modules():
        for child in parent.children():
            if id(child) in inside:
                yield parent, child


class PartReader:
    """How the weights of a decoder layer are read off its modules; this one takes those of transformers.

    All methods raise `LookupError` for what the kernels do not take.
    """

    def maps(self, parent: nn.Module, names: Mapping[str, str]) -> tuple[dict[str, LinearWeight], set[str]]:
        """Linear maps, and which children of a module they were read from.

        Args:
            parent: The module.
            names: Its children by the names of their maps in `LayerWeights`.
        """
        return {name: _linear(parent, child) for name, child in names.items()}, set(names.values())

    def knows(self, module: nn.Module) -> bool:
        """Whether a module that has a forward of its own still computes what its class says."""
        return linear.is_ours(module)

    def activation(self, mlp: Any) -> Activation:
        """The activation of a gated MLP."""
        return activation_of(mlp.act_fn)


class DecoderParts:
    """The modules of a decoder layer, and whether they are still what they were.

    Args:
        layer: The layer.
        attention: Its attention module.
        ours: Names of modules in it that this library has put there.
        memory: The memory among them that is used, whose output the kernels compute too; `None` where there is none.
        reader: How weights are read.

    Raises:
        LookupError: The layer is built otherwise.

    Attributes:
        weights: The weights that the modules have now.
        state: Whether they are still what they were.
    """

    def __init__(
        self,
        layer: nn.Module,
        attention: nn.Module,
        ours: Collection[str],
        memory: Memory | None = None,
        reader: PartReader | None = None,
    ) -> None:
        reader = reader or PartReader()
        mlp: Any = getattr(layer, "mlp", None)
        norms = {*_HEAD_NORMS.values()} & set(attention._modules)
        _require(layer, {"self_attn", "mlp", *_NORMS.values()})
        if layer._modules["self_attn"] is not attention or len(norms) == 1:
            raise LookupError("its attention is built otherwise")
        maps, projections = reader.maps(attention, _ATTENTION)
        _require(attention, projections | norms | ({*ours} & set(attention._modules)))
        inner, mlp_maps = reader.maps(mlp, _MLP)
        _require(mlp, mlp_maps | ({_ACTIVATION} & set(mlp._modules)))
        heads: Mapping[str, Any] = {name: _norm(attention, child) for name, child in _HEAD_NORMS.items() if norms}
        self.weights = LayerWeights(
            **{name: _norm(layer, child) for name, child in _NORMS.items()},  # type: ignore[arg-type]
            **maps,  # type: ignore[arg-type]
            **inner,  # type: ignore[arg-type]
            query_norm=heads.get("query_norm"),
            key_norm=heads.get("key_norm"),
            activation=reader.activation(mlp),
        )
        parts = [*_children(attention, projections | norms), *_children(mlp, set(mlp._modules))]
        parts += _children(layer, {"self_attn", "mlp", *_NORMS.values()})
        for *_, child in parts:
            _check_forward(child, reader)
        self.state = ModuleState(layer, parts, () if memory is None else (memory, memory.g_proj))


def _children(parent: nn.Module, names: Collection[str]) -> list[tuple[nn.Module, str, nn.Module]]:
    return [(parent, name, child) for name, child in parent.named_children() if name in names]


def _check_forward(module: nn.Module, reader: PartReader) -> None:
    """Checks that a module has no forward of its own, or one that computes the same."""
    if "forward" in vars(module) and not reader.knows(module):
        raise LookupError("something else has changed how a module computes")


def _require(module: Any, children: Collection[str]) -> None:
    """Checks that a module has these children, no others, and no weights of its own."""
    if (
        not isinstance(module, nn.Module)
        or set(module._modules) != set(children)
        or any(map(torch.is_tensor, module._parameters.values()))
    ):
        raise LookupError("its modules are others")


def _linear(parent: nn.Module, name: str) -> LinearWeight:
    module: Any = parent._modules.get(name)
    bias = module.bias if isinstance(module, nn.Linear) else None
    weight: Any = None
    if type(module) is nn.Linear:
        weight = module.weight if native.ready(module.weight) else None
    elif type(module) is QuantizedLinear and isinstance(module.stored, GroupedWeight):
        weight = module.stored.described()
    elif type(module) is QuantizedLinear and isinstance(module.stored, HalfWeight) and native.ready():
        weight = module.stored.weight_bits
    dense = isinstance(weight, torch.Tensor) and not (weight.is_contiguous() and weight.is_cpu)
    if weight is None or dense or (bias is not None and not native.ready(bias.detach())):
        raise LookupError(f"{name} is no linear map that the kernels take")
    return LinearWeight(weight, module.out_features, bias)


def _norm(parent: nn.Module, name: str) -> NormWeight:
    module: Any = parent._modules[name]
    epsilon = norm_epsilon(module)
    weight = module._parameters.get("weight")
    if weight is None or len(module._parameters) > 1 or not isinstance(epsilon, float) or not native.ready(weight):
        raise LookupError(f"{name} is no norm that the kernel takes")
    return NormWeight(weight, epsilon)


def activation_of(function: Any) -> Activation:
    """Which activation a function is, by what it gives.

    Args:
        function: Takes a vector.

    Raises:
        LookupError: It is none that the kernel knows.
    """
    x = torch.linspace(-6, 6, 97)
    with torch.no_grad():
        y = function(x)
    known: dict[Activation, torch.Tensor] = {
        "silu": functional.silu(x),
        "gelu_tanh": functional.gelu(x, approximate="tanh"),
    }
    for name, expected in known.items():
        if torch.allclose(y, expected, atol=1e-6):
            return name
    raise LookupError("its activation is another")
