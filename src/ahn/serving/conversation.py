"""From the messages of a conversation to tokens, so that one that goes on begins with the tokens that it had."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ahn.models import prompts
from ahn.models.text import text_tokens
from ahn.serving.errors import RequestError
from ahn.serving.schema import Message

_DOCUMENT = "THE-DOCUMENT-STANDS-HERE"


class ChatPrompt(NamedTuple):
    """What a model reads of a conversation.

    Attributes:
        tokens: Its tokens; those of a document that comes before them are left out.
        marks: Numbers of tokens after which a message ends, where the conversation can come back to.
    """

    tokens: list[int]
    marks: list[int]


def chat_prompt(tokenizer: Any, messages: Sequence[Message], has_document: bool) -> ChatPrompt:
    """The tokens of a conversation, each message apart, up to where the answer begins.

    Args:
        tokenizer: The model's tokenizer.
        messages: The conversation.
        has_document: Whether it follows a document, which then stands at the beginning of the first question. What a
            system message says comes between the two.

    Raises:
        RequestError: The model knows no chats, or not this one.
    """
    if not prompts.has_chat(tokenizer):
        raise RequestError("this model has no chat template; use /v1/completions", code="no_chat_template")
    turns = [{"role": _role(message), "content": message.text} for message in messages]
    if has_document:
        turns = _with_document(turns)
    whole = _rendered(tokenizer, turns, to_answer=True)
    start = whole.find(_DOCUMENT) + len(_DOCUMENT) if has_document else 0
    tokens: list[int] = []
    marks: list[int] = []
    for end in [each for each in _ends(tokenizer, turns, whole) if each > start]:
        tokens += text_tokens(whole[start:end], tokenizer)
        marks.append(len(tokens))
        start = end
    return ChatPrompt(tokens + text_tokens(whole[start:], tokenizer), marks)


def _role(message: Message) -> str:
    return "system" if message.role == "developer" else message.role


def _with_document(turns: list[dict[str, str]]) -> list[dict[str, str]]:
    """The turns with a place for the document, where it stands when it is read before any of them is known."""
    system = [turn["content"] for turn in turns if turn["role"] == "system"]
    others = [turn for turn in turns if turn["role"] != "system"]
    if not others or others[0]["role"] != "user":
        raise RequestError("a conversation about a document begins with a message of the user", param="messages")
    first = "\n\n".join([_DOCUMENT, *system, others[0]["content"].strip()])
    return [{"role": "user", "content": first}, *others[1:]]


def _ends(tokenizer: Any, turns: list[dict[str, str]], whole: str) -> list[int]:
    """Where each message ends in the whole, as far as the template puts one after the other."""
    ends: list[int] = []
    for count in range(1, len(turns) + 1):
        try:
            part = _rendered(tokenizer, turns[:count], to_answer=False)
        except RequestError:  # a template may want a question after every system message
            continue
        if whole.startswith(part) and len(part) > (ends[-1] if ends else 0):
            ends.append(len(part))
    return ends


def _rendered(tokenizer: Any, turns: list[dict[str, str]], to_answer: bool) -> str:
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=to_answer))
    except Exception as error:  # a template is a program of its own
        message = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RequestError(f"the model's chat template refuses these messages: {message}", param="messages") from None
