"""Frozen norms and gated MLPs of a base model while a memory is trained in bfloat16 on a CPU.

Autograd keeps and casts what the gradient of a frozen weight would need, and passes over memory once per operation.
Here a norm gives its output in float32 and in bfloat16, for the maps that follow, and an MLP keeps two tensors. A
module takes part if its own forward gives the same on a few vectors, and only while nothing has changed its parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn import functional

from ahn import native
from ahn.backbone import linear
from ahn.backbone.linear import CastWeights
from ahn.backbone.survey import norm_epsilon, recomputes_layers
from ahn.native import elementwise

_MAPS = ("gate_proj", "up_proj", "down_proj")
_VECTORS = 4
_SIZES = (0.002, 2.0, 60.0, 2000.0)  # of vectors: large ones reach a clamp, small ones the epsilon of a norm
_TOLERANCE = 1e-4  # share of the largest number of a vector


class FrozenParts:
    """The norms and gated MLPs of a model that have a faster form with gradients.

    Args:
        model: The model.
        casts: Its frozen weights in the dtype of autocast.
    """

    def __init__(self, model: nn.Module, casts: CastWeights) -> None:
        self._model, self._casts = model, casts
        self._known: WeakKeyDictionary[nn.Module, tuple[Any, bool]] = WeakKeyDictionary()  # its code, is usual

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Lets these modules run in their faster form inside a `with` block."""
        given: list[nn.Module] = []
        try:
            if can_run(self._model):
                for module in self._model.modules():
                    self._speed_up(module, given)
            yield
        finally:
            for module in given:
                del vars(module)["forward"]

    def _speed_up(self, module: nn.Module, given: list[nn.Module]) -> None:
        run = _run_mlp if _is_frozen_mlp(module) else _run_norm if _is_frozen_norm(module) else None
        if run is not None and "forward" not in vars(module) and self._computes_as_usual(module):
            vars(module)["forward"] = partial(run, self._casts, module)
            given.append(module)

    def _computes_as_usual(self, module: nn.Module) -> bool:
        """Whether a module gives what its parts suggest, found out once."""
        activation = getattr(module, "act_fn", None)
        code, known = (type(module), activation), self._known.get(module)
        if known is None or known[0] != code:
            known = self._known[module] = code, _is_usual(module, _usual_norm if activation is None else _usual_mlp)
        return known[1]


def can_run(model: nn.Module) -> bool:
    """Whether there is a faster form: bfloat16 on a CPU, where no layer is computed again in the backward pass."""
    return _multiplies_in_half() and native.ready() and not recomputes_layers(model)


def _multiplies_in_half() -> bool:
    return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") is torch.bfloat16


def _is_frozen(weight: Any) -> bool:
    return isinstance(weight, torch.Tensor) and not weight.requires_grad and elementwise.is_plain(weight)


def _is_frozen_norm(module: Any) -> bool:
    """Whether a module has the name and the parts of a root mean square norm."""
    weight = module._parameters.get("weight")
    has_parts = len(module._parameters) == 1 and not module._modules and isinstance(norm_epsilon(module), float)
    return "RMSNorm" in type(module).__name__ and has_parts and _is_frozen(weight)


def _is_frozen_mlp(module: Any) -> bool:
    """Whether a module has the parts of a gated MLP, plain, frozen and without hooks."""
    maps = [module._modules.get(name) for name in _MAPS]
    if set(module._modules) - {*_MAPS, "act_fn"} or not _is_plain_function(getattr(module, "act_fn", None)):
        return False
    return not module._parameters and all(map(_is_plain_map, maps))


def _is_plain_map(module: Any) -> bool:
    if type(module) is not nn.Linear or module.bias is not None or not _is_frozen(module.weight):
        return False
    return not _has_hooks(module) and ("forward" not in vars(module) or linear.is_ours(module))


def _is_plain_function(activation: Any) -> bool:
    """Whether what an activation computes cannot change unseen: it has no hooks, parts or forward of its own."""
    if not isinstance(activation, nn.Module):
        return callable(activation)
    parts = (activation._modules, activation._parameters, activation._buffers)
    return not any(parts) and not _has_hooks(activation) and "forward" not in vars(activation)


def _has_hooks(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)


@torch.no_grad()
def _is_usual(module: Any, usual: Callable[[Any], tuple[torch.Tensor, torch.Tensor]]) -> bool:
    """Whether a module's own forward gives what is usual for its kind."""
    try:
        with torch.autocast("cpu", enabled=False):
            inputs, wanted = usual(module)
            found = type(module).forward(module, inputs)
    except Exception:  # a family's own code, which may need more than one tensor
        return False
    return torch.is_tensor(found) and found.shape == wanted.shape and _is_near(found, wanted)


def _is_near(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    allowed = _TOLERANCE * wanted.abs().amax(-1)
    return bool(((found - wanted).abs().amax(-1) <= allowed).all())


def _usual_norm(norm: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A few vectors, and what a root mean square norm makes of them."""
    x = _vectors(norm.weight.numel())
    return x, norm.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm_epsilon(norm))


def _usual_mlp(mlp: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A few vectors, and what a gated MLP makes of them."""
    x = _vectors(mlp.gate_proj.in_features)
    gate, up = functional.linear(x, mlp.gate_proj.weight), functional.linear(x, mlp.up_proj.weight)
    return x, functional.linear(functional.silu(gate) * up, mlp.down_proj.weight)


def _vectors(size: int) -> torch.Tensor:
    """The same few vectors in every size, `[1, vectors, size]`."""
    vectors = torch.linspace(-3, 5, _VECTORS * size).mul(7).sin().view(_VECTORS, size)
    return torch.cat([vectors * each for each in _SIZES])[None]


def _run_norm(casts: CastWeights, norm: Any, *inputs: Any, **more: Any) -> Any:
    if more or not _is_read_as_usual(inputs):
        return type(norm).forward(norm, *inputs, **more)
    [x] = inputs
    out, half = elementwise.norm_twice(x, norm.weight, 1 / x.size(-1), norm_epsilon(norm))
    casts.note_input(out, half)
    return out


def _run_mlp(casts: CastWeights, mlp: Any, *inputs: Any, **more: Any) -> Any:
    if more or not _is_read_as_usual(inputs) or not _is_frozen_mlp(mlp):
        return type(mlp).forward(mlp, *inputs, **more)
    weights = (casts.cast(mlp._modules[name].weight).to(torch.bfloat16) for name in _MAPS)
    return _GatedMLP.apply(casts.cast_input(inputs[0]).to(torch.bfloat16), *weights)


def _is_read_as_usual(inputs: tuple[Any, ...]) -> bool:
    """Whether a call has one input, and reads it in float32 while it multiplies in bfloat16."""
    return _multiplies_in_half() and len(inputs) == 1 and elementwise.is_plain(*inputs)


class _GatedMLP(torch.autograd.Function):
    """`down(silu(gate(x)) * up(x))` in bfloat16; the weights have no gradients, so that neither `x` is kept."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, to_gate: torch.Tensor, to_up: torch.Tensor, to_out: torch.Tensor
    ) -> torch.Tensor:
        gate, up = functional.linear(x, to_gate), functional.linear(x, to_up)
        out = functional.linear(elementwise.gated(gate, up), to_out)
        ctx.save_for_backward(gate, up, to_gate, to_up, to_out)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up, to_gate, to_up, to_out = ctx.saved_tensors
        inner = gradients[0].flatten(0, -2).to(gate.dtype) @ to_out
        gate_slope, up_slope = elementwise.gated_back(gate, up, inner.view_as(gate))
        slope = torch.addmm(gate_slope.flatten(0, -2) @ to_gate, up_slope.flatten(0, -2), to_up)
        return slope.view(*gate.shape[:-1], -1), None, None, None
