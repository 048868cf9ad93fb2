"""The score `learned`: fits the network of one layer to how much each token was needed later.

Legend of shapes: N tokens, D hidden size, M width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ahn.anchors.learned import AnchorGate

_RIDGE = 0.1  # of the variance of an input
_EPOCHS, _BATCH = 6, 256
_LR, _WEIGHT_DECAY = 1e-3, 0.1


class Fit(NamedTuple):
    """The fitted network of one layer.

    Attributes:
        gate: The network, with one output, in float32 on the CPU.
        ridge: Share of the variance on held-out tokens that a linear map explains.
        explained: The same for the network.
    """

    gate: AnchorGate
    ridge: float
    explained: float


def fit(hidden_ND: torch.Tensor, needed_N: torch.Tensor, held_N: torch.Tensor, width: int, seed: int) -> Fit:
    """Fits a network that predicts how much a token is needed, by least squares.

    Args:
        hidden_ND: Inputs of the layer, `[N, D]`.
        needed_N: How much each token was needed, `[N]`.
        held_N: Which tokens are held out, `[N]` bool.
        width: Units of the network, M.
        seed: Seed of the initial weights and of the order of the tokens.
    """
    target_N = standardized(needed_N, ~held_N)
    inputs_ND = hidden_ND.float()
    mean_D, spread_D = inputs_ND[~held_N].mean(0), inputs_ND[~held_N].std(0).clamp(min=1e-3)
    inputs_ND = (inputs_ND - mean_D) / spread_D
    learned = inputs_ND[~held_N], target_N[~held_N]
    linear_D = _ridge(*learned)
    gate = _network(*learned, width, seed)
    with torch.no_grad():
        predicted_N = _foreseen(gate, inputs_ND[held_N])
    shares = (_explained(each, target_N[held_N]) for each in (inputs_ND[held_N] @ linear_D, predicted_N))
    return Fit(_on_raw_inputs(gate, mean_D, spread_D), *shares)


def standardized(values_N: torch.Tensor, learned_N: torch.Tensor) -> torch.Tensor:
    """Values with mean 0 and standard deviation 1 over the tokens that are learned from, `[N]`.

    Args:
        values_N: The values, `[N]`.
        learned_N: Which tokens are learned from, `[N]` bool.
    """
    own_N = values_N[learned_N]
    return (values_N - own_N.mean()) / own_N.std().clamp(min=1e-6)


@torch.no_grad()
def joined(questions: AnchorGate, text: AnchorGate) -> AnchorGate:
    """One network that says what two say.

    Args:
        questions: The network that foresees what questions need.
        text: The network that foresees what the text reads again.
    """
    own = questions.inner.out_features
    gate = AnchorGate(questions.inner.in_features, own + text.inner.out_features)
    gate.inner.weight.copy_(torch.cat((questions.inner.weight, text.inner.weight)))
    gate.inner.bias.copy_(torch.cat((questions.inner.bias, text.inner.bias)))
    gate.outer.weight.zero_()
    gate.outer.weight[0, :own] = questions.outer.weight[0]
    gate.outer.weight[1, own:] = text.outer.weight[0]
    gate.outer.bias.copy_(torch.cat((questions.outer.bias, text.outer.bias)))
    return gate


def _ridge(inputs_ND: torch.Tensor, target_N: torch.Tensor) -> torch.Tensor:
    count, size = inputs_ND.shape
    square_DD = inputs_ND.T @ inputs_ND + _RIDGE * count * torch.eye(size)
    solution_D: torch.Tensor = torch.linalg.solve(square_DD, inputs_ND.T @ target_N)
    return solution_D


def _network(inputs_ND: torch.Tensor, target_N: torch.Tensor, width: int, seed: int) -> AnchorGate:
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        gate = AnchorGate(inputs_ND.size(1), width, outputs=1)
    optimizer = torch.optim.AdamW(gate.parameters(), lr=_LR, weight_decay=_WEIGHT_DECAY)
    for _ in range(_EPOCHS):
        for batch in torch.randperm(len(target_N), generator=generator).split(_BATCH):
            loss = (_foreseen(gate, inputs_ND[batch]) - target_N[batch]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return gate


def _foreseen(gate: AnchorGate, inputs_ND: torch.Tensor) -> torch.Tensor:
    """What a network with one output says, `[N]`."""
    scores_1NR: torch.Tensor = gate(inputs_ND[None])
    return scores_1NR[0, :, 0]


def _explained(found_N: torch.Tensor, target_N: torch.Tensor) -> float:
    return 1 - float((found_N - target_N).square().mean() / target_N.var().clamp(min=1e-12))


@torch.no_grad()
def _on_raw_inputs(gate: AnchorGate, mean_D: torch.Tensor, spread_D: torch.Tensor) -> AnchorGate:
    """The same network for inputs that are not standardised."""
    gate.inner.weight.div_(spread_D)
    gate.inner.bias.sub_(gate.inner.weight @ mean_D)
    return gate
