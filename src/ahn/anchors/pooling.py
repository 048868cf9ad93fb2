"""How the scores of neighbours are joined: averages, and the highest of them spreads to the tokens around it.

Legend of shapes: B batch, N tokens in a row, E of them that are asked for, X means that may spread to one, R scores
of a token.
"""

from __future__ import annotations

import dataclasses

import torch

POOL = 3
"""Neighbours on each side that scores are averaged over. Those after a token are still in the window when it leaves."""
LONG_POOL = 10
"""The same for long facts."""
_NEAREST = 1  # the same for tokens that no firm mean spreads to
_BEHIND = 100.0  # by which these rank behind all others; scores are of a size of 1


@dataclasses.dataclass(frozen=True)
class Pooling:
    """Average pooling with one or more kernels, then max pooling over what spreads to a token.

    Where `firm` is set, tokens come in two tiers. Those that a firm mean spreads to form spans, which are kept whole or
    not at all. All others rank behind them, by a mean over their nearest neighbours of another score.

    Attributes:
        kernels: Neighbours on each side that scores are averaged over, the smallest first; the highest mean counts.
        bonus: Added to the means of all kernels but the first, which are lower on average.
        spread: How many tokens before and after one with a high mean get some of it. Before: the words that introduce a
            fact are kept. After: the mean drops where a fact ends. The means of wider kernels spread further after it.
        slope: Loss of score per token of that distance.
        firm: Means below it do not spread; `None` if all do.
    """

    kernels: tuple[int, ...] = (POOL,)
    bonus: float = 0.0
    spread: tuple[int, int] = (0, 0)
    slope: float = 0.0
    firm: float | None = None

    @property
    def scores(self) -> int:
        """How many scores of a token it joins, R: one for each kernel, and one for what no firm mean spreads to."""
        return len(self.kernels) + (self.firm is not None)

    def margins(self, window: int) -> tuple[int, int]:
        """Tokens before and after one that its pooled score depends on.

        Args:
            window: Tokens of the shortest window. Scores spread over at most a quarter of it.
        """
        nearest = 0 if self.firm is None else _NEAREST
        before = max(nearest, *(kernel + self._after(kernel) for kernel in self.kernels))
        return before, max(nearest, max(self.kernels) + self._spread(window))

    def apply(self, scores_BNR: torch.Tensor, real_BN: torch.Tensor, window: int) -> torch.Tensor:
        """Pooled scores of consecutive tokens, `[B, E]`: all but the margins at both ends.

        Args:
            scores_BNR: Scores for each kernel and, where `firm` is set, those of the others, `[B, N, R]`.
            real_BN: 1 for real tokens, 0 for padding and positions before a text begins, `[B or 1, N]`.
            window: As for `margins`.
        """
        (left, right), spread = self.margins(window), self._spread(window)
        pooled = []
        for kernel, scores_BN in zip(self.kernels, scores_BNR.unbind(-1)[: len(self.kernels)], strict=True):
            after = self._after(kernel)
            reach = slice(left - kernel - after, scores_BN.size(1) - right + kernel + spread)
            means_BEX, is_real_BEX = _means(scores_BN[:, reach], real_BN[:, reach], kernel, after + spread + 1)
            distance = torch.arange(-after, spread + 1, device=means_BEX.device).abs()
            lower_BEX = means_BEX + (self.bonus if kernel > self.kernels[0] else 0.0) - self.slope * distance
            spreads_BEX = is_real_BEX if self.firm is None else is_real_BEX & (means_BEX >= self.firm)
            pooled.append(lower_BEX.masked_fill(~spreads_BEX, float("-inf")).amax(-1))
        best_BE = torch.stack(pooled).amax(0)
        if self.firm is None:
            return best_BE
        near = slice(left - _NEAREST, scores_BNR.size(1) - right + _NEAREST)
        others_BE1, is_real_BE1 = _means(scores_BNR[:, near, -1], real_BN[:, near], _NEAREST, 1)
        others_BE = (others_BE1 - _BEHIND).masked_fill(~is_real_BE1, float("-inf")).squeeze(-1)
        return torch.where(best_BE.isinf(), others_BE, best_BE)

    def _spread(self, window: int) -> int:
        return min(self.spread[0], window // 4)

    def _after(self, kernel: int) -> int:
        return self.spread[1] + kernel - self.kernels[0]


def _means(
    scores_BN: torch.Tensor, real_BN: torch.Tensor, kernel: int, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each token the means around `count` consecutive tokens, `[B, E, X]`, and which have a real token in them."""
    scores_BEY, real_BEY = (x.unfold(-1, count + 2 * kernel, 1).contiguous() for x in (scores_BN, real_BN))
    sums, counts = (x.unfold(-1, 2 * kernel + 1, 1).sum(-1) for x in (scores_BEY * real_BEY, real_BEY))
    return sums / counts.clamp(min=1), counts > 0
