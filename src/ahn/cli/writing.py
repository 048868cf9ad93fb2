"""An answer, token by token, and its words as soon as they are whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ahn.generation import Reader


def write(
    reader: Reader, limit: int, stop: set[int], temperature: float = 0.0, seed: int | None = None
) -> Iterator[int]:
    """Continues what a reader has read; every token but the one that ends the answer enters its cache.

    Args:
        reader: What has been read.
        limit: Most tokens to write.
        stop: Tokens that end the answer; they are not part of it.
        temperature: 0 takes the likeliest token each time; above, tokens are drawn.
        seed: Of the random numbers; a new one each time if left out.

    Yields:
        Token ids.
    """
    reader.score = False
    generator = torch.Generator()
    generator.seed() if seed is None else generator.manual_seed(seed)
    for _ in range(limit):
        token = _next(reader.result().logits, temperature, generator)
        if token in stop:
            return
        yield token
        reader.feed(torch.tensor([token]))


def words(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> Iterator[str]:
    """The text of tokens as it grows, in pieces that join to the whole: no half characters, no lost spaces."""
    held: list[int] = []
    first = shown = 0  # the tokens from `first` to `shown` are out already and give the next ones their context
    for token in ids:
        held.append(token)
        before, now = (_decode(tokenizer, held[first:stop]) for stop in (shown, len(held)))
        if len(now) > len(before) and not now.endswith("\ufffd"):
            yield now[len(before) :]
            first, shown = shown, len(held)
    yield _decode(tokenizer, held[first:])[len(_decode(tokenizer, held[first:shown])) :]


def _next(logits_V: torch.Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    weights = torch.softmax(logits_V.float().cpu() / temperature, dim=-1)
    return int(torch.multinomial(weights, 1, generator=generator))


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
