"""The weights of the score `asked`: queries of example questions, which are applied to every key. Nothing is trained.

The base model reads texts with facts and questions about them, with full attention. For each token of a fact, each
layer gives the query that looked at it most. A query is kept if it is the best of its kind for some token of another
text's facts. Applied to the keys of a new text, it attends to what would answer its kind of question there.

For each kind of fact only the layers score whose queries best find that kind in texts that they do not come from. The
score that one in 333 unrelated tokens exceeds is subtracted, so that no kind fills the bank with false positives.

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
from ahn.errors import ConfigError
from ahn.training.anchors.capture import LayerAttention, watch
from ahn.training.anchors.documents import FactText
from ahn.training.log import Say

_SINKS = 4  # first tokens, which queries rest on
_SAMPLE = 128  # tokens of a text that represent all of it
_AMONG = 1024  # tokens of a text that a query's share of attention is reckoned for
_RARE = 0.003  # share of other texts' tokens that the queries of a kind score above 0
_LAYER_SHARE = 6  # one layer in this many scores by the queries of a kind
_LONG = 10  # tokens of a fact, well over the neighbourhood that scores are averaged over
_BEST = 0.02  # share of other texts' tokens that a fact must be among to be found


@dataclasses.dataclass(eq=False)
class _Asked:
    """What the answers of one text attended to in one layer.

    Attributes:
        layer: The layer's index.
        queries_HQK: Their queries, times the scale of the products, rotated to one window after every key.
        rests_HQ: Log of the weight that they gave the first tokens of the text.
        shares_HQF: The share of each token of a fact in the residual stream of the token that asks.
        facts_GFK: Keys of the facts before rotation.
        sample_GSK: Keys of some other tokens of the text, before rotation.
    """

    layer: int
    queries_HQK: torch.Tensor
    rests_HQ: torch.Tensor
    shares_HQF: torch.Tensor
    facts_GFK: torch.Tensor
    sample_GSK: torch.Tensor


@dataclasses.dataclass(eq=False)
class _Layer:
    """What a layer has collected from all texts so far.

    Attributes:
        queries: Its queries, `[K]` each.
        heads: The key/value head of each query.
        kinds: The kind of fact that each query found.
        texts: The number of each query's text.
        log_sums: Log of the weight that it gave the first tokens of that text.
        facts: Keys of the facts of each text, `[G, F, K]`.
        samples: Some keys of each text, `[G, S, K]`.
    """

    queries: list[torch.Tensor] = dataclasses.field(default_factory=list)
    heads: list[int] = dataclasses.field(default_factory=list)
    kinds: list[str] = dataclasses.field(default_factory=list)
    texts: list[int] = dataclasses.field(default_factory=list)
    log_sums: list[torch.Tensor] = dataclasses.field(default_factory=list)
    facts: list[torch.Tensor] = dataclasses.field(default_factory=list)
    samples: list[torch.Tensor] = dataclasses.field(default_factory=list)

    def keep(self, asked: _Asked, kinds: Sequence[str]) -> None:
        """Collects, for each token of a fact, by its kind, the query that looked at it most."""
        query_heads, questions = asked.rests_HQ.shape
        for index, kind in sorted(set(zip(asked.shares_HQF.flatten(0, 1).argmax(0).tolist(), kinds))):
            head, question = divmod(index, questions)
            self.kinds.append(kind)
            self.queries.append(asked.queries_HQK[head, question].cpu())
            self.heads.append(head * asked.sample_GSK.size(0) // query_heads)
            self.texts.append(len(self.samples))
            self.log_sums.append(asked.rests_HQ[head, question].cpu())
        self.facts.append(asked.facts_GFK.cpu())
        self.samples.append(asked.sample_GSK.cpu())

    def responses(self, meant: Mapping[str, torch.Tensor]) -> _Responses:
        """How its queries attend to texts that they do not come from, and their offsets.

        An offset turns a product into the log of a share of attention. It is minus the log of what the query gives the
        first tokens of its text and average tokens of other texts.

        Args:
            meant: For each kind a mask of its tokens among all facts of all texts, `[F]`.
        """
        facts_NF, sample_NS = self._scores(self.facts), self._scores(self.samples)
        usual_N = sample_NS.logsumexp(1) - sample_NS.isfinite().sum(1).log() + math.log(_AMONG)
        offsets_N = -torch.logaddexp(torch.stack(self.log_sums), usual_N)
        facts_NF += offsets_N[:, None]
        sample_NS += offsets_N[:, None]
        by_kind = {}
        for kind, meant_F in meant.items():
            alike = torch.tensor([n for n, each in enumerate(self.kinds) if each == kind])
            chosen = alike[facts_NF[alike][:, meant_F].argmax(0).unique()]
            by_kind[kind] = _Response(chosen.tolist(), facts_NF[chosen].amax(0), sample_NS[chosen].amax(0))
        return _Responses(offsets_N, by_kind)

    def weights(self, responses: _Responses, least: Mapping[str, float], kinds: Mapping[str, bool]) -> AnchorQueries:
        """The layer's weights of the score: `least` has its kinds and their thresholds, `kinds` which are long."""
        chosen = [responses.by_kind[kind].queries if kind in least else [] for kind in kinds]
        heads, size = self.samples[0].size(0), self.queries[0].numel()
        weights = AnchorQueries([len(own) for own in chosen], heads, size, list(kinds.values()))
        for slot, n in enumerate(n for own in chosen for n in own):
            weights.queries[slot] = self.queries[n]
            weights.offsets[slot, self.heads[n]] = responses.offsets_N[n] - least[self.kinds[n]]
        return weights

    def _scores(self, keys: Sequence[torch.Tensor]) -> torch.Tensor:
        """Products of each query with the keys of all texts, `[N, all keys]`; -inf for keys of its own text."""
        text_S = torch.cat([torch.full((own.size(1),), text) for text, own in enumerate(keys)])
        keys_GSK = torch.cat(list(keys), dim=1)
        given_NS = torch.stack([keys_GSK[head] @ query_K for query_K, head in zip(self.queries, self.heads)])
        return given_NS.masked_fill(torch.tensor(self.texts)[:, None] == text_S, float("-inf"))


class _Response(NamedTuple):
    """The kept queries of one kind in a layer, and the largest products that they give tokens of other texts.

    Attributes:
        queries: Their numbers: the best of the kind for some token of a fact of another text.
        facts_F: Largest product for the tokens of all facts of all texts; -inf where no query is of another text.
        sample_S: The same for other tokens of all texts.
    """

    queries: list[int]
    facts_F: torch.Tensor
    sample_S: torch.Tensor

    def shares(self, meant_F: torch.Tensor) -> float:
        """Share of the facts' tokens in a mask that score higher than most other tokens."""
        return (self.facts_F[meant_F] > _rarest(self.sample_S, _BEST)).float().mean().item()


class _Responses(NamedTuple):
    """How strongly the queries of a layer attend to tokens of texts.

    Attributes:
        offsets_N: Added to the products of each query.
        by_kind: For each kind, how its queries attend to texts that they do not come from.
    """

    offsets_N: torch.Tensor
    by_kind: dict[str, _Response]


def collect(
    model: nn.Module, documents: Sequence[FactText], window: int, say: Say | None = None
) -> dict[int, AnchorQueries]:
    """Reads texts with questions and keeps the queries that found the answers.

    Each query has an offset of two parts. The first is minus its log-normaliser: the log of what it gave the first
    tokens of its text and gives 1,024 average tokens of the other texts. It turns a product into the log of a share of
    attention. The second is minus a threshold for each kind, the score that one in 333 tokens of other texts exceeds,
    averaged over the layers. It makes all kinds equally selective.

    Args:
        model: A model with a memory attached.
        documents: The texts.
        window: Distance in tokens from a key to the query that is applied to it.
        say: Prints a line of progress.

    Returns:
        The weights of the score by layer.

    Raises:
        ConfigError: The rotary positions of this model cannot be undone, or no two texts have facts of one kind.
    """
    if (missing := missing_for_queries(model, documents)) is not None:
        raise missing.error
    kinds = {kind: _is_long(kind, documents) for kind in _common_kinds(documents)}
    layers: dict[int, _Layer] = {}
    of_facts: list[str] = []
    for number, document in enumerate(documents, 1):
        own = [kind for kind, positions in document.values for _ in positions]
        of_facts += own
        for asked in _read(model, document, window):
            layers.setdefault(asked.layer, _Layer()).keep(asked, own)
        if say is not None and number % 10 == 0:
            say(f"asked: read {number} of {len(documents)} documents")
    meant = {kind: torch.tensor([each == kind for each in of_facts]) for kind in kinds}
    responses = {index: layer.responses(meant) for index, layer in layers.items()}
    least = _scoring_layers({index: look.by_kind for index, look in responses.items()}, meant)
    return {index: layers[index].weights(responses[index], least[index], kinds) for index in sorted(least)}


class MissingQueries(NamedTuple):
    """Why there can be no queries.

    Attributes:
        problem: What is wrong.
        remedy: What to do, for who asked for the score "asked".
    """

    problem: str
    remedy: str

    @property
    def error(self) -> ConfigError:
        """Both, to be raised."""
        return ConfigError(f'{self.problem}, so the score "asked" cannot be made; {self.remedy}')


def missing_for_queries(model: nn.Module, documents: Sequence[FactText] | None = None) -> MissingQueries | None:
    """Why queries cannot be collected; `None` where they can.

    Args:
        model: A model with a memory attached.
        documents: The texts to collect them from; left out for queries that are there already.
    """
    if problem := attachment_of(model).rotation_problem:
        return MissingQueries(
            f"the rotary positions of this model cannot be undone ({problem})", 'make "learned" alone'
        )
    if documents is not None and not _common_kinds(documents):
        return MissingQueries("no two texts have facts of one kind", "give more documents")
    return None


def _common_kinds(documents: Sequence[FactText]) -> list[str]:
    """Kinds of facts that two texts have at least."""
    in_texts = Counter(kind for document in documents for kind in {kind for kind, _ in document.values})
    return sorted(kind for kind, texts in in_texts.items() if texts > 1)


def _is_long(kind: str, documents: Sequence[FactText]) -> bool:
    """Whether the facts of a kind are long on average."""
    lengths = [len(positions) for document in documents for each, positions in document.values if each == kind]
    return sum(lengths) > _LONG * len(lengths)


def _scoring_layers(
    responses: Mapping[int, Mapping[str, _Response]], meant: Mapping[str, torch.Tensor]
) -> dict[int, dict[str, float]]:
    """For each scoring layer its kinds, and the threshold of each kind."""
    scoring: dict[int, dict[str, float]] = {}
    for kind, meant_F in meant.items():
        shares = {index: look[kind].shares(meant_F) for index, look in responses.items()}
        best = sorted(shares, key=lambda index: -shares[index])[: max(1, len(shares) // _LAYER_SHARE)]
        least = _rarest(torch.stack([responses[index][kind].sample_S for index in best]).mean(0), _RARE)
        for index in best:
            scoring.setdefault(index, {})[kind] = least
    return scoring


def _rarest(sample_S: torch.Tensor, share: float) -> float:
    """The value that only this share of some scores exceed; scores of -inf are left out."""
    return sample_S[sample_S.isfinite()].quantile(1 - share).item()


def _read(model: nn.Module, document: FactText, window: int) -> list[_Asked]:
    """What the answers attended to, in each layer with a memory."""
    facts = torch.tensor([position for _, positions in document.values for position in positions])
    seen: list[_Asked] = []

    def look(captured: LayerAttention) -> None:
        if captured.layer.memory is not None:
            seen.append(_look(captured, document.text, facts.to(captured.length_T.device), window))

    watch(model, document.ids, look)
    return seen


def _look(captured: LayerAttention, asked: int, fact_F: torch.Tensor, window: int) -> _Asked:
    moved_HT, log_sums, shares = captured.moved(), [], []
    for head in range(moved_HT.size(0)):
        scores_QT = captured.scores(slice(head, head + 1), asked)[0]
        weights_QF = scores_QT.softmax(-1)[:, fact_F]
        shares.append(weights_QF * moved_HT[head, fact_F] / captured.length_T[asked:, None])
        log_sums.append(scores_QT[:, :_SINKS].logsumexp(-1))
    positions = torch.linspace(_SINKS, asked - 1, min(_SAMPLE, asked - _SINKS), device=fact_F.device).long()
    questions_T = torch.arange(asked, moved_HT.size(1), device=fact_F.device)
    queries_HQK = _moved_to(window, captured, questions_T) * captured.scaling
    facts_GFK, sample_GSK = (captured.unrotated(captured.key_GTK[:, each], each) for each in (fact_F, positions))
    return _Asked(captured.layer.index, queries_HQK, torch.stack(log_sums), torch.stack(shares), facts_GFK, sample_GSK)


def _moved_to(position: int, captured: LayerAttention, places_T: torch.Tensor) -> torch.Tensor:
    """Queries of some tokens as they would be at another position, `[H, T, K]` float32."""
    query_HTK, rotation = captured.unrotated(captured.query_HTK[:, places_T], places_T), captured.layer.rotation
    if rotation is None or captured.tables is None:
        return query_HTK
    tables = rotation.tables(torch.tensor([[position]], device=query_HTK.device))
    return rotation.apply(query_HTK[None], tables)[0]
