"""Wrong requests, each with what it is answered: the third table of docs/bad_input.md."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.serving.common import serving

MESSAGES = [{"role": "user", "content": "Who is Ishmael?"}]
SETTINGS = {"max_body_bytes": 20_000, "max_prompt_tokens": 600, "max_queue": 8}
JSON = {"content-type": "application/json"}


@dataclass(frozen=True)
class WrongRequest:
    """A request that cannot be served.

    Attributes:
        shown: How the page writes it.
        status: The status that it gets.
        path: Where it goes.
        content: Its body, or what gives it in parts.
        headers: Its headers.
        key: The key of the server that it goes to.
    """

    shown: str
    status: int
    path: str
    content: Any = b""
    headers: dict[str, str] = field(default_factory=lambda: JSON)
    key: str | None = None

    def send(self, address: str) -> Any:
        """The answer of a server."""
        import httpx

        content = self.content() if callable(self.content) else self.content
        return httpx.post(f"{address}{self.path}", content=content, headers=self.headers)


def chat(status: int, **changes: Any) -> WrongRequest:
    """A conversation with something wrong."""
    return _json("chat/completions", status, {"messages": MESSAGES}, changes)


def completion(status: int, shown: str = "", **changes: Any) -> WrongRequest:
    """A text with something wrong."""
    return _json("completions", status, {}, changes, shown)


def _json(path: str, status: int, usual: dict[str, Any], changes: dict[str, Any], shown: str = "") -> WrongRequest:
    body = json.dumps({"model": "tiny", **usual, **changes}).encode()
    return WrongRequest(f"`{path}` {shown or f'`{json.dumps(changes)}`'}", status, f"/v1/{path}", body)


def raw(shown: str, content: Any, status: int = 400, **headers: str) -> WrongRequest:
    """A text whose body or headers are wrong."""
    given = {name.replace("_", "-"): value for name, value in headers.items()} or JSON
    return WrongRequest(f"`completions` {shown}", status, "/v1/completions", content, given)


def document(shown: str, content: bytes, status: int = 400) -> WrongRequest:
    """A document that cannot be read."""
    name = f'; filename="{shown}"' if shown else ""
    head = f'--x\r\nContent-Disposition: form-data; name="file"{name}\r\n\r\n'.encode()
    body = head + content + b"\r\n--x--\r\n"
    kind = {"content-type": "multipart/form-data; boundary=x"}
    return WrongRequest(f"`files` with {shown or 'a field that is no file'}", status, "/v1/files", body, kind)


def _endless() -> Iterator[bytes]:
    yield from (b" " * 1000 for _ in range(30))


REQUESTS = [
    WrongRequest("`embeddings`", 404, "/v1/embeddings", b"{}"),
    chat(404, model="huge"),
    chat(400, messages=[]),
    chat(400, messages=[{"role": "robot", "content": "x"}]),
    chat(400, messages=[{"role": "user", "content": None}]),
    chat(400, messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
    chat(400, tools=[]),
    chat(400, temperature=3),
    chat(400, temperature=float("nan")),
    chat(400, top_p=0),
    chat(400, n=5),
    chat(400, max_tokens=0),
    chat(400, seed=2**64),
    chat(400, top_logprobs=2),
    chat(400, frequency_penalty=1),
    chat(404, ahn={"document": "file-none"}),
    chat(400, ahn={"document": ""}),
    completion(400, "`{}`"),
    completion(400, prompt=""),
    completion(400, prompt=[]),
    completion(400, prompt=[1, 2, 999]),
    completion(400, prompt=["x", [1]]),
    completion(400, prompt="\ud800"),
    completion(400, "with 601 tokens, where 600 are allowed", prompt="x" * 601),
    completion(400, "with 9 prompts, where 8 requests may wait", prompt=["x"] * 9),
    completion(413, "of 30,000 bytes, where 20,000 are allowed", prompt="x" * 30_000),
    completion(400, prompt="x", echo=True, stream=True),
    completion(400, prompt="x", max_tokens=0),
    completion(400, prompt="x", stop=[""]),
    completion(400, "with 17 sequences to stop at", prompt="x", stop=["x"] * 17),
    raw("in parts of 30,000 bytes, where 20,000 are allowed", _endless, 413),
    raw("with nothing", b""),
    raw("`{`", b"{"),
    raw("`null`", b"null"),
    raw("that is no UTF-8", b'{"prompt": "\xff"}'),
    raw("of 9,000 lists in each other", b"[" * 9000 + b"]" * 9000),
    raw("without a content type, as by `curl -d`", b"{}", content_type="application/x-www-form-urlencoded"),
    raw("from a page of another site", b"{}", 403, origin="https://elsewhere.example", **JSON),
    raw("to another name of the machine, without a key", b"{}", 403, host="rebound.example", **JSON),
    WrongRequest("any, without the key", 401, "/v1/completions", b"{}", JSON, "secret"),
    WrongRequest("`files` with no file", 400, "/v1/files", b"{}"),
    document("", b"x"),
    document("empty.txt", b" "),
    document("photo.png", b"\x89PNG\0\0"),
    document("half.pdf", b"%PDF-1.4"),
    document("book.txt", b"x" * 601, 413),
]


def answered() -> Iterator[tuple[WrongRequest, Any]]:
    """All of them with what a server answers."""
    for key in (None, "secret"):
        with serving(api_key=key, **SETTINGS) as (address, _):
            for request in REQUESTS:
                if request.key == key:
                    yield request, request.send(address)


def rows() -> list[str]:
    """The lines of the table, in the order of the list."""
    messages = {id(request): answer.json()["error"]["message"] for request, answer in answered()}
    return [
        f"| {request.shown} | {request.status} | {messages[id(request)].replace('|', chr(92) + '|')} |"
        for request in REQUESTS
    ]
