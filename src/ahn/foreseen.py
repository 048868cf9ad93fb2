"""Votes on all tokens of a text that are known before it is read, so that one call reads the whole text with anchors.

Without them a call is read in pieces, because a token can only be voted on once every layer has read it, and the pieces
are joined by a cache, through which no gradient flows. A training has a teacher that reads the text first.

Legend of shapes: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from ahn.attachment import Attachment
from ahn.cache.anchors import Ballot, Election
from ahn.cache.cache import new_cascade
from ahn.cache.exact import Padding
from ahn.config import RunSettings
from ahn.scores import find_score

_votes: ContextVar[Sequence[torch.Tensor] | None] = ContextVar("ahn_foreseen_votes", default=None)


@contextmanager
def foreseen(votes: Sequence[torch.Tensor]) -> Iterator[None]:
    """Chooses anchors by these votes inside a `with` block, in calls that begin a text and keep no cache.

    The choice is the one that reading in pieces makes of the same votes: of all tokens that have left the window so
    far, the best ones are read.

    Args:
        votes: Of each layer that votes, its votes on all tokens of the text that is read, `[B, T]`.
    """
    token = _votes.set(votes)
    try:
        yield
    finally:
        _votes.reset(token)


def is_foreseen() -> bool:
    """Whether the votes on the tokens of a call are known before it."""
    return _votes.get() is not None


def foreseen_election(attachment: Attachment, settings: RunSettings, padding: Padding | None) -> Election | None:
    """The choice of anchors for a call that reads a whole text.

    Args:
        attachment: What is attached to the model.
        settings: Settings of the call.
        padding: Padding at the left of the rows, or `None` where there is none.

    Returns:
        An election that is closed to further votes, or `None` where no votes are known.
    """
    votes = _votes.get()
    if votes is None:
        return None
    served = [(site, site.memory) for site in attachment.sites if site.memory is not None]
    windows = {new_cascade(site, memory, settings).exact.window for site, memory in served}
    score, length = find_score(settings.anchor_score), votes[0].size(1)
    ballot = Ballot(settings.anchors, settings.sinks, windows, frozenset(), score, places=length)
    Election(ballot, 0, {}, list(votes)).close()
    return Election(ballot, 0, ballot.choose(0, length, padding))
