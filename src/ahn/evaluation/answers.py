"""An answer as text: greedy, up to a number of tokens, a token that ends it, or a text that does."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ahn.evaluation.arms import ArmReader

_CONTEXT = 4  # tokens before a text that ends an answer, which may share a character with it


def answer_text(
    reader: ArmReader,
    tokenizer: PreTrainedTokenizerBase,
    limit: int,
    stop: Collection[int],
    until: Sequence[str] = (),
) -> str:
    """What a reader writes after what it has read, the likeliest token each time.

    Args:
        reader: What has been read.
        tokenizer: The model's tokenizer.
        limit: Most tokens to write.
        stop: Tokens that end the answer.
        until: Texts that end the answer; neither they nor what follows is part of it.
    """
    ends = [each for each in until if each]
    if not ends:
        return _decoded(tokenizer, reader.generate(limit, stop))
    # A token holds at least one byte, so an end is within so many of the last tokens.
    span = max(len(end.encode()) for end in ends) + _CONTEXT
    written: list[int] = []
    while len(written) < limit and (token := reader.generate(1, stop)):
        written += token
        tail = _decoded(tokenizer, written[-span:])
        if any(end in tail for end in ends):
            break
    text = _decoded(tokenizer, written)
    return text[: min(place if (place := text.find(end)) >= 0 else len(text) for end in ends)]


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
