"""The positions of a batch that a loss counts: those beyond sinks and window, where the student lacks something.

Legend of shapes: B rows, T tokens; positions of a batch are numbered row after row, b * T + t.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

import torch

IGNORED = -100
"""Label of a token that no loss counts."""

CePairs = Literal["next", "published"]


class Targets(NamedTuple):
    """What is compared at which positions of a batch.

    Attributes:
        kl: Positions where the distributions of teacher and student are compared, `[N]`.
        ce: Positions whose next token the student is to predict, `[M]`.
        ce_labels: Those next tokens, `[M]`.
        attention: Positions where the attention outputs are compared, `[A]`.
    """

    kl: torch.Tensor
    ce: torch.Tensor
    ce_labels: torch.Tensor
    attention: torch.Tensor

    def counts(self, losses: Iterable[str]) -> dict[str, int]:
        """Number of positions that each loss counts."""
        return {name: getattr(self, name).numel() for name in losses}


def find_targets(batch: Mapping[str, torch.Tensor], window: int, sinks: int, ce_pairs: CePairs = "next") -> Targets:
    """The positions that count at this window and these sinks.

    Args:
        batch: `input_ids`, `[B, T]`; `labels`, `[B, T]`, -100 where a token does not count (all count if left out);
            `attention_mask`, `[B, T]`, 0 at padding (none if left out).
        window: Tokens of the window, the current one included.
        sinks: Sinks of each row, which are not part of the window.
        ce_pairs: "next" predicts every labelled token from the one before it. "published" does what the
            published code does. It first drops the positions that do not count, then predicts each from the one before.
    """
    ids = batch["input_ids"]
    labels = batch.get("labels")
    labels = ids if labels is None else labels
    mask = batch.get("attention_mask")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    beyond = real & (real.long().cumsum(1) > sinks + window)
    labelled = beyond & (labels != IGNORED)
    kl = labelled.flatten().nonzero().squeeze(1)
    if ce_pairs == "published":
        ce, following = kl[:-1], kl[1:]
    else:
        wanted = torch.zeros_like(beyond)
        wanted[:, :-1] = beyond[:, :-1] & real[:, 1:] & (labels[:, 1:] != IGNORED)
        ce = wanted.flatten().nonzero().squeeze(1)
        following = ce + 1
    return Targets(kl, ce, labels.flatten()[following], beyond.flatten().nonzero().squeeze(1))
