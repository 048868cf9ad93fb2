"""Which tokens become anchors: the best scored of those that leave the window.

All layers share one choice. Some of them score each token, and the mean of the layers goes to the scoreboard. When the
token leaves the window, its score is pooled with those of its neighbours, and the bank holds the best so far. A score
is final before its token can leave: the choice depends on the text alone, not on the chunks in which it was read.

Legend of shapes: B batch, T new tokens, E tokens that leave the window in a call, C of them that enter the bank of some
row, G key/value heads, K key size, N anchors, P tokens on the scoreboard, R scores of a token that its pooling joins.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ahn.anchors.base import LayerTokens, Score, unrotate_together
from ahn.tokens import NEVER, Padding

_NOT_SCORED = -1e4
"""Score of a token where no layer has one of any kind."""


class Selected(NamedTuple):
    """Which tokens that leave the window in a call become anchors, and which queries read each anchor.

    Attributes:
        entering: Places among the tokens that leave, `[C]` int64.
        visible_from: Index of the first token whose query reads each anchor, the N held before and the C new ones,
            `[B or 1, N + C]` int64.
        visible_until: Index of the first token whose query no longer reads it, `[B or 1, N + C]` int64.
        source: Which of those N + C each slot of the bank holds after the call, `[B or 1, N]` int64; `None` where
            nothing changes.
    """

    entering: torch.Tensor
    visible_from: torch.Tensor
    visible_until: torch.Tensor
    source: torch.Tensor | None

    @property
    def held(self) -> int:
        """Places for anchors of before, N."""
        return self.visible_from.size(1) - self.entering.numel()

    def written(self, first: int, leaving: int) -> torch.Tensor:
        """Which token is written into a memory that leaves anchors out, at each query for which one leaves the window.

        A token that becomes an anchor is not written. The anchor that has to go for it is.

        Args:
            first: Index of the query for which the first token leaves.
            leaving: Number of tokens that leave, E.

        Returns:
            Places among the N anchors of before, the C new ones, then the E tokens that leave, `[B or 1, E]` int64; -1
            where nothing is written.
        """
        rows, places = self.visible_from.shape
        places_BE = places + torch.arange(leaving, device=self.entering.device).repeat(rows, 1)
        came_BC = self.visible_from[:, self.held :] != NEVER
        places_BE[:, self.entering] = places_BE[:, self.entering].masked_fill(came_BC, -1)
        row, place = (self.visible_until != NEVER).nonzero().unbind(1)
        places_BE[row, self.visible_until[row, place] - first] = place
        return places_BE


def score_of_layers(scores: Sequence[torch.Tensor]) -> torch.Tensor:
    """The mean of the layers, and if they scored by kind that of the best kind: `[B, T, R]`.

    Args:
        scores: What `Score.score` gave in each layer, `[B, T]` or `[B, T, C, R]`.
    """
    mean = torch.stack([each.to(scores[0].device) for each in scores]).nanmean(0)
    return mean.nan_to_num(nan=_NOT_SCORED).amax(2) if mean.dim() > 2 else mean[..., None]


class Scoreboard:
    """The scores of the tokens of a cache, and which of them are anchors.

    Layers that slide by themselves have a window of their own, so that tokens leave them earlier; each window has its
    own list of anchors.

    Args:
        anchors: Number of anchors, N.
        sinks: Sinks of each row, which never leave.
        windows: Windows of the layers, in tokens.
        layers: Indices of the layers that score.
        score: What they score by.

    Attributes:
        delay: Tokens that must follow a token before its score is final.
        length: Tokens whose scores are stored, P.
        stored: Every tensor by its name in saved caches. `votes` `[B, P, R]` float32 is the layers' mean
            score of each token, token j at j mod P. For each window w there are `scores.w` `[B, N]` float32 and
            `tokens.w` `[B, N]` int64, -1 where there is no anchor.
    """

    def __init__(self, anchors: int, sinks: int, windows: set[int], layers: frozenset[int], score: Score) -> None:
        self.anchors = anchors
        self.sinks = sinks
        self.layers = layers
        self.score = score
        self.windows = windows
        self.delay = score.delay(min(windows))
        self._margins = score.pooling.margins(min(windows))
        self.length = max(windows) + self._margins[0]
        self.stored: dict[str, torch.Tensor] = {}

    @property
    def longest_call(self) -> int:
        """Tokens of the longest call before which everything was final that decides on the tokens that leave in it."""
        return min(self.windows) - self.score.span(min(self.windows))

    def record(self, scores_BTR: torch.Tensor, seen: int) -> None:
        """Keeps the scores that a call gave.

        Args:
            scores_BTR: The layers' mean scores of the tokens from `seen - delay` (or 0) on, see `Score.score`.
            seen: Tokens read before the call.
        """
        if "votes" not in self.stored:
            rows, _, scores = scores_BTR.shape
            self.stored["votes"] = scores_BTR.new_zeros(rows, self.length, scores, dtype=torch.float32)
        scores_BPR, scores_BTR = self.stored["votes"], scores_BTR.detach().float()
        first = max(0, seen - self.delay)
        slot = torch.arange(first, first + scores_BTR.size(1), device=scores_BPR.device) % self.length
        # Not in place: a call that fails leaves the scores of before.
        if self.score.accumulates:
            scores_BPR = scores_BPR.index_fill(1, slot[seen - first :], 0.0)
            self.stored["votes"] = scores_BPR.index_add(1, slot, scores_BTR)
        else:
            self.stored["votes"] = scores_BPR.index_copy(1, slot, scores_BTR)

    def select(self, seen: int, new: int, padding: Padding | None) -> dict[int, Selected]:
        """The choice among the tokens that leave each window in a call, and keeps it.

        Args:
            seen: Tokens read before the call.
            new: Tokens of the call.
            padding: Padding at the left of the rows, or `None` where there is none.
        """
        by_window = {}
        for window in self.windows if "votes" in self.stored else ():
            first = max(self.sinks, seen - window)
            selected = self._select(window, first, max(first, seen + new - window), padding)
            if selected is not None:
                by_window[window] = selected
        return by_window

    def _select(self, window: int, first: int, stop: int, padding: Padding | None) -> Selected | None:
        scores, tokens, device = f"scores.{window}", f"tokens.{window}", self.stored["votes"].device
        if stop > first and scores not in self.stored:
            rows = self.stored["votes"].size(0)
            self.stored[scores] = self.stored["votes"].new_full((rows, self.anchors), float("-inf"))
            self.stored[tokens] = torch.full((rows, self.anchors), -1, device=device)
        if scores not in self.stored:
            return None
        anchors = _Anchors(self.stored[scores], self.stored[tokens])
        leaving = torch.arange(first, stop, device=device).expand(anchors.tokens.size(0), -1)
        selected, after = select(anchors, _Anchors(self._pooled(first, stop, padding), leaving), window)
        if after is not None:
            self.stored[scores], self.stored[tokens] = after
        return selected

    def _pooled(self, first: int, stop: int, padding: Padding | None) -> torch.Tensor:
        """Pooled scores of the tokens from `first` to `stop` - 1, `[B, E]`; -inf for padding and sinks."""
        scores_BPR, (left, right) = self.stored["votes"], self._margins
        index = torch.arange(first - left, stop + right, device=scores_BPR.device)
        begin = torch.zeros(1, dtype=torch.long) if padding is None else padding.counts
        begin_B1 = begin.to(index.device)[:, None]
        if stop == first:
            return scores_BPR.new_zeros(scores_BPR.size(0), 0)
        real = (index >= begin_B1).to(scores_BPR.dtype)
        pooled_BE = self.score.pooling.apply(scores_BPR[:, index % self.length], real, min(self.windows))
        return pooled_BE.masked_fill(index[left : left + stop - first] < begin_B1 + self.sinks, float("-inf"))


@dataclasses.dataclass
class Selection:
    """The choice of anchors in one call, and the scores of its new tokens.

    Attributes:
        scoreboard: Where the scores go when the call ends.
        seen: Tokens read before the call.
        new: Tokens of the call.
        padding: Padding at the left of the rows, or `None`.
        selected: By window, which of the tokens that leave become anchors; made when the call begins.
    """

    scoreboard: Scoreboard
    seen: int
    new: int
    padding: Padding | None

    def __post_init__(self) -> None:
        self.selected = self.scoreboard.select(self.seen, self.new, self.padding)
        self._scores: list[torch.Tensor] = []  # of each layer
        self._waiting: list[LayerTokens] = []

    def add(self, tokens: LayerTokens, later: bool) -> None:
        """Scores the new tokens of a layer.

        Args:
            tokens: The tokens.
            later: Whether to wait for the other layers, which spares operations and holds all their tensors.
        """
        self._waiting.append(tokens)
        if not later:
            self._score_waiting()

    def close(self) -> None:
        """Records the mean of the layers; if they scored by kind, that of the best kind."""
        self._score_waiting()
        self.scoreboard.record(score_of_layers(self._scores), self.seen)

    @torch.no_grad()
    def _score_waiting(self) -> None:
        score = self.scoreboard.score
        if score.pre_rope and len(self._waiting) > 1:
            unrotate_together(self._waiting)
        for tokens in self._waiting:
            scores = score.score(tokens)
            self._scores.append(scores.expand(tokens.keys.size(0), *scores.shape[1:]))
        self._waiting = []


class _Anchors(NamedTuple):
    """Scores and token indices, `[B, n]` each."""

    scores: torch.Tensor
    tokens: torch.Tensor


def select(old: _Anchors, new: _Anchors, window: int) -> tuple[Selected, _Anchors | None]:
    """The best N of all tokens that have left so far, after each that leaves; of equal ones the earlier.

    Args:
        old: The anchors so far, N.
        new: The tokens that leave, in their order.
        window: A token leaves when the one comes that stands so much later.

    Returns:
        What was selected, and the anchors after it; `None` where they are those of before.
    """
    if (selected := _unchanged(old, new, window)) is not None:
        return selected, None
    anchors, leaving = old.scores.size(1), new.scores.size(1)
    scores, tokens = torch.cat((old.scores, new.scores), 1), torch.cat((old.tokens, new.tokens), 1)
    is_token = (tokens >= 0) & (scores > float("-inf"))
    visible_from = torch.where(is_token, tokens + window, NEVER)
    visible_until = torch.full_like(visible_from, NEVER)
    nothing = new.tokens[0, :0]
    if leaving == 0:
        return Selected(nothing, visible_from, visible_until, None), None
    # rank[b, c, i]: how many are better than c once the first i + 1 tokens have left.
    earlier = tokens[:, None, :] < tokens[:, :, None]
    wins = (scores[:, None, :] > scores[:, :, None]) | ((scores[:, None, :] == scores[:, :, None]) & earlier)
    wins = wins & is_token[:, None, :]
    rank = wins[..., :anchors].sum(-1, keepdim=True) + wins[..., anchors:].cumsum(-1)
    order = torch.arange(leaving, device=tokens.device)
    out = (rank >= anchors) & is_token[..., None]
    out[:, anchors:] &= order >= order[:, None]  # not before it has left itself
    came = is_token.clone()
    came[:, anchors:] &= ~out[:, anchors:].diagonal(dim1=1, dim2=2)
    falls = out.any(-1)
    end = new.tokens.gather(1, out.to(torch.uint8).argmax(-1)) + window
    visible_from, visible_until = torch.where(came, visible_from, NEVER), torch.where(came & falls, end, visible_until)
    return _settled(visible_from, visible_until, came & ~falls, came, scores, tokens, anchors)


def _unchanged(old: _Anchors, new: _Anchors, window: int) -> Selected | None:
    """What was selected where every place is taken and no token is better than any anchor, as for nearly all tokens."""
    if old.tokens.size(1) == 0 or new.tokens.size(1) == 0:
        return None
    worst_B, best_B = old.scores.amin(1), new.scores.amax(1)
    if not bool(((worst_B > float("-inf")) & (best_B <= worst_B)).all() & (old.tokens >= 0).all()):
        return None
    visible_from = old.tokens + window
    return Selected(new.tokens[0, :0], visible_from, torch.full_like(visible_from, NEVER), None)


def _settled(
    visible_from: torch.Tensor,
    visible_until: torch.Tensor,
    stays: torch.Tensor,
    came: torch.Tensor,
    scores: torch.Tensor,
    tokens: torch.Tensor,
    anchors: int,
) -> tuple[Selected, _Anchors | None]:
    """Gives each anchor its slot: old ones keep theirs, new ones take free ones in their order."""
    entering = came[:, anchors:].any(0).nonzero().flatten()
    if entering.numel() == 0:
        return Selected(entering, visible_from[:, :anchors], visible_until[:, :anchors], None), None
    columns = torch.cat((torch.arange(anchors, device=entering.device), anchors + entering))
    visible_from, visible_until, stays = visible_from[:, columns], visible_until[:, columns], stays[:, columns]
    free = (~stays[:, :anchors]).to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    fresh = stays[:, anchors:].to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :anchors]
    taken = torch.arange(fresh.size(1), device=entering.device) < stays[:, anchors:].sum(1, keepdim=True)
    source = torch.arange(anchors, device=entering.device).repeat(stays.size(0), 1)
    slot = free[:, : fresh.size(1)]
    source.scatter_(1, slot, torch.where(taken, anchors + fresh, source.gather(1, slot)))
    scores, tokens = scores[:, columns].gather(1, source), tokens[:, columns].gather(1, source)
    gone = ~stays.gather(1, source)
    after = _Anchors(scores.masked_fill(gone, float("-inf")), tokens.masked_fill(gone, -1))
    return Selected(entering, visible_from, visible_until, source), after
