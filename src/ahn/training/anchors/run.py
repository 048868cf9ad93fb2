"""Makes the weights of anchor scores: reads documents, fits some layers, and checks the result."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ahn
from ahn.anchors.policy import check_window
from ahn.anchors.queries import AnchorQueries
from ahn.anchors.scores import SCORES
from ahn.attachment import attachment_of
from ahn.checkpoint.anchors import ANCHORS, read_anchors
from ahn.checkpoint.content import BaseInfo
from ahn.checkpoint.files import locate
from ahn.config import RunSettings
from ahn.errors import ConfigError
from ahn.generation import read
from ahn.models import load_model, load_tokenizer, resolve
from ahn.models.text import evenly
from ahn.surgery import set_score_weights
from ahn.training.anchor_settings import BEYOND_TOKENS, HELD_OUT, QUESTION_TOKENS, AnchorSettings, scores_with_weights
from ahn.training.anchors.asked import collect, missing_for_queries
from ahn.training.anchors.documents import FORMATS, FactText, UnfitText, make_document
from ahn.training.anchors.examples import Examples
from ahn.training.anchors.fit import Fit, joined
from ahn.training.anchors.future_attention import observe
from ahn.training.data import Cut, load_pieces
from ahn.training.log import Say
from ahn.training.sources import check_places

_SINKS = 4
_CONTROL = "key_diff"  # a score without weights, which others are compared with
_TOP = 64  # tokens of a document that are learned from because questions needed them most
_OTHERS = 320  # and others
KEPT = (32, 64, 128)
"""Numbers of anchors that the closing table is about."""


@dataclasses.dataclass(frozen=True)
class AnchorReport:
    """What a training of anchor scores achieved.

    Attributes:
        layers: For each layer that scores by "learned", the share of the variance that a linear map explains, and that
            its network explains, of what questions need.
        text: The same of what the text reads again.
        asked: For each layer that scores by "asked", its number of queries.
        shares_kept: By score and kind of fact, the share of the values' tokens among each number of anchors in `KEPT`.
        facts: Facts of each kind in held-out documents.
    """

    layers: dict[int, tuple[float, float]]
    text: dict[int, tuple[float, float]]
    asked: dict[int, int]
    shares_kept: dict[str, dict[str, list[float]]]
    facts: dict[str, int]


def check_anchor_settings(settings: AnchorSettings) -> None:
    """Checks all that can be checked before anything is loaded.

    Raises:
        ConfigError: There is no data, the folder is in use, or the window is too short for a score.
        DataError: Data cannot be found.
        ModelError: There is no base model of this name.
        CheckpointError: There are no queries of this name.
    """
    if not settings.data:
        raise ConfigError("there is no data to hide facts in; name a file, a folder or a dataset")
    out = Path(settings.out).expanduser()
    if out.exists() and (not out.is_dir() or any(file.name != ANCHORS.config for file in out.iterdir())):
        raise ConfigError(f"{settings.out} is not empty; name another folder")
    for name in (_CONTROL, *settings.scores):
        check_window(SCORES[name], settings.window)
    check_places(settings.data)
    resolve(settings.model)
    if settings.queries is not None:
        locate(settings.queries, config=ANCHORS.config)


def train_anchors(settings: AnchorSettings, say: Say | None = None, model: Any = None) -> AnchorReport:
    """Makes scores for anchors and writes their weights into a folder, for `ahn.load_anchors`.

    Args:
        settings: The settings.
        say: Prints a line of progress.
        model: The base model with a memory attached, which takes the weights; loaded if left out.

    Raises:
        ConfigError: A setting cannot work.
        DataError: The data cannot be found or read, or holds too little.
        ModelError: The base model cannot be loaded or given a memory.
        CheckpointError: The folder cannot be written, or the queries cannot be read.
    """
    say = say or (lambda text: None)
    check_anchor_settings(settings)
    if model is None:
        model = load_model(settings.model)
        ahn.attach(model, ahn.AHNConfig(window=settings.window, sinks=_SINKS))
    _check_model(model, settings)
    texts = _documents(settings, load_tokenizer(settings.model))
    votes: dict[int, dict[str, nn.Module]] = {}
    fits: tuple[dict[int, Fit], dict[int, Fit]] = {}, {}
    queries = _queries(model, texts, settings, say)
    if "asked" in settings.scores:
        for layer, weights in queries.items():
            votes.setdefault(layer, {})["asked"] = weights
    if "learned" in settings.scores:
        fits = _fits(model, texts, settings, queries, say)
        for layer, each in fits[0].items():
            votes.setdefault(layer, {})["learned"] = joined(each.gate, fits[1][layer].gate)
    for attention_layer in attachment_of(model).layers:
        set_score_weights(attention_layer, votes.get(attention_layer.index, {}))
    ahn.save_anchors(model, settings.out, dtype="float16")
    say("looking which facts of held-out documents are kept")
    shares_kept, facts = _shares_kept(
        model, texts[HELD_OUT - 1 :: HELD_OUT], _compared(model, settings), settings.window
    )
    questions, text = ({layer: (each.ridge, each.explained) for layer, each in own.items()} for own in fits)
    asked = {layer: len(weights.queries) for layer, weights in queries.items() if "asked" in settings.scores}
    return AnchorReport(questions, text, asked, shares_kept, facts)


def _check_model(model: nn.Module, settings: AnchorSettings) -> None:
    """Checks that a model can read the documents and choose anchors by the scores of the closing table."""
    attachment = attachment_of(model)
    limit = attachment.position_limit
    if limit is not None and settings.length > limit:
        raise ConfigError(
            f"this model has positions for {limit:,} tokens only, and a text with its questions has up to "
            f"{settings.length:,}; take a smaller length, and a smaller window if need be"
        )
    for name in _compared(model, settings):
        attachment.check(
            RunSettings.like(
                attachment.settings,
                mode="ahn",
                window=settings.window,
                sinks=_SINKS,
                anchors=max(KEPT),
                anchor_score=name,
            )
        )


def _queries(model: Any, texts: list[FactText], settings: AnchorSettings, say: Say) -> dict[int, AnchorQueries]:
    """Queries of example questions by layer: those that are there, or new ones.

    Where "learned" alone is made, and there can be none, there are none.
    """
    if settings.queries is not None:
        return _given_queries(model, settings.queries)
    known = [document for number, document in enumerate(texts) if not _is_held_out(number)]
    if "asked" not in settings.scores and (missing := missing_for_queries(model, known)) is not None:
        say(f"learned: from the questions of each text alone, without queries of other texts: {missing.problem}")
        return {}
    return collect(model, known, settings.window, say)


def _given_queries(model: Any, name: str) -> dict[int, AnchorQueries]:
    """Queries of a folder by layer, for a model that they fit."""
    if (missing := missing_for_queries(model)) is not None:
        raise missing.error
    folder = locate(name, config=ANCHORS.config)
    weights = read_anchors(name, folder, attachment_of(model), BaseInfo.of_model(model))
    found = {index: own.get("asked") for index, own in weights.items()}
    queries = {index: own for index, own in found.items() if isinstance(own, AnchorQueries)}
    if not queries:
        raise ConfigError(f"'{name}' holds no weights of asked; name other --queries, or none")
    return queries


def _layers_of_learned(model: nn.Module, count: int) -> list[int]:
    """Indices of layers from half to two thirds of the depth, where hidden states tell facts from other text best."""
    served = [layer.index for layer in attachment_of(model).layers if layer.memory is not None]
    half = len(served) // 2
    among, steps = served[half : max(half + count, 2 * len(served) // 3 + 1)], max(1, count - 1)
    return sorted({among[(number * (len(among) - 1) + steps // 2) // steps] for number in range(count)})


def _fits(
    model: nn.Module,
    texts: list[FactText],
    settings: AnchorSettings,
    queries: Mapping[int, AnchorQueries],
    say: Say,
) -> tuple[dict[int, Fit], dict[int, Fit]]:
    """Fitted networks of some layers: for what questions need, and for what the text reads again."""
    scoring = _layers_of_learned(model, settings.voters)
    generator = torch.Generator().manual_seed(settings.seed)
    questions, text = Examples(scoring), Examples(scoring)
    for number, document in enumerate(texts):
        seen = observe(model, document.ids, document.text, settings.window, scoring, queries)
        needed = [each_T for each_T in (seen.needed_T, seen.asked_T) if each_T is not None]
        last = min(document.text, len(document.ids) - settings.window)
        questions.add(seen, needed, _chosen(needed, last, generator), _is_held_out(number))
        read_on = (document.text - settings.window) // 2  # tokens with half of the most queries behind them, or more
        text.add(seen, [seen.reread_T], torch.arange(_SINKS, read_on), _is_held_out(number))
        if (number + 1) % 10 == 0:
            say(f"learned: read {number + 1} of {len(texts)} documents")
    return questions.fit(settings.width, settings.seed), text.fit(settings.width, settings.seed)


def _documents(settings: AnchorSettings, tokenizer: Any) -> list[FactText]:
    """Documents with facts; the left-out kind is in held-out documents only."""
    length, least = settings.length - QUESTION_TOKENS, settings.window + BEYOND_TOKENS
    rules = Cut(length, max(least, length // 2), per_document=200)
    remedy = "Give longer texts, or use a smaller --length or --window."
    sequences, _ = load_pieces(settings.data, tokenizer, rules, remedy=remedy)
    rng = random.Random(settings.seed)
    texts: list[FactText] = []
    problem = ""
    indices = evenly(range(len(sequences)), 2 * settings.documents)  # tables and the like are left out
    for index in rng.sample(indices, len(indices)):
        if len(texts) == settings.documents:
            break
        for_testing = _is_held_out(len(texts))
        kinds = list(FORMATS) if for_testing else [name for name in FORMATS if name != settings.left_out]
        text = tokenizer.decode(sequences[index]["input_ids"].tolist(), skip_special_tokens=True)
        try:
            texts.append(make_document(text, tokenizer, rng, kinds, not for_testing, least=least, most=settings.length))
        except UnfitText as error:
            problem = str(error)
    if len(texts) < settings.documents:
        raise ConfigError(
            f"facts can be hidden in {len(texts)} texts only ({problem}); give more running text, or a greater length"
        )
    return texts


def _is_held_out(number: int) -> bool:
    return number % HELD_OUT == HELD_OUT - 1


def _chosen(needed: list[torch.Tensor], last: int, generator: torch.Generator) -> torch.Tensor:
    """Tokens to learn from: those that were needed most, by each measure, and random others."""
    most = [each_T[_SINKS:last].topk(min(_TOP, last - _SINKS)).indices + _SINKS for each_T in needed]
    others = torch.randperm(last - _SINKS, generator=generator)[:_OTHERS] + _SINKS
    chosen: torch.Tensor = torch.cat((*most, others)).unique()
    return chosen


def _compared(model: nn.Module, settings: AnchorSettings) -> list[str]:
    """Scores of the closing table: one without weights and those that were made, as far as the model can have them."""
    problem = attachment_of(model).rotation_problem
    names = (_CONTROL, *(name for name in scores_with_weights() if name in settings.scores))
    return [name for name in names if not (SCORES[name].pre_rope and problem)]


def _shares_kept(
    model: Any, documents: list[FactText], scores: Sequence[str], window: int
) -> tuple[dict[str, dict[str, list[float]]], dict[str, int]]:
    """Shares of the values' tokens that are in the bank when a question begins."""
    facts = dict.fromkeys(FORMATS, 0)
    shares: dict[str, dict[str, list[list[float]]]] = {}
    for document in documents:
        gone = [(name, positions) for name, positions in document.values if positions[-1] < document.text - window]
        for name, _ in gone:
            facts[name] += 1
        for score in scores:
            ranked = _ranked(model, document, score, window)
            banks = [set(ranked[:anchors]) for anchors in KEPT]  # a smaller bank is the best part of a larger one
            for name, positions in gone:
                shares_of = [len(bank & set(positions)) / len(positions) for bank in banks]
                shares.setdefault(score, {}).setdefault(name, []).append(shares_of)
    means = {
        score: {name: torch.tensor(each).mean(0).tolist() for name, each in by_kind.items()}
        for score, by_kind in shares.items()
    }
    return means, facts


def _ranked(model: Any, document: FactText, score: str, window: int) -> list[int]:
    """Tokens that are anchors at the end of the text, the best first."""
    with ahn.mode(model, "ahn", window=window, sinks=_SINKS, anchors=max(KEPT), anchor_score=score):
        cache = ahn.HippocampalCache(model)
        read(model, document.ids[: document.text], cache=cache, score=False)
    return cache.anchor_tokens[0]
