"""How many sinks and how large a window a sequence is trained with: drawn anew for each, or always the same.

A draw is a function of a seed and of where in the training the sequence stands. Nothing is kept between draws: no
generator to save, nothing to restore when a run goes on, and the global random numbers are left alone.
"""

from __future__ import annotations

import dataclasses
import random
from typing import NamedTuple

import torch
from torch import nn

from ahn.anchors.scores import SCORES
from ahn.attachment import attachment_of
from ahn.config import check_span, check_whole
from ahn.distillation import IGNORED
from ahn.errors import ConfigError

TOTALS = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
"""Published candidates for the tokens kept exactly, sinks and window together."""

SINKS = (0, 32, 64, 128, 512, 2048, 4096)
"""Published candidates for the sinks."""

LEAST_SHARE = 1 / 8
"""Published least share of its sequence that a total may be."""

ANCHOR_SCORE = "learned"
"""The score that chooses the anchors of a training."""


class Span(NamedTuple):
    """Tokens that one sequence keeps exactly.

    Attributes:
        window: Tokens of the window, the current one included.
        sinks: Tokens at the start, not part of the window.
    """

    window: int
    sinks: int


def subsampled(labels: torch.Tensor, share: float, *key: int) -> torch.Tensor:
    """Labels of which a share is kept, drawn token by token, the others being -100.

    The losses that look at labels stay what they are on average, and cost that share of their vocabulary product.

    Args:
        labels: `[B, T]`.
        share: Share that is kept, above 0; 1 keeps all.
        *key: What the draw depends on: seed, step, batch within the step, process.
    """
    if share >= 1:
        return labels
    dice = random.Random("/".join(map(str, key)))
    generator = torch.Generator().manual_seed(dice.getrandbits(63))
    dropped = torch.rand(labels.shape, generator=generator) >= share
    return labels.masked_fill(dropped.to(labels.device), IGNORED)


@dataclasses.dataclass(frozen=True)
class SpanDraw:
    """The rule that spans are drawn by.

    A total is drawn among those shorter than the sequence and not under a share of it. Sinks are then drawn among those
    of at most half the total; the window is the rest.

    Attributes:
        totals: Candidates for sinks and window together.
        sinks: Candidates for the sinks.
        fixed: The span of every sequence, instead of a draw.
        seed: What the draws depend on.
        least: Least share of the sequence that a total may be.

    Raises:
        ConfigError: A candidate is out of range.

    Source: arXiv 2510.07318, appendix on training, and its released code (sinks at most half of the total).
    """

    totals: tuple[int, ...] = TOTALS
    sinks: tuple[int, ...] = SINKS
    fixed: Span | None = None
    seed: int = 0
    least: float = LEAST_SHARE

    def __post_init__(self) -> None:
        for total in self.totals:
            check_span(total, 0)
        for sinks in self.sinks:
            check_span(1, sinks)
        if self.fixed is not None:
            check_span(*self.fixed)

    def options(self, length: int) -> dict[int, list[int]]:
        """For each total that a sequence of this length may be given, the numbers of sinks that go with it.

        Raises:
            ConfigError: There is none: nothing would ever leave the window.
        """
        if self.fixed is not None:
            usable = {sum(self.fixed): [self.fixed.sinks]} if sum(self.fixed) < length else {}
        else:
            totals = [total for total in self.totals if length * self.least <= total < length]
            pairs = {total: [sinks for sinks in self.sinks if sinks <= total / 2] for total in totals}
            usable = {total: sinks for total, sinks in pairs.items() if sinks}
        if not usable:
            what = f"sinks + window = {sum(self.fixed)}" if self.fixed else f"the totals {list(self.totals)}"
            raise ConfigError(
                f"a sequence of {length} tokens leaves nothing for the memory to learn with {what}; use longer "
                f"sequences or smaller windows (and, drawn at random, totals of at least {self.least:g} of the length)"
            )
        return usable

    def draw(self, length: int, *key: int) -> Span:
        """The span of a sequence.

        Args:
            length: Its tokens.
            *key: Where it stands in the training: step, batch within the step, process, row.

        Raises:
            ConfigError: No candidate fits this length.
        """
        options = self.options(length)
        dice = random.Random("/".join(map(str, (self.seed, *key))))
        total = dice.choice(list(options))
        sinks = dice.choice(options[total])
        return Span(total - sinks, sinks)

    def fitting(self, model: nn.Module) -> SpanDraw:
        """The same rule without the candidates that a model cannot be read with.

        Args:
            model: A model with a memory attached. Its layers that slide by themselves bound the sinks, and bounded
                sink positions bound the total by the trained context.

        Raises:
            ConfigError: The fixed span cannot be read, or no candidate is left.
        """
        attachment = attachment_of(model)
        if self.fixed is not None:
            attachment.check(dataclasses.replace(attachment.settings, **self.fixed._asdict()))
            return self
        slides = [
            layer.sliding_window for layer in attachment.layers if layer.memory is not None and layer.sliding_window
        ]
        bounded = attachment.settings.sink_positions == "bounded"
        sinks = tuple(each for each in self.sinks if each < min(slides, default=each + 1))
        totals = tuple(each for each in self.totals if not bounded or each <= attachment.trained_context)
        if not sinks or not totals:
            raise ConfigError(f"none of the candidates {list(self.totals)} and {list(self.sinks)} fits this model")
        return dataclasses.replace(self, totals=totals, sinks=sinks)


@dataclasses.dataclass(frozen=True)
class AnchorDraw:
    """The rule that the number of anchors of each training sequence is drawn by.

    Attributes:
        counts: Candidates; a number that is listed twice is drawn twice as often.
        seed: What the draws depend on.

    Raises:
        ConfigError: A candidate is out of range, or there is none.
    """

    counts: tuple[int, ...] = (0,)
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.counts:
            raise ConfigError("anchors must name at least one number; 0 is without any")
        for count in self.counts:
            check_whole("anchors", count, 0)

    def draw(self, span: Span, *key: int) -> int:
        """The number of anchors of a sequence; 0 where its window is too short for them.

        Args:
            span: Its window and sinks.
            *key: Where it stands in the training, as for `SpanDraw.draw`.
        """
        count = random.Random("/".join(map(str, ("anchors", self.seed, *key)))).choice(self.counts)
        return count if span.window > SCORES[ANCHOR_SCORE].span(span.window) else 0
