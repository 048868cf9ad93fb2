"""AdamW by heads: against a loop, and what moves by how much."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ahn.training.optimizer import HeadAdamW, parameter_groups


def descend(parameter: nn.Parameter, gradients: list[torch.Tensor], optimizer: torch.optim.Optimizer) -> torch.Tensor:
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize("shape", [(3, 4, 4), (3, 7), (5,)], ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_against_a_loop(shape: tuple[int, ...], decay: float) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator, dtype=torch.float64)
    gradients = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(5)]
    parameter = nn.Parameter(start.clone())
    actual = descend(parameter, gradients, HeadAdamW([parameter], lr=0.01, weight_decay=decay))
    expected, mean = start.clone(), torch.zeros_like(start)
    square = [0.0] * (shape[0] if len(shape) > 1 else 1)
    for step, gradient in enumerate(gradients, start=1):
        mean = 0.9 * mean + 0.1 * gradient
        for head in range(len(square)):
            block = gradient[head] if len(shape) > 1 else gradient
            square[head] = 0.99 * square[head] + 0.01 * float(block.square().mean())
            size = (square[head] / (1 - 0.99**step)) ** 0.5 + 1e-12
            where = head if len(shape) > 1 else slice(None)
            expected[where] = expected[where] * (1 - 0.01 * decay) - 0.01 * mean[where] / (1 - 0.9**step) / size
    torch.testing.assert_close(actual, expected)


def test_with_one_number_a_head_it_is_adamw() -> None:
    gradients = [torch.randn(6, 1, generator=torch.Generator().manual_seed(step)) for step in range(4)]
    ours, theirs = nn.Parameter(torch.ones(6, 1)), nn.Parameter(torch.ones(6, 1))
    expected = torch.optim.AdamW([theirs], lr=0.02, betas=(0.9, 0.99), eps=1e-12, weight_decay=0.1)
    actual = descend(ours, gradients, HeadAdamW([ours], lr=0.02, weight_decay=0.1))
    torch.testing.assert_close(actual, descend(theirs, gradients, expected))


def test_an_update_keeps_the_shape_of_the_gradient() -> None:
    gradient = torch.tensor([[[1.0, 0.01], [0.0, 0.02]], [[1e-6, 0.0], [0.0, 0.0]]])
    parameter = nn.Parameter(torch.zeros(2, 2, 2))
    moved = -descend(parameter, [gradient], HeadAdamW([parameter], lr=0.5))
    for head in range(2):
        torch.testing.assert_close(moved[head] / moved[head].norm(), gradient[head] / gradient[head].norm())
        torch.testing.assert_close(moved[head].square().mean().sqrt(), torch.tensor(0.5), rtol=1e-4, atol=0)


def test_saved_state_goes_on_bit_for_bit() -> None:
    gradients = [torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(step)) for step in range(6)]
    straight, broken = nn.Parameter(torch.ones(2, 3, 3)), nn.Parameter(torch.ones(2, 3, 3))
    expected = descend(straight, gradients, HeadAdamW([straight]))
    first = HeadAdamW([broken])
    descend(broken, gradients[:3], first)
    second = HeadAdamW([broken])
    second.load_state_dict(first.state_dict())
    assert torch.equal(descend(broken, gradients[3:], second), expected)


def test_groups() -> None:
    module = nn.Module()
    module.o_proj = nn.Parameter(torch.zeros(2, 3, 3))
    module.A_log = nn.Parameter(torch.zeros(2))
    module.gate = nn.Linear(4, 2, bias=False)
    module.frozen = nn.Parameter(torch.zeros(3), requires_grad=False)
    groups = parameter_groups(module, 0.1, 0.5, 0.01)
    found = {
        name: (group["lr"], group["weight_decay"])
        for group in groups
        for name, parameter in module.named_parameters()
        if any(parameter is each for each in group["params"])
    }
    assert found == {"o_proj": (0.1, 0.01), "A_log": (0.5, 0.0), "gate.weight": (0.5, 0.01)}
