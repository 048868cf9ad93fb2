"""What requests may ask for, checked by pydantic: OpenAI's parameters as far as this server knows them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError


def _whole_characters(text: str) -> str:
    """The text, unless JSON's escapes made half of a character, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PydanticCustomError("surrogate", f"Character {error.start} is half of a surrogate pair") from None
    return text


_Text = Annotated[str, AfterValidator(_whole_characters)]
_Zero = Annotated[float, Field(ge=0, le=0)]
_Stop = Annotated[str, Field(min_length=1, max_length=1000)]


class _Strict(BaseModel):
    """A body whose every name is known: one that is not would change nothing and nobody would notice."""

    model_config = ConfigDict(extra="forbid")


class StreamOptions(_Strict):
    """What a stream tells beside the answer.

    Attributes:
        include_usage: Whether its last event counts the tokens.
        include_obfuscation: Accepted and ignored.
    """

    include_usage: bool = False
    include_obfuscation: bool = False


class Extension(_Strict):
    """What only this server knows.

    Attributes:
        document: Id of a document that the request is about.
    """

    document: str | None = Field(default=None, min_length=1)


class SamplingOptions(_Strict):
    """What both kinds of requests share; names as in OpenAI's reference.

    Attributes:
        ahn: What only this server knows.
    """

    model: str
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    n: int = Field(1, ge=1, le=128)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: _Stop | Annotated[list[_Stop], Field(max_length=16)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    ahn: Extension = Extension()
    # Accepted where they change nothing.
    frequency_penalty: _Zero | None = None
    presence_penalty: _Zero | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def stops(self) -> list[str]:
        """Sequences that end the answer."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])


class TextPart(_Strict):
    """A part of a message."""

    type: Literal["text"]
    text: _Text


class Message(_Strict):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: _Text | list[TextPart]
    name: str | None = None
    refusal: None = None

    @property
    def text(self) -> str:
        """Its text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ResponseFormat(_Strict):
    """The form of an answer: text."""

    type: Literal["text"] = "text"


class ChatRequest(SamplingOptions):
    """Body of `/v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1, max_length=2000)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None

    @property
    def limit(self) -> int:
        """Most tokens of an answer."""
        return self.max_completion_tokens or self.max_tokens or 1024


class CompletionRequest(SamplingOptions):
    """Body of `/v1/completions`."""

    prompt: _Text | list[int] | list[_Text] | list[list[int]]
    max_tokens: int = Field(16, ge=0)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False
    suffix: None = None
    best_of: int | None = Field(None, ge=1, le=1)

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or more."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        tokens = [each for each in self.prompt if isinstance(each, int)]
        return [tokens] if tokens else [each for each in self.prompt if not isinstance(each, int)]
