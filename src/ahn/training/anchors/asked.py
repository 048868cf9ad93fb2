"""The queries of example questions, kept to be put to every key: a score for anchors that nothing is trained for.

A text with facts is read with full attention, and asked for them at its end. For each token of a fact and each layer
the query is kept that looked at it most. Put to the keys of another text it looks at what it would take for an answer
there, whatever is asked. What the queries of one kind of fact give one in 200 tokens of other texts is taken from their
votes, so that no kind fills the bank with what only looks like it. The layers vote whose queries find facts best in
texts that they do not come from, or those that are named.

Legend of shapes: T tokens, Q of them in questions, F tokens of facts, S other tokens of a text, N kept queries, H query
heads, G key/value heads, K key size.
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
from ahn.training.log import Say

_SINKS = 4  # first tokens, which queries rest on
_SAMPLE = 128  # tokens of a text that stand for all of it
_AMONG = 1024  # tokens of a text that a query's share of attention is reckoned for
_RARE = 0.005  # share of other texts' tokens that the queries of a kind of fact give a positive vote
_VOTERS = 5  # one layer of so many votes
_BEST = 0.05  # share of a text's tokens that a fact must be among to be found


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
        best = dict(zip(asked.shares_HQF.flatten(0, 1).argmax(0).tolist(), kinds))
        for index, kind in best.items():
            head, place = divmod(index, questions)
            self.kinds.append(kind)
            self.queries.append(asked.queries_HQK[head, place].cpu())
            self.heads.append(head * asked.sample_GSK.size(0) // query_heads)
            self.texts.append(len(self.samples))
            self.rests.append(asked.rests_HQ[head, place].cpu())
        self.facts.append(asked.facts_GFK.cpu())
        self.samples.append(asked.sample_GSK.cpu())

    def offsets(self) -> torch.Tensor:
        """What is added to the products of each query so that its vote says how rarely it looks so hard, `[N]`.

        That is minus the log of what it gives the first tokens of its text and average ones of others, and minus what
        the queries of its kind give one in 200 tokens of other texts.
        """
        text_S = torch.cat([torch.full((sample.size(1),), text) for text, sample in enumerate(self.samples)])
        sample_GSK = torch.cat(self.samples, dim=1)
        given_NS = torch.stack([sample_GSK[head] @ query_K for query_K, head in zip(self.queries, self.heads)])
        given_NS = given_NS.masked_fill(torch.tensor(self.texts)[:, None] == text_S, float("-inf"))
        others_N = given_NS.isfinite().sum(1)
        usual_N = given_NS.logsumexp(1) - others_N.log() + math.log(_AMONG)
        offsets_N = -torch.logaddexp(torch.stack(self.rests), usual_N)
        for kind in set(self.kinds):
            alike_N = torch.tensor([each == kind for each in self.kinds])
            most_S = (given_NS[alike_N] + offsets_N[alike_N, None]).amax(0)
            offsets_N[alike_N] -= most_S[most_S.isfinite()].quantile(1 - _RARE)
        return offsets_N

    def weights(self, offsets_N: torch.Tensor, besides: int | None = None) -> AnchorQueries:
        """The weights of the layer's vote.

        Args:
            offsets_N: What `offsets` gives.
            besides: Number of a text whose queries are left out.
        """
        kept = [n for n, text in enumerate(self.texts) if text != besides]
        own = [[n for n in kept if self.heads[n] == head] for head in range(self.samples[0].size(0))]
        weights = AnchorQueries([len(each) for each in own], self.queries[0].numel())
        weights.queries.copy_(torch.stack([self.queries[n] for each in own for n in each]))
        for head, each in enumerate(own):
            weights.offsets[head, : len(each)] = offsets_N[each]
        return weights

    def found(self, offsets_N: torch.Tensor, kinds: Sequence[Sequence[str]]) -> float:
        """Share of the facts' tokens that queries of other texts find, the mean over kinds of facts.

        Args:
            offsets_N: What `offsets` gives.
            kinds: For each text the kind of fact that each of its facts' tokens belongs to.
        """
        shares: dict[str, list[float]] = {}
        for text, (facts_GFK, sample_GSK) in enumerate(zip(self.facts, self.samples)):
            weights = self.weights(offsets_N, besides=text)
            least = weights(sample_GSK[None])[0].quantile(1 - _BEST)
            for kind, vote in zip(kinds[text], weights(facts_GFK[None])[0]):
                shares.setdefault(kind, []).append(float(vote > least))
        return sum(sum(each) / len(each) for each in shares.values()) / len(shares)


def collect(
    model: nn.Module,
    documents: Sequence[Document],
    window: int,
    say: Say | None = None,
    voters: Sequence[int] = (),
) -> dict[int, AnchorQueries]:
    """Reads texts with questions and keeps the queries that found the answers.

    The offset of a query is minus the logarithm of what it gave the first tokens of its own text and gives 1,024
    average ones of the others, so that its score of a key is the share of attention that it would spend on it; and
    minus the share that queries of its kind spend on one in 200 tokens of texts that they do not come from.

    Args:
        model: A model with a memory attached.
        documents: The texts, at least two.
        window: Tokens by which a query stands behind a key that it is put to.
        say: Is given a line of text now and then.
        voters: Indices of the layers that vote; none for the fifth of the layers whose queries find facts best.

    Returns:
        The weights of the score by layer.

    Raises:
        ConfigError: The rotary positions of this model cannot be undone, or a layer has no memory.
    """
    attachment = attachment_of(model)
    if attachment.rotation_problem:
        raise ConfigError(
            f"the rotary positions of this model cannot be undone ({attachment.rotation_problem}), as the score "
            '"asked" needs; make "learned" alone'
        )
    attachment.check_layers("asked_layers", voters)
    layers: dict[int, _Layer] = {}
    kinds = [[kind for kind, places in document.values for _ in places] for document in documents]
    for number, document in enumerate(documents, 1):
        for asked in _read(model, document, window, voters):
            layers.setdefault(asked.layer, _Layer()).keep(asked, kinds[number - 1])
        if say is not None and number % 10 == 0:
            say(f"asked: read {number} of {len(documents)} documents")
    offsets = {index: layer.offsets() for index, layer in layers.items()}
    best = sorted(voters) or _best(layers, offsets, kinds)
    return {index: layers[index].weights(offsets[index]) for index in best}


def _best(layers: dict[int, _Layer], offsets: dict[int, torch.Tensor], kinds: Sequence[Sequence[str]]) -> list[int]:
    """The layers whose queries find facts best."""
    found = {index: layer.found(offsets[index], kinds) for index, layer in layers.items()}
    return sorted(sorted(found, key=lambda index: -found[index])[: max(1, len(found) // _VOTERS)])


def _read(model: nn.Module, document: Document, window: int, layers: Sequence[int] = ()) -> list[_Asked]:
    """What the answers looked at in each layer, or in those that are named alone."""
    facts = torch.tensor([place for _, places in document.values for place in places])
    seen: list[_Asked] = []

    def look(sight: Sight) -> None:
        if sight.site.index in layers or (not layers and sight.site.memory is not None):
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
    x_1HTK = rotation.undo(x_1HTK, tables)
    if to:
        x_1HTK = rotation.apply(x_1HTK, rotation.tables(torch.tensor([[to]], device=x_HTK.device)))
    return x_1HTK[0]
