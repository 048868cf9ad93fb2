"""Frozen norms and gated MLPs of a base model that is trained through in bfloat16: the same gradients, in less time."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from ahn import native
from ahn.backbone.frozen import FrozenParts
from ahn.backbone.linear import CastWeights, speed_up
from tests.tiny import text, tiny

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=f"no kernels here: {native.why_not()}")


@pytest.fixture
def model() -> Any:
    model = tiny("llama")
    model.requires_grad_(False)
    return model


@pytest.fixture
def autocast() -> Iterator[None]:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        yield


def taking_part(model: nn.Module) -> set[str]:
    """Names of the modules that run in their faster form."""
    with FrozenParts(model, CastWeights()).in_use():
        return {name for name, module in model.named_modules() if "forward" in vars(module)}


def run(model: Any, inputs: torch.Tensor, *, faster: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states, and the gradient of a mix of them with respect to the embeddings."""
    casts = CastWeights()
    leaf = inputs.clone().requires_grad_()
    with casts.in_use():
        if faster:
            with FrozenParts(model, casts).in_use():
                hidden = model.model(inputs_embeds=leaf, use_cache=False).last_hidden_state
        else:
            hidden = model.model(inputs_embeds=leaf, use_cache=False).last_hidden_state
    mix = torch.linspace(-3, 4, hidden.numel()).sin().view_as(hidden)
    return hidden.detach(), torch.autograd.grad((hidden * mix).sum(), leaf)[0]


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_gradients_are_as_near_to_those_in_float32(family: str) -> None:
    model = tiny(family)
    model.requires_grad_(False)
    inputs = model.get_input_embeddings()(text(2, 37))
    exact = run(model, inputs, faster=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        usual, faster = run(model, inputs, faster=False), run(model, inputs, faster=True)
    for wanted, plain, found in zip(exact, usual, faster, strict=True):
        assert distance(found, wanted) < 1.3 * distance(plain, wanted) + 1e-3


def test_which_modules_take_part(model: Any, autocast: None) -> None:
    names = taking_part(model)
    assert names == {
        name for name, module in model.named_modules() if name.endswith(("norm", ".mlp")) and not list(module.buffers())
    }
    assert not any("forward" in vars(module) for module in model.modules())


def test_it_ends_with_its_block_also_after_an_error(model: Any, autocast: None) -> None:
    with pytest.raises(ZeroDivisionError), FrozenParts(model, CastWeights()).in_use():
        raise ZeroDivisionError
    assert not any("forward" in vars(module) for module in model.modules())


def test_nothing_takes_part_in_float32_or_without_kernels(model: Any) -> None:
    assert not taking_part(model)
    with torch.autocast("cpu", dtype=torch.bfloat16), native.switched_off():
        assert not taking_part(model)


def test_nothing_takes_part_where_layers_are_computed_again(model: Any, autocast: None) -> None:
    model.model.layers[1].gradient_checkpointing = True
    assert not taking_part(model)


def test_a_module_that_was_changed_is_left_alone(model: Any, autocast: None) -> None:
    layers = model.model.layers
    layers[0].mlp.up_proj.register_forward_hook(lambda *arguments: None)
    layers[0].input_layernorm.weight.requires_grad_(True)
    layers[1].mlp.act_fn = nn.Tanh()
    layers[1].mlp.down_proj = nn.Sequential(layers[1].mlp.down_proj)
    vars(layers[1].input_layernorm)["forward"] = type(layers[1].input_layernorm).forward
    left = {"model.layers.0.mlp", "model.layers.0.input_layernorm", "model.layers.1.mlp"}
    assert not left & taking_part(model)
    assert "model.layers.0.post_attention_layernorm" in taking_part(model)
    assert "forward" in vars(layers[1].input_layernorm)


@pytest.mark.parametrize("name", ["act_fn", "weight"])
def test_a_module_that_computes_something_else_is_left_alone(model: Any, autocast: None, name: str) -> None:
    layer = model.model.layers[0]
    if name == "act_fn":
        layer.mlp.act_fn = nn.GELU()
    else:
        kind = type(layer.input_layernorm)
        layer.input_layernorm.__class__ = type(
            "ShiftedRMSNorm", (kind,), {"forward": lambda self, x: kind.forward(self, x) + x}
        )
    part = "mlp" if name == "act_fn" else "input_layernorm"
    assert f"model.layers.0.{part}" not in taking_part(model)


def test_a_module_is_looked_at_again_where_its_activation_is_another(model: Any, autocast: None) -> None:
    parts, mlp = FrozenParts(model, CastWeights()), model.model.layers[0].mlp
    with parts.in_use():
        assert "forward" in vars(mlp)
    mlp.act_fn = nn.GELU()
    with parts.in_use():
        assert "forward" not in vars(mlp)


def become(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Gives a module a class of its own with another forward."""
    kind = type(module)
    module.__class__ = type(f"Other{kind.__name__}", (kind,), {"forward": forward})


@pytest.mark.parametrize("change", ["hook", "forward", "part"])
def test_an_activation_that_was_changed_is_left_alone(model: Any, autocast: None, change: str) -> None:
    """Also where it was found to be the usual one before."""
    parts, mlp = FrozenParts(model, CastWeights()), model.model.layers[0].mlp
    with parts.in_use():
        assert "forward" in vars(mlp)
    if change == "hook":
        mlp.act_fn.register_forward_hook(lambda module, args, output: output * 3)
    elif change == "forward":
        vars(mlp.act_fn)["forward"] = torch.tanh
    else:
        mlp.act_fn.beta = nn.Parameter(torch.ones(()))
    with parts.in_use():
        assert "forward" not in vars(mlp)


@pytest.mark.parametrize("limit", [7.0, 300.0])
def test_a_clamped_mlp_is_left_alone(model: Any, autocast: None, limit: float) -> None:
    mlp = model.model.layers[0].mlp
    kind = type(mlp)
    become(mlp, lambda self, x: self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=limit) * self.up_proj(x)))
    left = taking_part(model)
    assert "model.layers.0.mlp" not in left
    assert "model.layers.1.mlp" in left
    become(mlp, kind.forward)
    assert "model.layers.0.mlp" in taking_part(model)


def test_a_norm_that_adds_its_epsilon_elsewhere_is_left_alone(model: Any, autocast: None) -> None:
    norm = model.model.layers[0].input_layernorm
    become(norm, lambda self, x: self.weight * x / (x.square().mean(-1, keepdim=True).sqrt() + self.variance_epsilon))
    assert "model.layers.0.input_layernorm" not in taking_part(model)


def test_a_norm_that_needs_two_tensors_is_left_alone(model: Any, autocast: None) -> None:
    become(model.model.layers[1].input_layernorm, lambda self, x, gate: x * gate)
    names = taking_part(model)
    assert "model.layers.1.input_layernorm" not in names
    assert "model.layers.1.mlp" in names


def test_it_ends_where_it_cannot_begin(model: Any, autocast: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ahn.backbone.frozen.norm_epsilon", lambda norm: 1 / (norm is not model.model.norm))
    with pytest.raises(ZeroDivisionError):
        taking_part(model)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("name", ["input_layernorm", "mlp"])
def test_more_than_one_tensor_goes_to_a_modules_own_forward(model: Any, autocast: None, name: str) -> None:
    module = getattr(model.model.layers[0], name)
    kind, x, gate = type(module), torch.randn(1, 3, 32), torch.full((1, 3, 32), 2.0)
    become(module, lambda self, x, gate=None: kind.forward(self, x) * (1 if gate is None else gate))
    wanted, by_name = module(x, gate), module(x=x)
    with FrozenParts(model, CastWeights()).in_use():
        assert "forward" in vars(module)
        assert torch.equal(module(x, gate), wanted)
        assert torch.equal(module(x, gate=gate), wanted)
        assert torch.equal(module(x=x), by_name)


@pytest.mark.parametrize("in_place", [True, False])
def test_what_a_hook_makes_of_a_norm_is_what_is_read(model: Any, autocast: None, in_place: bool) -> None:
    speed_up(model)
    for layer in model.model.layers:
        layer.input_layernorm.register_forward_hook(
            lambda module, args, output: output.mul_(3) if in_place else output * 3
        )
    inputs = model.get_input_embeddings()(text(2, 37))
    (usual, _), (found, _) = run(model, inputs, faster=False), run(model, inputs, faster=True)
    assert distance(found, usual) < 0.02


def test_a_map_takes_its_input_by_name() -> None:
    linear = nn.Linear(4, 4)
    wanted = linear(torch.ones(4))
    speed_up(linear)
    assert torch.equal(linear(input=torch.ones(4)), wanted)


def test_a_cast_of_what_has_changed_is_not_given() -> None:
    casts, x = CastWeights(), torch.ones(3)
    with casts.in_use():
        casts.note_input(x, x.bfloat16())
        x.mul_(2)
        assert casts.cast_input(x) is x
        with torch.inference_mode():
            y = torch.ones(3)
            casts.note_input(y, y.bfloat16())
            assert casts.cast_input(y) is y


def test_a_cast_is_given_for_its_tensor_only() -> None:
    casts, x = CastWeights(), torch.ones(3)
    with casts.in_use():
        casts.note_input(x, x.bfloat16())
        assert casts.cast_input(x).dtype == torch.bfloat16
        assert casts.cast_input(x.clone()).dtype == torch.float32
    assert casts.cast_input(x) is x
