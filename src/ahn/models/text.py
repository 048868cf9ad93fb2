"""Texts as tokens and tokens as text, and a choice of items at even distances."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

TEXT_FILES = (".txt", ".md", ".rst", ".text")
"""How the names of files end that are taken for plain text."""

_AT_ONCE = 1 << 16  # characters of a text that are tokenised together
_PARTS = 16  # that share the processors
_SEAMS = 8  # places that are tried
_BESIDE = 100  # characters on each side of a place, for whose tokens it is tried
_LONGEST = 400  # characters of a sentence
# After the end of a sentence with its quotes and brackets, after an empty line, and after a full stop of Chinese.
_ENDS = re.compile(r"(?<=[.!?])[\"'”’)\]]*\s+|\n\s*\n\s*|[。！？]+[”’」』）]*\s*")


def json_lines(file: Path, error: type[Exception]) -> Iterator[tuple[str, Any]]:
    """What each line of a JSONL file in UTF-8 holds, with its place: "file, line 3". Empty lines are skipped.

    Args:
        file: The file.
        error: What is raised where it cannot be read, or where a line is bad, which is named.
    """
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    where = f"{file}, line {number}"
                    yield where, _json(line, where, "utf-8-sig" if number == 1 else "utf-8", error)
    except OSError as problem:
        raise error(f"{file} cannot be read ({problem.strerror}). Check its permissions.") from None


def _json(line: bytes, where: str, encoding: str, error: type[Exception]) -> Any:
    try:
        return json.loads(line.decode(encoding).strip())
    except UnicodeDecodeError:
        raise error(f"{where}: it is not UTF-8. Convert the file with iconv.") from None
    except json.JSONDecodeError as problem:
        raise error(f"{where}: it is no JSON ({problem.msg}, column {problem.colno}). Correct it.") from None
    except RecursionError:
        raise error(f"{where}: it is nested too deeply. Correct it.") from None


def evenly(items: Sequence[T], count: int) -> list[T]:
    """This number of items, at even distances; some of them twice if there are fewer."""
    return [items[(2 * number + 1) * len(items) // (2 * count)] for number in range(count)]


def sentences(text: str) -> list[str]:
    """A text in sentences that join to the whole, each with the white space after it.

    A sentence of more than 400 characters is cut between words, or anywhere if it has none.
    """
    ends = [match.end() for match in _ENDS.finditer(text)]
    parts = (text[start:stop] for start, stop in zip([0, *ends], [*ends, len(text)]))
    return [short for part in parts for short in _shortened(part) if short.strip()]


def text_tokens(text: str, tokenizer: Any) -> list[int]:
    """All tokens of a text, with nothing added.

    Args:
        text: The text, of any length.
        tokenizer: The model's tokenizer.
    """
    ids: list[int] = []
    parts = _parts(text, lambda part: _ids([part], tokenizer))
    while batch := list(itertools.islice(parts, _PARTS)):  # a tokenizer holds a hundred bytes for each of their tokens
        ids += _ids(batch, tokenizer)
    return ids


def _ids(parts: list[str], tokenizer: Any) -> list[int]:
    encoded = tokenizer(parts, add_special_tokens=False, verbose=False)["input_ids"]
    return [token for part in encoded for token in part]


def text_offsets(text: str, tokenizer: Any) -> list[tuple[int, int]]:
    """First and last + 1 character of each token that `text_tokens` gives.

    Args:
        text: The text, of any length.
        tokenizer: The model's tokenizer, a fast one.
    """
    offsets: list[tuple[int, int]] = []
    start = 0
    for part in _parts(text, lambda part: _ids([part], tokenizer)):
        encoded = tokenizer(part, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets += [(start + first, start + last) for first, last in encoded["offset_mapping"]]
        start += len(part)
    return offsets


def opening_of(tokenizer: Any) -> list[int]:
    """What a tokenizer puts before every text, such as a begin-of-text token."""
    first = tokenizer.bos_token_id
    return [first] if first is not None and tokenizer("a")["input_ids"][:1] == [first] else []


def text_of(tokenizer: Any, ids: Collection[int], special: bool = False) -> str:
    """The text of an answer's tokens with its white space as it is, without special tokens if they are not wanted."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False))


class GrowingText:
    """The text of tokens that come one by one.

    Args:
        tokenizer: The model's tokenizer.
        stop: Sequences of characters that end the text; they are not part of it.
        special: Whether special tokens are part of it.

    Attributes:
        has_stopped: Whether one of them came.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), special: bool = False) -> None:
        self._tokenizer, self._special = tokenizer, special
        self._stop = stop
        self._ids: list[int] = []
        self._first = self._shown = 0  # tokens from `first` to `shown` are out and give the next ones their context
        self._pending = ""  # may be the beginning of a stop sequence
        self.has_stopped = False

    def add(self, token: int) -> str:
        """Takes in a token; the text that is certain now."""
        self._ids.append(token)
        more = self._more()
        if not more or more.endswith("\ufffd"):
            return ""
        self._first, self._shown = self._shown, len(self._ids)
        return self._release(more)

    def end(self) -> str:
        """What was held back, once no token follows."""
        more = self._more()
        self._first = self._shown = len(self._ids)
        released = self._release(more)
        rest, self._pending = "" if self.has_stopped else self._pending, ""
        return released + rest

    def _more(self) -> str:
        """The text of the tokens that are not out yet."""
        before, now = (
            text_of(self._tokenizer, self._ids[self._first : end], self._special) for end in (self._shown, None)
        )
        return now[len(before) :]

    def _release(self, more: str) -> str:
        if self.has_stopped:
            return ""
        text = self._pending + more
        ends = [position for stop in self._stop if (position := text.find(stop)) >= 0]
        if ends:
            self.has_stopped, self._pending = True, ""
            return text[: min(ends)]
        overlap = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._pending = text[len(text) - overlap :]
        return text[: len(text) - overlap]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of a text with which a stop sequence may begin."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)


def _parts(text: str, tokenize: Callable[[str], list[int]]) -> Iterator[str]:
    """A text in parts whose tokens are those of the whole: they end where a line ends, or else a word."""
    start = 0
    while start < len(text):
        end = min(len(text), start + _AT_ONCE)
        if end < len(text):
            end = _seam(text, start, end, tokenize)
        yield text[start:end]
        start = end


def _seam(text: str, start: int, end: int, tokenize: Callable[[str], list[int]]) -> int:
    """A place at which a text can be cut, before `end`: the first that changes no token, of some at lines and words."""
    cuts: list[int] = []
    for mark in ("\n", " "):  # either belongs to what follows it, as tokenizers see it
        cut = end
        while len(cuts) < _SEAMS and (cut := text.rfind(mark, start + 1, cut)) > 0:
            cuts.append(cut)
    for cut in cuts:
        left, right = text[max(start, cut - _BESIDE) : cut], text[cut : cut + _BESIDE]
        if tokenize(left) + tokenize(right) == tokenize(left + right):
            return cut
    return cuts[0] if cuts else end


def _shortened(sentence: str) -> Iterator[str]:
    while len(sentence) > _LONGEST:
        cut = sentence.rfind(" ", 1, _LONGEST) + 1 or _LONGEST
        yield sentence[:cut]
        sentence = sentence[cut:]
    yield sentence
