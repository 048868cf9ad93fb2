"""From hidden states to logits exactly as the model computes them, for any number of positions at a time.

Legend of shapes: N positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

import ahn
from ahn.backbone.survey import find_backbone, sample
from ahn.errors import ModelError


@dataclasses.dataclass
class _Output(BaseModelOutputWithPastAndCrossAttentions):
    """Everything that a model's forward may look for in the output of its stack of layers."""

    router_logits: Any = None


class Head:
    """The part of a causal language model after its stack of layers: vocabulary product, scaling, soft-capping.

    The model's own `forward` runs with its stack of layers bypassed. Whatever a family does to its logits is therefore
    done here too, without code for any family.

    Args:
        model: A causal language model with a memory attached.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.backbone: Any = find_backbone(model)

    def __call__(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Logits, `[N, V]` in the model's dtype.

        Args:
            hidden_ND: Output of the stack of layers, after its final norm, `[N, D]`.
        """
        with ahn.mode(self.model, "full"), _standing_aside(self.backbone):  # no layer runs, so none chooses anchors
            logits: torch.Tensor = self.model(inputs_embeds=hidden_ND[None], use_cache=False).logits[0]
        return logits

    @torch.no_grad()
    def check(self) -> None:
        """Checks on a few tokens that the logits equal those of the model.

        Raises:
            ModelError: They do not, so the model cannot be trained in slices.
        """
        name = type(self.model).__name__
        ids = sample(self.backbone, 4)
        try:
            with ahn.mode(self.model, "full"):
                expected = self.model(input_ids=ids, use_cache=False).logits[0]
                hidden = self.backbone(input_ids=ids, use_cache=False).last_hidden_state[0]
                actual = self(hidden)
        except Exception as error:  # a family with a head of its own may fail in any way
            raise ModelError(f"{name} cannot be distilled: its head does not run alone ({error})") from error
        tolerance = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 5e-2
        if actual.shape != expected.shape or not torch.allclose(
            actual, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())
        ):
            raise ModelError(
                f"{name} cannot be distilled: its logits are more than a function of its last hidden state"
            )


@contextlib.contextmanager
def _standing_aside(backbone: Any) -> Iterator[None]:
    """Lets the stack of layers return its input embeddings as its last hidden state."""

    def forward(*args: Any, inputs_embeds: torch.Tensor, **kwargs: Any) -> _Output:
        return _Output(last_hidden_state=inputs_embeds)

    before = backbone.__dict__.get("forward")  # accelerate puts wrappers there
    backbone.__dict__["forward"] = forward
    try:
        yield
    finally:
        del backbone.__dict__["forward"]
        if before is not None:
            backbone.__dict__["forward"] = before
