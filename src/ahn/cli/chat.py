"""`ahn chat`: talks to a server of OpenAI's protocol in a terminal."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ahn.cli.conversation import typed_lines
from ahn.cli.options import from_fields
from ahn.cli.terminal import UsageError, log
from ahn.config import setting

EXAMPLES = """Examples:

ahn chat  [dim]# with the server of `ahn serve` on this machine[/dim]

ahn chat --url http://laptop:8000 --document file-1f2e3d

echo "Who is Ishmael?" | ahn chat --document file-1f2e3d
"""


@dataclass(frozen=True)
class ChatSettings:
    """Which server answers, and how."""

    url: str = setting("http://127.0.0.1:8000", "Address of the server.")
    api_key: str | None = setting(None, "Its key; AHN_API_KEY does the same.", unset="none")
    document: str | None = setting(None, "Id of a document there, which the conversation is about.", unset="none")
    system: str | None = setting(None, "What the model is told first.", unset="nothing")
    max_tokens: int = setting(512, "Most tokens of an answer.", least=1)
    temperature: float = setting(0.0, "0 writes the likeliest token; above, tokens are drawn.", least=0)


@from_fields
def command(settings: ChatSettings) -> None:
    """Talk to a server, line by line; an empty line or Ctrl-D ends it."""
    try:
        import httpx
    except ImportError:
        raise UsageError('httpx is missing. Install it with pip install "ahn[serve]".') from None
    key = settings.api_key or os.environ.get("AHN_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        with httpx.Client(base_url=settings.url, headers=headers, timeout=None) as client:
            model = _checked(client.get("/v1/models"))["data"][0]["id"]
            _converse(client, model, settings)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise UsageError(f"no server answers at {settings.url} ({error}). Start one with ahn serve.") from None


def _converse(client: Any, model: str, settings: ChatSettings) -> None:
    """Sends each line, and shows its answer as it comes."""
    from ahn.cli.console import printable

    shown: Callable[[str], str] = printable if sys.stdout.isatty() else str
    messages = [{"role": "system", "content": settings.system}] if settings.system else []
    if sys.stdin.isatty():
        log(f"{model} at {settings.url}; an empty line ends it.", "dim")
    for line in itertools.takewhile(bool, typed_lines()):
        messages.append({"role": "user", "content": line})
        body = {
            "model": model,
            "messages": messages,
            "max_tokens": settings.max_tokens,
            "temperature": settings.temperature,
            "stream": True,
            "ahn": {"document": settings.document},
        }
        answer = ""
        for words in _answer(client, body):
            sys.stdout.write(shown(words))
            sys.stdout.flush()
            answer += words
        sys.stdout.write("\n")
        messages.append({"role": "assistant", "content": answer})


def _answer(client: Any, body: dict[str, Any]) -> Iterator[str]:
    """The words of an answer as they come, unless the server refuses."""
    import json

    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            response.read()
            _checked(response)
        for line in _lines(response.iter_text()):
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise UsageError(f"the server says: {event['error']['message']}")
            for choice in event["choices"]:
                yield choice["delta"].get("content") or ""


def _lines(parts: Iterable[str]) -> Iterator[str]:
    """Lines that end where the protocol ends them: httpx also cuts at the separators of Unicode, which are words."""
    waiting = ""
    for part in parts:
        *whole, waiting = (waiting + part).split("\n")
        yield from (line.rstrip("\r") for line in whole)
    yield waiting


def _checked(response: Any) -> Any:
    """What the server told, unless it refused or is no such server."""
    try:
        body = response.json()
    except ValueError:
        raise UsageError(f"{response.url} is no server of OpenAI's protocol. Start one with ahn serve.") from None
    if response.status_code != 200:
        error = body.get("error") if isinstance(body, dict) else None
        raise UsageError(f"the server says: {error['message'] if isinstance(error, dict) else response.status_code}")
    return body
