"""The tokens that a model reads: an opening, a text of any length, and a closing that asks for the answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ahn.errors import ModelError
from ahn.models.text import text_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TEXT, _ANSWER = "THE-TEXT-STANDS-HERE", "THE-ANSWER-STANDS-HERE"


@dataclass(frozen=True)
class Passage:
    """Token ids of what is read, in three parts, `[T]` each: none depends on how much of the text is read.

    Attributes:
        opening: What comes before the text: the start of a chat turn, or of the sequence.
        text: The text.
        closing: What comes after it: the question, and the start of the answer.
    """

    opening: torch.Tensor
    text: torch.Tensor
    closing: torch.Tensor


def has_chat(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer knows how its model was taught to chat."""
    return bool(tokenizer.chat_template)


def passage(tokenizer: PreTrainedTokenizerBase, text: str, question: str, chat: bool, system: str = "") -> Passage:
    """A text and a question about it, for a model that has read nothing yet.

    Args:
        tokenizer: The model's tokenizer.
        text: The text; may be empty.
        question: The question; may be empty.
        chat: Whether to put both into a turn of the model's chat template.
        system: What the model is told before, in a chat; what its template says by itself if left out.
    """
    if not chat:
        return _passage(tokenizer, _start(tokenizer), text, question)
    system_messages = [{"role": "system", "content": system}] if system else []
    before, after = _chat(tokenizer, [*system_messages, {"role": "user", "content": _TEXT}]).rsplit(_TEXT, 1)
    return _passage(tokenizer, tokens(tokenizer, before), text, question, after)


def follow_up(tokenizer: PreTrainedTokenizerBase, text: str, question: str, chat: bool) -> Passage:
    """A text and a question for a model that has read something, and maybe answered, before."""
    if not chat:
        return _passage(tokenizer, tokens(tokenizer, ""), text, question)
    turns = [("user", "What?"), ("assistant", _ANSWER), ("user", _TEXT)]
    rendered = _chat(tokenizer, [{"role": role, "content": content} for role, content in turns])
    before, after = rendered.split(_ANSWER)[1].split(_TEXT)
    return _passage(tokenizer, tokens(tokenizer, before), text, question, after)


def tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    """Token ids of a text, `[T]`, with nothing added."""
    return torch.tensor(text_tokens(text, tokenizer), dtype=torch.long)


def stop_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of the tokens that end an answer."""
    named = getattr(model.generation_config, "eos_token_id", None)
    ids = named if isinstance(named, list) else [named, tokenizer.eos_token_id]
    return {each for each in ids if each is not None}


def _passage(
    tokenizer: PreTrainedTokenizerBase, opening: torch.Tensor, text: str, question: str, after: str | None = None
) -> Passage:
    """A passage, with an empty line between text and question; `after` is what ends the question in a chat."""
    between = "\n\n" if text and question else ""
    closing = question if after is None else question.strip() + after
    return Passage(opening, tokens(tokenizer, text), tokens(tokenizer, between + closing))


def _start(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """What the tokenizer puts before every text, without what it puts behind."""
    ids = tokenizer("")["input_ids"]
    start = [id for id in ids[:1] if id == tokenizer.bos_token_id]
    return torch.tensor(start, dtype=torch.long)


def _chat(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]]) -> str:
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # a template is a program of its own
        raise ModelError(f"the model's chat template fails ({error}). Use --no-chat, or correct it.") from None
