"""AdamW with a factor for each head of the read-outs, and with steps relative to the parameters."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch

from ahn.training.optimizer import LEAST_SIZE, HeadScaledAdamW, RelativeAdamW

VALUES: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-10, "weight_decay": 0.0}


def parameters(seed: int = 0) -> list[torch.nn.Parameter]:
    """A read-out of three heads, and a matrix, which is none."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 4, 4), (3, 5))]


def gradients(found: list[torch.nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for each in found:
        each.grad = torch.randn(each.shape, generator=generator)


def test_without_factors_it_is_adamw() -> None:
    ours, theirs = parameters(), parameters()
    optimizers = HeadScaledAdamW(ours, scale_ratio=0.0, **VALUES), torch.optim.AdamW(theirs, **VALUES)
    for step in range(4):
        gradients(ours, step)
        gradients(theirs, step)
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(ours, theirs):
        assert torch.equal(one, other)


def test_a_step_scales_every_head_against_its_slope() -> None:
    """Adam's own formulas in float64, for two steps; other parameters are left to AdamW."""
    ours, theirs = parameters(), parameters()
    scaled, plain = HeadScaledAdamW(ours, scale_ratio=5.0, **VALUES), torch.optim.AdamW(theirs, **VALUES)
    mean, square = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for step in (1, 2):
        gradients(ours, step)
        gradients(theirs, step)
        slope = (ours[0].detach() * ours[0].grad).double().sum((1, 2))  # type: ignore[operator]
        mean, square = 0.9 * mean + 0.1 * slope, 0.99 * square + 0.01 * slope**2
        change = (mean / (1 - 0.9**step)) / (square / (1 - 0.99**step)).sqrt()
        with torch.no_grad():
            theirs[0].copy_(ours[0])
        scaled.step()
        plain.step()
        expected = theirs[0].detach() * torch.exp(-0.05 * change)[:, None, None].float()
        torch.testing.assert_close(ours[0].detach(), expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(ours[1], theirs[1])


def test_it_finds_the_length_that_noisy_elements_hide() -> None:
    """The read-out has the right direction and a quarter of the right length; its gradients are almost all noise."""
    generator = torch.Generator().manual_seed(1)
    right = torch.randn(2, 16, 16, generator=generator)
    learned = torch.nn.Parameter(right / 4)
    optimizer = HeadScaledAdamW([learned], **{**VALUES, "lr": 1e-4}, scale_ratio=500.0)
    for _ in range(100):
        learned.grad = learned.detach() - right + 2 * torch.randn(right.shape, generator=generator)
        optimizer.step()
    length = (learned.detach() * right).sum((1, 2)) / right.square().sum((1, 2))
    assert ((length - 1).abs() < 0.25).all(), length
    assert math.log(4) > 100 * 1e-4  # out of reach of the steps on the elements


def test_it_goes_on_from_its_state() -> None:
    whole, parts = parameters(), parameters()
    first = HeadScaledAdamW(whole, scale_ratio=5.0, **VALUES)
    before = HeadScaledAdamW(parts, scale_ratio=5.0, **VALUES)
    for step in range(4):
        gradients(whole, step)
        first.step()
    for step in range(4):
        if step == 2:
            state = copy.deepcopy(before.state_dict())
            before = HeadScaledAdamW(parts, scale_ratio=5.0, **VALUES)
            before.load_state_dict(state)
        gradients(parts, step)
        before.step()
    for one, other in zip(whole, parts):
        assert torch.equal(one, other)


def test_relative_steps_are_those_of_adamw_times_the_size() -> None:
    ours, theirs = parameters(), parameters()
    with torch.no_grad():
        ours[1].zero_()
        theirs[1].zero_()
    relative, plain = RelativeAdamW(ours, **VALUES), torch.optim.AdamW(theirs, **VALUES)
    for step in range(3):
        before = [each.detach().clone() for each in ours]
        with torch.no_grad():
            for one, other in zip(ours, theirs):
                other.copy_(one)
        gradients(ours, step)
        gradients(theirs, step)
        relative.step()
        plain.step()
        for one, other, old in zip(ours, theirs, before):
            size = max(float(old.double().square().mean().sqrt()), LEAST_SIZE)
            torch.testing.assert_close(one.detach() - old, size * (other.detach() - old), rtol=1e-3, atol=1e-6)
