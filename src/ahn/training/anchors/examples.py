"""What the score `learned` is fitted to: tokens of many texts, what layers read there, and what is to be foreseen.

Legend of shapes: N tokens, T tokens of a text.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ahn.training.anchors.fit import Fit, fit, standardized
from ahn.training.anchors.future_attention import Observation


class Examples:
    """Tokens of many texts, and one target.

    Args:
        layers: Layers whose networks learn.
    """

    def __init__(self, layers: Sequence[int]) -> None:
        self.inputs: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
        self.targets: list[list[torch.Tensor]] = []
        self.for_testing: list[torch.Tensor] = []

    def add(self, seen: Observation, targets: Sequence[torch.Tensor], chosen: torch.Tensor, is_held: bool) -> None:
        """Takes some tokens of a text.

        Args:
            seen: What was recorded of the text.
            targets: What is to be foreseen of its tokens, `[T]` each; their sum counts, once they are standardised.
            chosen: The tokens to learn from, `[N]` int64.
            is_held: Whether the text is held out.
        """
        self.targets.append([each_T[chosen] for each_T in targets])
        self.for_testing.append(torch.full((len(chosen),), is_held))
        for layer, inputs in self.inputs.items():
            inputs.append(seen.hidden[layer][chosen])

    def fit(self, width: int, seed: int) -> dict[int, Fit]:
        """The network of each layer.

        Args:
            width: Units of a network.
            seed: As for `ahn.training.anchors.fit.fit`.
        """
        held_N = torch.cat(self.for_testing)
        parts = [standardized(torch.cat(each), ~held_N) for each in zip(*self.targets, strict=True)]
        target_N = torch.stack(parts).sum(0)
        return {layer: fit(torch.cat(inputs), target_N, held_N, width, seed) for layer, inputs in self.inputs.items()}
