"""The store of anchors: a bank of exact tokens, chosen as they leave the window, read by the same softmax.

All layers share one choice. Each votes on a token when it is read; when the token leaves the window, its score is the
mean of the layers' common vote over it and its neighbours, and the bank holds the best scores so far. Some scores take
means over several neighbourhoods, of which the highest counts, and lend what a token has to a few around it. As votes
are frozen when they are given, the bank depends on the text alone, not on the chunks in which it was read.

Legend of shapes: B batch, E tokens that leave the window in a call, C of them that enter the bank of some row, G
key/value heads, K key size, V value size, N anchors, P places in the ring of votes, R reaches of a score.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch

from ahn.cache.exact import NEVER, Extra, LaterStore, Padding, Tokens
from ahn.scores import Score
from ahn.scores.queries import NEVER_ASKED


class Choice(NamedTuple):
    """Which tokens that leave the window in a call become anchors, and how long each anchor is read.

    Attributes:
        entering: Places among the tokens that leave, `[C]` int64.
        born: Index of the first token whose query reads each anchor, the N held before and the C new ones,
            `[B or 1, N + C]` int64.
        died: Index of the first token whose query reads it no more, likewise.
        source: Which of those N + C each place of the bank holds after the call, `[B or 1, N]` int64; `None` where
            nothing changes.
    """

    entering: torch.Tensor
    born: torch.Tensor
    died: torch.Tensor
    source: torch.Tensor | None


class Bank(LaterStore):
    """Keys and values of the anchors of one layer.

    Args:
        anchors: Number of anchors, N.
    """

    names = ("anchor_keys", "anchor_values")

    def __init__(self, anchors: int) -> None:
        super().__init__()
        self.anchors = anchors

    def append(self, evicted: Tokens, choice: Choice) -> Extra:
        """Takes in what was chosen; what the queries of the call read.

        Args:
            evicted: The tokens that leave the window, oldest first.
            choice: What was chosen of them.
        """
        keys, values = self._place("anchor_keys", evicted.keys), self._place("anchor_values", evicted.values)
        if choice.entering.numel():
            entering = choice.entering.to(keys.device)
            keys = torch.cat((keys, evicted.keys.index_select(2, entering)), dim=2)
            values = torch.cat((values, evicted.values.index_select(2, entering)), dim=2)
        if choice.source is not None:
            source = choice.source.to(keys.device)[:, None, :, None]
            for name, all_ in (("anchor_keys", keys), ("anchor_values", values)):
                index = source.expand(all_.size(0), all_.size(1), -1, all_.size(3))
                self.held[name] = all_.detach().gather(2, index)
        return Extra(keys, values, choice.born.to(keys.device), choice.died.to(keys.device))

    def _place(self, name: str, like: torch.Tensor) -> torch.Tensor:
        if name not in self.held:
            self.held[name] = like.new_zeros(*like.shape[:2], self.anchors, like.size(3))
        return self.held[name]


class Tally(LaterStore):
    """Unit keys of a layer before their rotation, `[B, G, _, K]` float32: the sum of all, and the last ones."""

    names = ("key_total", "key_recent")


class Ballot:
    """The votes on the tokens of a cache, and which of them are anchors.

    Layers that slide by themselves have a window of their own, so that tokens leave them earlier; each window has its
    own list of anchors.

    Args:
        anchors: Number of anchors, N.
        sinks: Sinks of each row, which never leave.
        windows: Windows of the layers, in tokens.
        voters: Indices of the layers that vote.
        score: What they vote by.
        places: Places in the ring of votes, P; as few as do if left out.

    Attributes:
        delay: Tokens after which a token is voted on.
        held: Every tensor held, by name: `votes` `[B, P, R]` float32, and for each window w `scores.w` `[B, N]` float32
            and `tokens.w` `[B, N]` int64, -1 at places without an anchor.
    """

    def __init__(
        self,
        anchors: int,
        sinks: int,
        windows: set[int],
        voters: frozenset[int],
        score: Score,
        places: int | None = None,
    ) -> None:
        self.anchors = anchors
        self.sinks = sinks
        self.voters = voters
        self.score = score
        self.delay = score.delay(min(windows))
        self.windows = windows
        self.places = places or max(windows) + max(reach + score.behind(reach) for reach in score.reaches)
        self.held: dict[str, torch.Tensor] = {}

    @property
    def longest_call(self) -> int:
        """Tokens of the longest call whose leaving tokens, and their neighbours, have all been voted on before."""
        return min(self.windows) - self.score.span(min(self.windows))

    def count(self, votes_BTR: torch.Tensor, seen: int) -> None:
        """Keeps the votes that a call gave.

        Args:
            votes_BTR: Those of all layers as one: on the new tokens or, with a delay, on as many before them.
            seen: Tokens read before the call.
        """
        if "votes" not in self.held:
            rows, _, reaches = votes_BTR.shape
            self.held["votes"] = votes_BTR.new_zeros(rows, self.places, reaches, dtype=torch.float32)
        first = max(0, seen - self.delay)
        place = torch.arange(first, first + votes_BTR.size(1), device=votes_BTR.device) % self.places
        self.held["votes"].index_copy_(1, place, votes_BTR.detach().float())

    def choose(self, seen: int, new: int, padding: Padding | None) -> dict[int, Choice]:
        """The choice for the tokens that leave each window in a call, and keeps it.

        Args:
            seen: Tokens read before the call.
            new: Tokens of the call.
            padding: Padding at the left of the rows, or `None` where there is none.
        """
        if "votes" not in self.held:
            return {}
        choices = {}
        for window in self.windows:
            first = max(self.sinks, seen - window)
            leaving = torch.arange(first, max(first, seen + new - window), device=self.held["votes"].device)
            choice = self._choose(window, leaving, padding)
            if choice is not None:
                choices[window] = choice
        return choices

    def _choose(self, window: int, leaving_E: torch.Tensor, padding: Padding | None) -> Choice | None:
        scores, tokens = f"scores.{window}", f"tokens.{window}"
        if leaving_E.numel() and scores not in self.held:
            rows = self.held["votes"].size(0)
            self.held[scores] = self.held["votes"].new_full((rows, self.anchors), float("-inf"))
            self.held[tokens] = torch.full((rows, self.anchors), -1, device=leaving_E.device)
        if scores not in self.held:
            return None
        held = _Anchors(self.held[scores], self.held[tokens])
        candidates = _Anchors(self._scores(leaving_E, padding), leaving_E.expand(held.tokens.size(0), -1))
        choice, after = elect(held, candidates, window)
        if after is not None:
            self.held[scores], self.held[tokens] = after
        return choice

    def _scores(self, token_E: torch.Tensor, padding: Padding | None) -> torch.Tensor:
        """The highest score of each token, `[B, E]`; -inf for padding and sinks."""
        begin = torch.zeros(1, dtype=torch.long) if padding is None else padding.counts
        begin_B1 = begin.to(token_E.device)[:, None]
        reaches = zip(self.held["votes"].unbind(-1), self.score.reaches, strict=True)
        means = [self._means(votes_BP, reach, token_E, begin_B1) for votes_BP, reach in reaches]
        return torch.stack(means).amax(0).masked_fill(token_E < begin_B1 + self.sinks, float("-inf"))

    def _means(self, votes_BP: torch.Tensor, reach: int, token_E: torch.Tensor, begin_B1: torch.Tensor) -> torch.Tensor:
        """Mean votes of tokens and their neighbours within a reach, or what others lend, `[B, E]`."""
        before, behind = self.score.before(min(self.windows)), self.score.behind(reach)
        apart = torch.arange(-behind, before + 1, device=token_E.device)
        near = token_E[:, None] + torch.arange(-reach - behind, reach + before + 1, device=token_E.device)
        real = (near >= begin_B1[..., None]).to(votes_BP.dtype)
        votes = votes_BP[:, near % self.places] * real
        sums, counts = (x.unfold(-1, 2 * reach + 1, 1).sum(-1) for x in (votes, real))
        means = sums / counts.clamp(min=1) + self.score.ahead(reach) - self.score.fade * apart.abs()
        return means.masked_fill(counts == 0, float("-inf")).amax(-1)


@dataclasses.dataclass
class Election:
    """The choice of anchors in one call, and the votes on its new tokens.

    Attributes:
        ballot: Where the votes go when the call ends.
        seen: Tokens read before the call.
        choices: By window, which of the tokens that leave become anchors.
        votes: What the layers voted in this call, `[B, T]` each or, by kind and reach, `[B, T, kinds, R]`.
    """

    ballot: Ballot
    seen: int
    choices: dict[int, Choice]
    votes: list[torch.Tensor] = dataclasses.field(default_factory=list)

    def close(self) -> None:
        """Hands the votes in: the mean of the layers and, where they voted by kind, its best."""
        device = self.votes[0].device
        votes = torch.stack([votes.to(device) for votes in self.votes]).nanmean(0)
        if votes.dim() > 2:
            best_BTR = votes.nan_to_num(nan=NEVER_ASKED).amax(2)
        else:
            best_BTR = votes[..., None]
        self.ballot.count(best_BTR, self.seen)


class _Anchors(NamedTuple):
    """Scores and token indices, `[B, n]` each."""

    scores: torch.Tensor
    tokens: torch.Tensor


def elect(held: _Anchors, new: _Anchors, window: int) -> tuple[Choice, _Anchors | None]:
    """The best N of all tokens that have left so far, after each that leaves; of equal ones the earlier.

    Args:
        held: The anchors so far, N places.
        new: The tokens that leave, in their order.
        window: A token leaves when the one comes that stands so much later.

    Returns:
        The choice, and the anchors after it; `None` where they are those of before.
    """
    anchors, leaving = held.scores.size(1), new.scores.size(1)
    scores, tokens = torch.cat((held.scores, new.scores), 1), torch.cat((held.tokens, new.tokens), 1)
    is_token = (tokens >= 0) & (scores > float("-inf"))
    born = torch.where(is_token, tokens + window, NEVER)
    died = torch.full_like(born, NEVER)
    nothing = new.tokens[0, :0]
    if leaving == 0:
        return Choice(nothing, born, died, None), None
    # ahead[b, c, i]: how many are ahead of c once the first i + 1 tokens have left.
    earlier = tokens[:, None, :] < tokens[:, :, None]
    wins = (scores[:, None, :] > scores[:, :, None]) | ((scores[:, None, :] == scores[:, :, None]) & earlier)
    wins = wins & is_token[:, None, :]
    ahead = wins[..., :anchors].sum(-1, keepdim=True) + wins[..., anchors:].cumsum(-1)
    place = torch.arange(leaving, device=tokens.device)
    out = (ahead >= anchors) & is_token[..., None]
    out[:, anchors:] &= place >= place[:, None]  # not before it has left itself
    came = is_token.clone()
    came[:, anchors:] &= ~out[:, anchors:].diagonal(dim1=1, dim2=2)
    falls = out.any(-1)
    end = new.tokens.gather(1, out.to(torch.uint8).argmax(-1)) + window
    born, died = torch.where(came, born, NEVER), torch.where(came & falls, end, died)
    return _settled(born, died, came & ~falls, came, scores, tokens, anchors)


def _settled(
    born: torch.Tensor,
    died: torch.Tensor,
    stays: torch.Tensor,
    came: torch.Tensor,
    scores: torch.Tensor,
    tokens: torch.Tensor,
    anchors: int,
) -> tuple[Choice, _Anchors | None]:
    """Gives those that stay their places: old ones keep theirs, new ones take free ones in their order."""
    entering = came[:, anchors:].any(0).nonzero().flatten()
    if entering.numel() == 0:
        return Choice(entering, born[:, :anchors], died[:, :anchors], None), None
    columns = torch.cat((torch.arange(anchors, device=entering.device), anchors + entering))
    born, died, stays = born[:, columns], died[:, columns], stays[:, columns]
    free = (~stays[:, :anchors]).to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    fresh = stays[:, anchors:].to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :anchors]
    taken = torch.arange(fresh.size(1), device=entering.device) < stays[:, anchors:].sum(1, keepdim=True)
    source = torch.arange(anchors, device=entering.device).repeat(stays.size(0), 1)
    place = free[:, : fresh.size(1)]
    source.scatter_(1, place, torch.where(taken, anchors + fresh, source.gather(1, place)))
    scores, tokens = scores[:, columns].gather(1, source), tokens[:, columns].gather(1, source)
    gone = ~stays.gather(1, source)
    after = _Anchors(scores.masked_fill(gone, float("-inf")), tokens.masked_fill(gone, -1))
    return Choice(entering, born, died, source), after
