"""AdamW in two other forms: with one more factor per read-out head, and with steps relative to what they change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LEAST_SIZE = 0.01
"""What `RelativeAdamW` takes for the size of smaller parameters."""


class HeadScaledAdamW(torch.optim.AdamW):
    """AdamW, and after each of its steps a step of Adam on the logarithm of the length of every head's read-out.

    The gradient of one element of a read-out is almost all noise, yet AdamW's step on it is as long as one on a signal.
    The length of a whole head is one number. Its gradient `<G, W>` sums thousands of elements, so it is much less
    noisy. Read-outs are the parameters with three dimensions, `[H, V, V]`.

    Args:
        params: As for `AdamW`.
        scale_ratio: Learning rate of the logarithms over that of the elements, so that both follow one schedule.
        **others: As for `AdamW`.
    """

    def __init__(self, params: Any, scale_ratio: float = 0.0, **others: Any) -> None:
        super().__init__(params, **others)
        for group in self.param_groups:
            group["scale_ratio"] = scale_ratio

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """As `AdamW.step`."""
        slopes = {
            p: (p.grad * p).sum((1, 2), keepdim=True)  # by the logarithm of each head's length, [H, 1, 1]
            for group in self.param_groups
            for p in group["params"]
            if p.dim() == 3 and p.grad is not None
        }
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter in slopes:
                    self._rescale(parameter, slopes[parameter], group)
        return loss

    def _rescale(self, parameter: torch.Tensor, slope: torch.Tensor, group: dict[str, Any]) -> None:
        state, (beta, beta_square) = self.state[parameter], group["betas"]
        if "slope" not in state:
            state["slope"], state["slope_square"] = torch.zeros_like(slope), torch.zeros_like(slope)
        state["slope"].lerp_(slope, 1 - beta)
        state["slope_square"].lerp_(slope.square(), 1 - beta_square)
        step = float(state["step"])
        mean, square = state["slope"] / (1 - beta**step), state["slope_square"] / (1 - beta_square**step)
        change = mean / (square.sqrt() + group["eps"])
        parameter.mul_(torch.exp(-group["lr"] * group["scale_ratio"] * change))


class RelativeAdamW(torch.optim.AdamW):
    """AdamW whose learning rate is a share of each parameter: its step is multiplied by the parameter's size.

    Parameters of one memory differ in size by factors of a hundred, so that no single rate suits all of them. The size
    is the root mean square, and at least `LEAST_SIZE`, so that a parameter of zeros can learn. As in Adafactor (arXiv
    1804.04235, section 8).
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """As `AdamW.step`."""
        before = {p: p.clone() for group in self.param_groups for p in group["params"] if p.grad is not None}
        loss = super().step(closure)
        for parameter, old in before.items():
            size = old.square().mean().sqrt().clamp(min=LEAST_SIZE)
            parameter.copy_(torch.lerp(old, parameter, size))
        return loss
