"""From documents to sequences: tokenise, cut or pack, leave out short ones, and hold out a share."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from ahn.distillation import IGNORED
from ahn.errors import ConfigError, one_line
from ahn.models.text import evenly, opening_of, text_tokens
from ahn.training.batches import Piece, Pieces, PieceStream
from ahn.training.sources import DataError, DataQuery, Document, documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class Cut:
    """How documents become sequences.

    Attributes:
        length: Most tokens of a sequence.
        min_length: Fewest tokens of a sequence; shorter ones are left out.
        pack: Whether to join documents, with an end-of-text token between them, so that all sequences are full.
        held_out: Share of the tokens that is kept for evaluation: the end of each long document, and some of the short
            documents at even distances.
        per_document: Most sequences of a document, spread evenly over it; all of them if left out. It keeps a few long
            documents from drowning many short ones. Not for documents that are joined.

    Raises:
        ConfigError: A value is out of range.
    """

    length: int
    min_length: int
    pack: bool = False
    held_out: float = 0.0
    per_document: int | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.min_length <= self.length:
            raise ConfigError(f"min_length must be from 2 to the length {self.length}, not {self.min_length}")
        if not 0 <= self.held_out < 1:
            raise ConfigError(f"held_out must be a share from 0 to below 1, not {self.held_out}")
        if self.per_document is not None and (self.per_document < 1 or self.pack):
            raise ConfigError("per_document must be at least 1, and needs documents that are cut, not packed")


def load_pieces(
    sources: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    rules: Cut,
    query: DataQuery | None = None,
    remedy: str = "Use a smaller --length or --min-length, or join the texts with --pack.",
) -> tuple[Pieces, Pieces]:
    """Sequences to train on and sequences held out, in memory.

    Args:
        sources: As for `documents`.
        tokenizer: The base model's tokenizer.
        rules: How to cut.
        query: As for `documents`.
        remedy: What to do where all texts are too short.

    Raises:
        DataError: There is no data, a record is bad, or all of it is too short.
    """
    train_pieces: list[Piece] = []
    held_out: list[Piece] = []
    sources = list(sources)
    for piece, is_held in _split(sources, tokenizer, rules, query):
        (held_out if is_held else train_pieces).append(piece)
    if not train_pieces:
        raise DataError(f"{', '.join(sources)}: no text of {rules.min_length} tokens or more. {remedy}")
    return Pieces(train_pieces), Pieces(held_out)


def stream_pieces(
    sources: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    rules: Cut,
    query: DataQuery | None = None,
    held_out_pieces: int = 16,
) -> tuple[PieceStream, Pieces]:
    """Sequences to train on, made while they are read, and the first held-out sequences, in memory.

    Args:
        sources: As for `documents`.
        tokenizer: The base model's tokenizer.
        rules: How to cut.
        query: As for `documents`.
        held_out_pieces: How many held-out sequences to look for, among a bounded number of others.
    """
    sources = list(sources)

    def training() -> Iterator[Piece]:
        return (piece for piece, is_held in _split(sources, tokenizer, rules, query) if not is_held)

    held_out: list[Piece] = []
    if rules.held_out:
        first = itertools.islice(
            _split(sources, tokenizer, rules, query), math.ceil(4 * held_out_pieces / rules.held_out)
        )
        held_out = list(itertools.islice((piece for piece, is_held in first if is_held), held_out_pieces))
    return PieceStream(training), Pieces(held_out)


def tokenise(document: Document, tokenizer: Any) -> Piece:
    """All tokens of a document, without the opening that `cut_document` adds.

    Args:
        document: A text, where every token counts, or a conversation, where only the assistant's tokens count.
        tokenizer: The tokenizer; it needs a chat template for conversations.

    Raises:
        DataError: A conversation cannot be put into the chat template.
    """
    if document.text is not None:
        return Piece(text_tokens(document.text, tokenizer))
    return _conversation(document, tokenizer)


def cut_document(piece: Piece, rules: Cut, opening: list[int]) -> list[Piece]:
    """Cuts a document into consecutive sequences, each with the opening in front.

    Args:
        piece: The document's tokens.
        rules: How to cut; what is left at the end is kept if it is long enough.
        opening: Tokens before each sequence, which do not count.
    """
    size = rules.length - len(opening)
    sequences = []
    for begin in range(0, len(piece.ids), size):
        ids = [*opening, *piece.ids[begin : begin + size]]
        if len(ids) < rules.min_length:
            continue
        labels = None if piece.labels is None else piece.labels[begin : begin + size]
        if labels is None and opening:
            labels = ids[len(opening) :]
        if labels is None or any(label != IGNORED for label in labels):
            sequences.append(Piece(ids, None if labels is None else [IGNORED] * len(opening) + [*labels]))
    return sequences


def _split(sources: list[str], tokenizer: Any, rules: Cut, query: DataQuery | None) -> Iterator[tuple[Piece, bool]]:
    """All sequences, each with whether it is held out."""
    opening, quota = opening_of(tokenizer), _Quota(rules.held_out)
    whole = (tokenise(document, tokenizer) for document in documents(sources, query))
    if not rules.pack:
        for piece in whole:
            sequences = cut_document(piece, rules, opening)
            if rules.per_document is not None and len(sequences) > rules.per_document:
                sequences = evenly(sequences, rules.per_document)
            held_out = quota.take(len(sequences))
            yield from ((each, number >= len(sequences) - held_out) for number, each in enumerate(sequences))
        return
    lines: dict[bool, Callable[[Piece | None], list[Piece]]] = {
        held_out: _packer(rules, opening, tokenizer.eos_token_id) for held_out in (False, True)
    }
    for piece in whole:
        held_out = bool(quota.take(1))
        yield from ((full, held_out) for full in lines[held_out](piece))
    for is_held, line in lines.items():
        yield from ((rest, is_held) for rest in line(None))


class _Quota:
    """Keeps a fixed share of all items, whatever the sizes of the groups in which they arrive."""

    def __init__(self, share: float) -> None:
        self.share = share
        self.owed = 0.0

    def take(self, count: int) -> int:
        """How many of the next `count` to keep."""
        self.owed += count * self.share
        count_taken = min(count, int(self.owed + 1e-9))
        self.owed -= count_taken
        return count_taken


def _packer(rules: Cut, opening: list[int], separator: int | None) -> Callable[[Piece | None], list[Piece]]:
    """Joins documents into full sequences, which it returns as they fill up; `None` returns the rest."""
    ids: list[int] = []
    labels: list[int] = []
    size = rules.length - len(opening)

    def add(piece: Piece | None) -> list[Piece]:
        if piece is not None and piece.ids:
            end = [] if separator is None else [separator]
            ids.extend([*piece.ids, *end])
            labels.extend([*(piece.ids if piece.labels is None else piece.labels), *end])
        count = len(ids) // size * size if piece is not None else len(ids)
        full = cut_document(Piece(ids[:count], labels[:count]), rules, opening)
        del ids[:count], labels[:count]
        return full

    return add


def _conversation(document: Document, tokenizer: Any) -> Piece:
    """Tokens of a conversation. Labels are the tokens of the assistant's messages and those that end them."""
    text, spans = _rendered(document, tokenizer)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    labels = []
    for token, (begin, end) in zip(encoded["input_ids"], encoded["offset_mapping"]):
        labels.append(token if any(first <= begin and end <= last for first, last in spans) else IGNORED)
    return Piece(encoded["input_ids"], labels)


def _rendered(document: Document, tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as the model reads it, and where in it the assistant speaks."""
    where, messages = document.where, [dict(message) for message in document.messages]
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(f'{where}: the tokenizer has no chat template for "messages". Give "text" instead.')
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(f'{where}: "messages" need a fast tokenizer, which this model has not. Give "text" instead.')

    def render(count: int, prompt: bool) -> str:
        try:
            text: str = tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=prompt)
        except Exception as error:  # a template may raise whatever it likes
            reason = one_line(error)
            raise DataError(f"{where}: the chat template refuses the messages ({reason}). Correct them.") from None
        return text

    text, spans = render(len(messages), False), []
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            before, after = render(number, True), render(number + 1, False)
            if not text.startswith(after) or not after.startswith(before):
                raise DataError(f'{where}: the chat template rewrites earlier messages. Give "text" instead.')
            spans.append((len(before), len(after)))
    return text, spans
