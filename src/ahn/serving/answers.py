"""Answers in OpenAI's shape, whole and as streams of events."""

from __future__ import annotations

import itertools
import json
import time
import uuid
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ahn.serving.errors import RequestError
from ahn.serving.requests import Generation
from ahn.serving.stream import Increment, TokenChoice

Body = dict[str, Any]


@dataclass
class AnswerShape:
    """How answers to one request look.

    Attributes:
        model: Name of the model.
        tokenizer: Its tokenizer.
        generations: The requests to the engine.
        document_tokens: Tokens of the document that they are about.
        prefix: Texts that come before the answers (`echo`), by number of the choice.
    """

    model: str
    tokenizer: Any
    generations: Sequence[Generation]
    document_tokens: int = 0
    prefix: Sequence[str] = ()
    _head: Body = field(default_factory=dict)

    kind = "text_completion"
    chunk_kind = "text_completion"
    id_prefix = "cmpl-"

    def __post_init__(self) -> None:
        self._head = {"id": f"{self.id_prefix}{uuid.uuid4().hex}", "created": int(time.time()), "model": self.model}

    def whole(self, increments: Sequence[Increment]) -> Body:
        """The answer to a request that waited for all of it."""
        numbers = sorted({increment.choice for increment in increments})
        choices = [self.choice([each for each in increments if each.choice == number]) for number in numbers]
        return {**self._head, "object": self.kind, "choices": choices, "usage": self.usage()}

    def usage(self) -> Body:
        """The count of tokens."""
        prompt = sum(len(each.tokens) + self.document_tokens for each in self.generations)
        cached = sum(each.cached_tokens + self.document_tokens for each in self.generations)
        written = sum(each.written for each in self.generations)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": written,
            "total_tokens": prompt + written,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    async def events(self, increments: AsyncIterator[Increment], with_usage: bool) -> AsyncIterator[str]:
        """The answer as server-sent events."""
        try:
            for choice in self.first_choices():
                yield self._event([choice], with_usage)
            async for increment in increments:
                yield self._event([self.chunk(increment)], with_usage)
            if with_usage:
                yield _data({**self._head, "object": self.chunk_kind, "choices": [], "usage": self.usage()})
        except RequestError as error:
            yield _data(error.body())
            return
        yield "data: [DONE]\n\n"

    def first_choices(self) -> list[Body]:
        """What a stream begins with."""
        return []

    def choice(self, increments: Sequence[Increment]) -> Body:
        """One whole answer."""
        number, tokens = increments[0].choice, [token for each in increments for token in each.tokens]
        own = self.generations[number // self.generations[0].choices].token_choices
        text = "".join([*self.prefix[number : number + 1], *(each.text for each in increments)])
        return self._choice(number, self.content(text), [*own, *tokens], increments[-1].finish)

    def chunk(self, increment: Increment) -> Body:
        """A part of an answer."""
        return self._choice(increment.choice, self.delta(increment.text), increment.tokens, increment.finish)

    def content(self, text: str) -> Body:
        """The text of a whole answer."""
        return {"text": text}

    def delta(self, text: str) -> Body:
        """The text of a part of an answer."""
        return {"text": text}

    def logprobs(self, token_choices: Iterable[TokenChoice]) -> Body:
        """How likely tokens were."""
        tokens = list(token_choices)
        words = [self.word(each.token) for each in tokens]
        offsets = [0, *itertools.accumulate(map(len, words))][: len(words)]
        return {
            "tokens": words,
            "token_logprobs": [each.logprob for each in tokens],
            "top_logprobs": [
                None if each.logprob is None else {self.word(token): logprob for token, logprob in each.top}
                for each in tokens
            ],
            "text_offset": offsets,
        }

    def word(self, token: int) -> str:
        """A token as text."""
        return str(self.tokenizer.decode([token]))

    def _choice(self, number: int, content: Body, tokens: Sequence[TokenChoice], finish: str | None) -> Body:
        logprobs = self.logprobs(tokens) if tokens else None
        return {"index": number, **content, "logprobs": logprobs, "finish_reason": finish}

    def _event(self, choices: list[Body], with_usage: bool) -> str:
        usage = {"usage": None} if with_usage else {}
        return _data({**self._head, "object": self.chunk_kind, "choices": choices, **usage})


class ChatShape(AnswerShape):
    """How answers in a conversation look."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    id_prefix = "chatcmpl-"

    def first_choices(self) -> list[Body]:
        """See `AnswerShape.first_choices`: who speaks."""
        delta = {"role": "assistant", "content": ""}
        return [self._choice(number, {"delta": delta}, (), None) for number in range(self.generations[0].choices)]

    def content(self, text: str) -> Body:
        """See `AnswerShape.content`."""
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def delta(self, text: str) -> Body:
        """See `AnswerShape.delta`."""
        return {"delta": {"content": text} if text else {}}

    def logprobs(self, token_choices: Iterable[TokenChoice]) -> Body:
        """See `AnswerShape.logprobs`."""

        def entry(token: int, logprob: float | None) -> Body:
            word = self.word(token)
            return {"token": word, "logprob": logprob, "bytes": list(word.encode())}

        return {
            "content": [
                {**entry(each.token, each.logprob), "top_logprobs": [entry(*pair) for pair in each.top]}
                for each in token_choices
            ],
            "refusal": None,
        }


def _data(body: Body) -> str:
    # In ASCII, because many clients also end a line at the separators of Unicode.
    return f"data: {json.dumps(body)}\n\n"
