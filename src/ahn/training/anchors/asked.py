"""The queries of example questions, kept to be put to every key: a score for anchors that nothing is trained for.

A text with facts is read with full attention, and asked for them at its end. For each token of a fact and each layer
the query is kept that looked at it most. Put to the keys of another text it looks at what it would take for an answer
there, whatever is asked. The layers that looked at facts most vote.

Legend of shapes: T tokens, Q of them in questions, F tokens of facts, N kept queries, H query heads, G key/value heads,
M of a head's queries, K key size.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import nn

from ahn.attachment import attachment_of
from ahn.errors import ConfigError
from ahn.positions import Tables
from ahn.scores import AnchorQueries
from ahn.training.anchors.documents import Document
from ahn.training.anchors.watching import Sight, watch

_SINKS = 4  # first tokens, which queries rest on
_SAMPLE = 128  # tokens of a text that stand for all of it
_AMONG = 1024  # tokens of a text that a query's share of attention is reckoned for
_VOTERS = 4  # one layer of so many votes
_LEAST = 1e-6  # of a token that nothing looks at


@dataclasses.dataclass(eq=False)
class _Asked:
    """The queries of one text's answers in one layer, turned as if they stood one window behind every key.

    Attributes:
        layer: The layer's index.
        queries_HQK: The queries, times the factor on products.
        rests_HQ: Log of what they give the first tokens of their text.
        shares_HQF: The share of each token of a fact in the residual stream of the token that asks.
        sample_GSK: Some keys of the text as they were before their rotation.
    """

    layer: int
    queries_HQK: torch.Tensor
    rests_HQ: torch.Tensor
    shares_HQF: torch.Tensor
    sample_GSK: torch.Tensor


@dataclasses.dataclass(eq=False)
class _Kept:
    """One query that is kept.

    Attributes:
        group: Key/value head that it looks at.
        text: Number of its text.
        query_K: The query.
        rest: Log of what it gave the first tokens of its text.
    """

    group: int
    text: int
    query_K: torch.Tensor
    rest: torch.Tensor


@dataclasses.dataclass(eq=False)
class _Layer:
    """What a layer has shown so far.

    Attributes:
        kept: Its queries.
        samples: Some keys of each text, `[G, S, K]`.
        looked: Logs of the largest share of each token of a fact, `[F]` for each text.
    """

    kept: list[_Kept] = dataclasses.field(default_factory=list)
    samples: list[torch.Tensor] = dataclasses.field(default_factory=list)
    looked: list[torch.Tensor] = dataclasses.field(default_factory=list)


def collect(model: nn.Module, documents: Sequence[Document], window: int) -> dict[int, AnchorQueries]:
    """Reads texts with questions and keeps the queries that found the answers.

    The offset of a query is minus the logarithm of what it gave the first tokens of its own text and gives 1,024
    average ones of the others, so that its score of a key is the share of attention that it would spend on it.

    Args:
        model: A model with a memory attached.
        documents: The texts, at least two.
        window: Tokens by which a query stands behind a key that it is put to.

    Returns:
        The weights of the score by layer: of the quarter of the layers that looked at facts most.

    Raises:
        ConfigError: The rotary positions of this model cannot be undone.
    """
    attachment = attachment_of(model)
    if attachment.rotation_problem:
        raise ConfigError(
            f"the rotary positions of this model cannot be undone ({attachment.rotation_problem}), as the score "
            '"asked" needs; make "learned" alone'
        )
    layers: dict[int, _Layer] = {}
    for number, document in enumerate(documents):
        for asked in _read(model, document, window):
            layer = layers.setdefault(asked.layer, _Layer())
            layer.kept += _best(asked, number)
            layer.samples.append(asked.sample_GSK)
            layer.looked.append(asked.shares_HQF.amax((0, 1)).clamp(min=_LEAST).log().cpu())
    by_look = sorted(layers, key=lambda index: -float(torch.cat(layers[index].looked).mean()))
    return {index: _weights(layers[index]) for index in sorted(by_look[: max(1, len(layers) // _VOTERS)])}


def _read(model: nn.Module, document: Document, window: int) -> list[_Asked]:
    facts = sorted({place for _, places in document.values for place in places})
    seen: list[_Asked] = []

    def look(sight: Sight) -> None:
        if sight.site.memory is not None:
            seen.append(_look(sight, document.text, torch.tensor(facts, device=sight.length_T.device), window))

    watch(model, document.ids, look)
    return seen


def _look(sight: Sight, asked: int, fact_F: torch.Tensor, window: int) -> _Asked:
    moved_HT, rests, shares = sight.moved(), [], []
    for head in range(moved_HT.size(0)):
        scores_QT = sight.scores(head, asked)
        weights_QF = scores_QT.softmax(-1)[:, fact_F]
        shares.append(weights_QF * moved_HT[head, fact_F] / sight.length_T[asked:, None])
        rests.append(scores_QT[:, :_SINKS].logsumexp(-1))
    places = torch.linspace(_SINKS, asked - 1, min(_SAMPLE, asked - _SINKS), device=fact_F.device).long()
    queries_HQK = _turned(sight, sight.query_HTK[:, asked:], torch.arange(asked, moved_HT.size(1)), window)
    sample_GSK = _turned(sight, sight.key_GTK[:, places], places, 0)
    return _Asked(
        sight.site.index, queries_HQK * sight.scaling, torch.stack(rests), torch.stack(shares), sample_GSK.cpu()
    )


def _turned(sight: Sight, x_HTK: torch.Tensor, places_T: torch.Tensor, to: int) -> torch.Tensor:
    """Queries or keys of these tokens as they are at another position, float32; at 0 without any rotation."""
    rotation, x_1HTK = sight.site.rotation, x_HTK[None].float()
    if rotation is None or sight.tables is None:
        return x_HTK.float()
    tables: Tables = (sight.tables[0][:, places_T], sight.tables[1][:, places_T])
    x_1HTK = rotation.undo(x_1HTK, tables)
    if to:
        x_1HTK = rotation.apply(x_1HTK, rotation.tables(torch.tensor([[to]], device=x_HTK.device)))
    return x_1HTK[0]


def _best(asked: _Asked, text: int) -> list[_Kept]:
    """For each token of a fact the query of a layer that looked at it most."""
    heads, questions = asked.rests_HQ.shape
    found = []
    for index in asked.shares_HQF.flatten(0, 1).argmax(0).unique().tolist():
        head, place = divmod(index, questions)
        group = head * asked.sample_GSK.size(0) // heads
        found.append(_Kept(group, text, asked.queries_HQK[head, place].cpu(), asked.rests_HQ[head, place].cpu()))
    return found


def _weights(layer: _Layer) -> AnchorQueries:
    """The weights of a layer, of all its queries."""
    heads, _, key_size = layer.samples[0].shape
    by_head = [[each for each in layer.kept if each.group == group] for group in range(heads)]
    weights = AnchorQueries(heads, max(map(len, by_head)), key_size)
    for group, queries in enumerate(by_head):
        for place, each in enumerate(queries):
            others = torch.cat([sample[group] for text, sample in enumerate(layer.samples) if text != each.text])
            usual = (others @ each.query_K).logsumexp(0) - math.log(len(others)) + math.log(_AMONG)
            weights.queries[group, place] = each.query_K
            weights.offsets[group, place] = -torch.logaddexp(each.rest, usual)
    return weights
