"""What is left out of a prompt that is too long. Each benchmark does it in its own way, and scores depend on it.

All of them count the tokens of the filled prompt and decode what stays; a chat template comes afterwards.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ahn.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ahn.evaluation.benchmarks.schema import Truncation


def truncate(
    prompt: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int, how: Truncation, new_tokens: int = 0
) -> str:
    """A prompt of at most `max_tokens` tokens.

    Args:
        prompt: The filled prompt, without a chat template.
        tokenizer: The model's tokenizer.
        max_tokens: Tokens that may stay.
        how: "halves" joins the texts of the first and the last half (LV-Eval), "middle" decodes the two halves together
            (InfiniteBench), "left" keeps the end (the paper).
        new_tokens: Tokens that the model will write; "left" leaves room for them, as the paper's scripts do, and the
            others do not.

    Raises:
        ConfigError: Nothing could stay.
    """
    least = new_tokens + 1 if how == "left" else 2
    if max_tokens < least:
        raise ConfigError(f"a prompt needs room for at least {least} tokens here, not {max_tokens}")
    ids = tokenizer(prompt, verbose=False)["input_ids"]
    if len(ids) <= max_tokens:
        return prompt

    def text(part: list[int]) -> str:
        return str(tokenizer.decode(part, skip_special_tokens=True))

    half = max_tokens // 2
    if how == "halves":
        return text(ids[:half]) + text(ids[-half:])
    if how == "middle":
        return text([*ids[:half], *ids[-half:]])
    return text(ids[new_tokens - max_tokens :])
