"""How the scores of neighbours are joined: averages, and the highest of them spreads to the tokens around it.

Legend of shapes: B batch, N tokens in a row, E of them that are asked for, X tokens that one depends on, R kernels.
"""

from __future__ import annotations

import dataclasses

import torch

POOL = 3
"""Neighbours on each side that scores are averaged over. Those after a token are still in the window when it leaves."""
LONG_POOL = 10
"""The same for long facts."""


@dataclasses.dataclass(frozen=True)
class Pooling:
    """Average pooling with one or more kernels, then max pooling with a slope.

    Attributes:
        kernels: Neighbours on each side that scores are averaged over, the smallest first; the highest mean counts.
        bonus: Added to the means of all kernels but the first, which are lower on average.
        spread: How many tokens before and after one with a high mean get some of it. Before: the words that introduce a
            fact are kept. After: the mean drops where a fact ends. The means of wider kernels spread further after it.
        slope: Loss of score per token of that distance.
    """

    kernels: tuple[int, ...] = (POOL,)
    bonus: float = 0.0
    spread: tuple[int, int] = (0, 0)
    slope: float = 0.0

    def margins(self, window: int) -> tuple[int, int]:
        """Tokens before and after one that its pooled score depends on.

        Args:
            window: Tokens of the shortest window. Scores spread over at most a quarter of it.
        """
        return max(kernel + self._after(kernel) for kernel in self.kernels), max(self.kernels) + self._spread(window)

    def apply(self, scores_BNR: torch.Tensor, real_BN: torch.Tensor, window: int) -> torch.Tensor:
        """Pooled scores of consecutive tokens, `[B, E]`: all but the margins at both ends.

        Args:
            scores_BNR: Scores for each kernel, `[B, N, R]`.
            real_BN: 1 for real tokens, 0 for padding and positions before a text begins, `[B or 1, N]`.
            window: As for `margins`.
        """
        (left, right), spread = self.margins(window), self._spread(window)
        pooled = []
        for kernel, scores_BN in zip(self.kernels, scores_BNR.unbind(-1), strict=True):
            after = self._after(kernel)
            reach = slice(left - kernel - after, scores_BN.size(1) - right + kernel + spread)
            scores_BEX, real_BEX = (
                x[:, reach].unfold(-1, after + spread + 2 * kernel + 1, 1).contiguous() for x in (scores_BN, real_BN)
            )
            sums, counts = (x.unfold(-1, 2 * kernel + 1, 1).sum(-1) for x in (scores_BEX * real_BEX, real_BEX))
            means = sums / counts.clamp(min=1) + (self.bonus if kernel > self.kernels[0] else 0.0)
            distance = torch.arange(-after, spread + 1, device=means.device).abs()
            pooled.append((means - self.slope * distance).masked_fill(counts == 0, float("-inf")).amax(-1))
        return torch.stack(pooled).amax(0)

    def _spread(self, window: int) -> int:
        return min(self.spread[0], window // 4)

    def _after(self, kernel: int) -> int:
        return self.spread[1] + kernel - self.kernels[0]
