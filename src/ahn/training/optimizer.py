"""AdamW with one step size for each head: the noise of a gradient must not decide how far an element moves.

The gradient of a read-out has its signal in the few directions that its reads have in common, and noise in all. With
Adam's own step size for every element they all move alike, signal or not; with one step size for each head an update
keeps the shape of the gradient. `docs/log.md` has the measurement.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


class HeadAdamW(torch.optim.Optimizer):
    """AdamW whose second moment is a mean over each head of a matrix, or over a whole vector.

    The first dimension of a matrix are the heads: `[H, V, V]` of a read-out, `[H, D]` of a gate.

    Args:
        params: As for `torch.optim.AdamW`.
        lr: Learning rate: about what the elements of a head move by in a step, root mean square.
        betas: Decay rates of the first and second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled, as in AdamW.

    Source: AdamW is arXiv 1711.05101; one second moment for each block of parameters is Adam-mini, arXiv 2406.16793.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-12,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Moves every parameter that has a gradient.

        Args:
            closure: As for `torch.optim.AdamW`.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)
        return loss

    def _move(self, parameter: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        first, second = group["betas"]
        state = self.state[parameter]
        square = _mean_of_heads(gradient.square())
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(square)
        state["step"] += 1
        steps = float(state["step"])
        mean = state["exp_avg"].lerp_(gradient, 1 - first)
        variance = state["exp_avg_sq"].lerp_(square, 1 - second)
        size = (variance / (1 - second**steps)).sqrt_().add_(group["eps"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.sub_(mean / size * (group["lr"] / (1 - first**steps)))


def _mean_of_heads(square: torch.Tensor) -> torch.Tensor:
    """Mean over each head of a matrix, or over all of a vector; of as many dimensions as before."""
    dimensions = tuple(range(1, square.dim())) or (0,)
    return square.mean(dimensions, keepdim=True)


def parameter_groups(module: nn.Module, lr: float, gate_lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Read-outs and everything else, each with its learning rate; only matrices decay.

    Args:
        module: What is trained: a module whose parameters with a gradient are those of memories.
        lr: Learning rate of the read-outs.
        gate_lr: Learning rate of everything else.
        weight_decay: Of matrices.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            rate = lr if name.rpartition(".")[2] == "o_proj" else gate_lr
            groups.setdefault((rate, weight_decay if parameter.dim() > 1 else 0.0), []).append(parameter)
    return [{"params": found, "lr": rate, "weight_decay": decay} for (rate, decay), found in groups.items()]
