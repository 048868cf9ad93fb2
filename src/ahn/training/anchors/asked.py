"""The queries of example questions, kept to be put to every key: a score for anchors that nothing is trained for.

A text with facts is read with full attention, and asked for them at its end. For each token of a fact and each layer
the query is taken that looked at it most; those are kept that look at some token of another text's facts more than any
other query of their kind. Put to the keys of another text such a query looks at what it would take for an answer there,
whatever is asked. By the queries of each kind of fact those layers vote in which they find their kind best in texts
that they do not come from; what they give one in 333 tokens of other texts is taken from their votes, so that no kind
fills the bank with what only looks like it.

Legend of shapes: T tokens, Q of them in questions, F tokens of facts, S other tokens of a text, N kept queries, H query
heads, G key/value heads, K key size.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from ahn.anchors.queries import AnchorQueries
from ahn.attachment import attachment_of
from ahn.backbone.rotary import Tables
from ahn.errors import ConfigError
from ahn.training.anchors.documents import Document
from ahn.training.anchors.watching import Sight, watch
from ahn.training.log import Say

_SINKS = 4  # first tokens, which queries rest on
_SAMPLE = 128  # tokens of a text that stand for all of it
_AMONG = 1024  # tokens of a text that a query's share of attention is reckoned for
_RARE = 0.003  # share of other texts' tokens that the queries of a kind of fact give a positive vote
_VOTERS = 6  # one layer of so many votes by the queries of a kind
_LONG = 10  # tokens of a fact, well over the neighbourhood that votes are averaged over
_BEST = 0.02  # share of other texts' tokens that a fact must be among to be found


@dataclasses.dataclass(eq=False)
class _Asked:
    """What one text's answers looked at in one layer.

    Attributes:
        layer: The layer's index.
        queries_HQK: Their queries, times the factor on products, turned to stand one window behind every key.
        rests_HQ: Log of what they gave the first tokens of the text.
        shares_HQF: The share of each token of a fact in the residual stream of the token that asks.
        facts_GFK: Keys of the facts as they were before their rotation.
        sample_GSK: Those of some tokens of the text.
    """

    layer: int
    queries_HQK: torch.Tensor
    rests_HQ: torch.Tensor
    shares_HQF: torch.Tensor
    facts_GFK: torch.Tensor
    sample_GSK: torch.Tensor


@dataclasses.dataclass(eq=False)
class _Layer:
    """What a layer has kept of all texts so far.

    Attributes:
        queries: Its queries, `[K]` each.
        heads: The key/value head that each looks at.
        kinds: The kind of fact that it found.
        texts: The number of its text.
        rests: Log of what it gave the first tokens of that text.
        facts: Keys of the facts of each text, `[G, F, K]`.
        samples: Some keys of each text, `[G, S, K]`.
    """

    queries: list[torch.Tensor] = dataclasses.field(default_factory=list)
    heads: list[int] = dataclasses.field(default_factory=list)
    kinds: list[str] = dataclasses.field(default_factory=list)
    texts: list[int] = dataclasses.field(default_factory=list)
    rests: list[torch.Tensor] = dataclasses.field(default_factory=list)
    facts: list[torch.Tensor] = dataclasses.field(default_factory=list)
    samples: list[torch.Tensor] = dataclasses.field(default_factory=list)

    def keep(self, asked: _Asked, kinds: Sequence[str]) -> None:
        """Keeps, for each token of a fact, the query that looked at it most.

        Args:
            asked: What the layer saw of a text.
            kinds: The kind of fact that each of the facts' tokens belongs to.
        """
        query_heads, questions = asked.rests_HQ.shape
        for index, kind in sorted(set(zip(asked.shares_HQF.flatten(0, 1).argmax(0).tolist(), kinds))):
            head, place = divmod(index, questions)
            self.kinds.append(kind)
            self.queries.append(asked.queries_HQK[head, place].cpu())
            self.heads.append(head * asked.sample_GSK.size(0) // query_heads)
            self.texts.append(len(self.samples))
            self.rests.append(asked.rests_HQ[head, place].cpu())
        self.facts.append(asked.facts_GFK.cpu())
        self.samples.append(asked.sample_GSK.cpu())

    def looks(self, meant: Mapping[str, torch.Tensor]) -> _Looks:
        """How its queries look at texts that they do not come from, and their offsets.

        An offset makes a product the log of a share of attention: minus the log of what the query gives the first
        tokens of its text and average ones of others.

        Args:
            meant: For each kind which tokens of all facts of all texts are of it, `[F]`.
        """
        facts_NF, sample_NS = self._given(self.facts), self._given(self.samples)
        usual_N = sample_NS.logsumexp(1) - sample_NS.isfinite().sum(1).log() + math.log(_AMONG)
        offsets_N = -torch.logaddexp(torch.stack(self.rests), usual_N)
        facts_NF += offsets_N[:, None]
        sample_NS += offsets_N[:, None]
        by_kind = {}
        for kind, meant_F in meant.items():
            alike = torch.tensor([n for n, each in enumerate(self.kinds) if each == kind])
            kept = alike[facts_NF[alike][:, meant_F].argmax(0).unique()]
            by_kind[kind] = _Seen(kept.tolist(), facts_NF[kept].amax(0), sample_NS[kept].amax(0))
        return _Looks(offsets_N, by_kind)

    def weights(self, looks: _Looks, least: Mapping[str, float], kinds: Mapping[str, bool]) -> AnchorQueries:
        """The weights of the layer's vote.

        Args:
            looks: How its queries look at texts.
            least: The kinds that it votes by, and what is taken from the votes of each.
            kinds: All kinds, by which any layer votes, and whether their facts are long.
        """
        kept = [looks.by_kind[kind].queries if kind in least else [] for kind in kinds]
        heads, size = self.samples[0].size(0), self.queries[0].numel()
        weights = AnchorQueries([len(own) for own in kept], heads, size, list(kinds.values()))
        for place, n in enumerate(n for own in kept for n in own):
            weights.queries[place] = self.queries[n]
            weights.offsets[place, self.heads[n]] = looks.offsets_N[n] - least[self.kinds[n]]
        return weights

    def _given(self, keys: Sequence[torch.Tensor]) -> torch.Tensor:
        """Products of each query with keys of each text, `[N, all of them]`; -inf for those of its own text."""
        text_S = torch.cat([torch.full((own.size(1),), text) for text, own in enumerate(keys)])
        keys_GSK = torch.cat(list(keys), dim=1)
        given_NS = torch.stack([keys_GSK[head] @ query_K for query_K, head in zip(self.queries, self.heads)])
        return given_NS.masked_fill(torch.tensor(self.texts)[:, None] == text_S, float("-inf"))


class _Seen(NamedTuple):
    """The queries of a kind that a layer keeps, and the most that those of other texts give tokens: -inf if none.

    Attributes:
        queries: Their numbers: the best of the kind for some token of a fact of another text.
        facts_F: What they give the tokens of all facts of all texts.
        sample_S: And other tokens of all texts.
    """

    queries: list[int]
    facts_F: torch.Tensor
    sample_S: torch.Tensor

    def found(self, meant_F: torch.Tensor) -> float:
        """Share of some facts' tokens that are given more than most others.

        Args:
            meant_F: Which facts' tokens are meant.
        """
        return (self.facts_F[meant_F] > _rarest(self.sample_S, _BEST)).float().mean().item()


class _Looks(NamedTuple):
    """How the queries of a layer look at texts.

    Attributes:
        offsets_N: What is added to the products of each.
        by_kind: How those of each kind look at texts that they do not come from.
    """

    offsets_N: torch.Tensor
    by_kind: dict[str, _Seen]


def collect(
    model: nn.Module, documents: Sequence[Document], window: int, say: Say | None = None
) -> dict[int, AnchorQueries]:
    """Reads texts with questions and keeps the queries that found the answers.

    The offset of a query is minus the logarithm of what it gave the first tokens of its own text and gives 1,024
    average ones of the others, so that its score of a key is the share of attention that it would spend on it; and
    minus the share that the queries of its kind, in the mean over their layers, spend on one in 333 tokens of texts
    that they do not come from.

    Args:
        model: A model with a memory attached.
        documents: The texts.
        window: Tokens by which a query stands behind a key that it is put to.
        say: Is given a line of text now and then.

    Returns:
        The weights of the score by layer.

    Raises:
        ConfigError: The rotary positions of this model cannot be undone, or no two texts have facts of one kind.
    """
    problem = attachment_of(model).rotation_problem
    if problem:
        raise ConfigError(
            f'the rotary positions of this model cannot be undone ({problem}), as the score "asked" needs; make '
            '"learned" alone'
        )
    in_texts = Counter(kind for document in documents for kind in {kind for kind, _ in document.values})
    kinds = {kind: _is_long(kind, documents) for kind, texts in sorted(in_texts.items()) if texts > 1}
    if not kinds:
        raise ConfigError('no two texts have facts of one kind, as the score "asked" needs; give more documents')
    layers: dict[int, _Layer] = {}
    of_facts: list[str] = []
    for number, document in enumerate(documents, 1):
        own = [kind for kind, places in document.values for _ in places]
        of_facts += own
        for asked in _read(model, document, window):
            layers.setdefault(asked.layer, _Layer()).keep(asked, own)
        if say is not None and number % 10 == 0:
            say(f"asked: read {number} of {len(documents)} documents")
    meant = {kind: torch.tensor([each == kind for each in of_facts]) for kind in kinds}
    looks = {index: layer.looks(meant) for index, layer in layers.items()}
    least = _voters({index: look.by_kind for index, look in looks.items()}, meant)
    return {index: layers[index].weights(looks[index], least[index], kinds) for index in sorted(least)}


def _is_long(kind: str, documents: Sequence[Document]) -> bool:
    """Whether the facts of a kind are long, in the mean."""
    lengths = [len(places) for document in documents for each, places in document.values if each == kind]
    return sum(lengths) > _LONG * len(lengths)


def _voters(looks: Mapping[int, Mapping[str, _Seen]], meant: Mapping[str, torch.Tensor]) -> dict[int, dict[str, float]]:
    """For each layer that votes the kinds it votes by, and what is taken from the votes of each.

    Args:
        looks: How the queries of each kind look at texts, by layer.
        meant: For each kind which tokens of all facts of all texts are of it, `[F]`.
    """
    voters: dict[int, dict[str, float]] = {}
    for kind, meant_F in meant.items():
        found = {index: look[kind].found(meant_F) for index, look in looks.items()}
        best = sorted(found, key=lambda index: -found[index])[: max(1, len(found) // _VOTERS)]
        least = _rarest(torch.stack([looks[index][kind].sample_S for index in best]).mean(0), _RARE)
        for index in best:
            voters.setdefault(index, {})[kind] = least
    return voters


def _rarest(sample_S: torch.Tensor, share: float) -> float:
    """What only this share of some votes exceed, those left out that nobody gave."""
    return sample_S[sample_S.isfinite()].quantile(1 - share).item()


def _read(model: nn.Module, document: Document, window: int) -> list[_Asked]:
    """What the answers looked at in each layer with a memory."""
    facts = torch.tensor([place for _, places in document.values for place in places])
    seen: list[_Asked] = []

    def look(sight: Sight) -> None:
        if sight.site.memory is not None:
            seen.append(_look(sight, document.text, facts.to(sight.length_T.device), window))

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
    asking = torch.arange(asked, moved_HT.size(1), device=fact_F.device)
    queries_HQK = _turned(sight, sight.query_HTK[:, asking], asking, window) * sight.scaling
    facts_GFK, sample_GSK = (_turned(sight, sight.key_GTK[:, each], each, 0) for each in (fact_F, places))
    return _Asked(sight.site.index, queries_HQK, torch.stack(rests), torch.stack(shares), facts_GFK, sample_GSK)


def _turned(sight: Sight, x_HTK: torch.Tensor, places_T: torch.Tensor, to: int) -> torch.Tensor:
    """Queries or keys of these tokens as they are at another position, float32; at 0 without any rotation."""
    rotation, x_1HTK = sight.site.rotation, x_HTK[None].float()
    if rotation is None or sight.tables is None:
        return x_HTK.float()
    tables: Tables = (sight.tables[0][:, places_T], sight.tables[1][:, places_T])
    x_1HTK = rotation.unrotate(x_1HTK, tables)
    if to:
        x_1HTK = rotation.apply(x_1HTK, rotation.tables(torch.tensor([[to]], device=x_HTK.device)))
    return x_1HTK[0]
