"""OpenAI's protocol, held to the real client of OpenAI."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.serving.common import alone, ids_of, serving
from tests.serving.wrong_requests import answered

openai = pytest.importorskip("openai", reason="the client of OpenAI is not installed")
httpx = pytest.importorskip("httpx", reason="the server needs the extra serve")

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who is Ishmael?"}]
RENDERED = "<system>Be brief.</s><user>Who is Ishmael?</s><assistant>"


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    with serving(max_body_bytes=20_000, max_prompt_tokens=600) as (address, service):
        yield address, service


@pytest.fixture(scope="module")
def client(server: Any) -> Any:
    return openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0)


def expected(server: Any, prompt: str, limit: int) -> str:
    return alone(server[1].engine.model, ids_of(prompt), limit)


def test_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "ahn"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("huge")


def test_chat(client: Any, server: Any) -> None:
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=9, temperature=0)
    assert answer.choices[0].message.content == expected(server, RENDERED, 9)
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids_of(RENDERED)), 9)


def test_chat_in_a_stream(client: Any, server: Any) -> None:
    stream = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=9, temperature=0, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == expected(server, RENDERED, 9)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage.completion_tokens == 9


def test_completions_of_several_prompts(client: Any, server: Any) -> None:
    prompts = ["Call me", "It was"]
    answer = client.completions.create(model="tiny", prompt=prompts, max_tokens=6, temperature=0, n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    texts = [expected(server, prompt, 6) for prompt in prompts]
    assert [choice.text for choice in answer.choices] == [texts[0], texts[0], texts[1], texts[1]]
    parts = ["", ""]
    for chunk in client.completions.create(
        model="tiny", prompt=[ids_of(each) for each in prompts], max_tokens=6, temperature=0, stream=True
    ):
        parts[chunk.choices[0].index] += chunk.choices[0].text
    assert parts == texts


def test_stop_seed_and_drawn_tokens(client: Any, server: Any) -> None:
    whole = expected(server, "Call me", 20)
    answer = client.completions.create(model="tiny", prompt="Call me", max_tokens=20, temperature=0, stop=whole[5:8])
    assert answer.choices[0].text == whole[: whole.index(whole[5:8])]
    assert answer.choices[0].finish_reason == "stop"
    drawn = [
        client.completions.create(model="tiny", prompt="Call me", seed=seed, top_p=0.9).choices[0].text
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_logprobs(client: Any) -> None:
    chat = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=3, temperature=0, logprobs=True, top_logprobs=2
    )
    entries = chat.choices[0].logprobs.content
    assert len(entries) == 3
    assert all(each.logprob == each.top_logprobs[0].logprob <= 0 for each in entries)
    echoed = client.completions.create(
        model="tiny", prompt="Call me", max_tokens=1, temperature=0, logprobs=1, echo=True
    )
    assert echoed.choices[0].text.startswith("Call me")
    told = echoed.choices[0].logprobs
    assert len(told.tokens) == len(told.token_logprobs) == 8
    assert told.token_logprobs[0] is None
    assert "".join(told.tokens[:7]) == "Call me"


def test_wrong_requests_get_one_clear_line() -> None:
    for request, answer in answered():
        assert answer.status_code == request.status, request.shown
        error = answer.json()["error"]
        assert "\n" not in error["message"]
        assert set(error) == {"message", "type", "param", "code"}
        assert not error["message"].startswith("the server failed")


def test_a_body_that_is_no_json(server: Any) -> None:
    for body in (b"", b"{", b'{"model": "tiny", "prompt": \xff}', b"[1]"):
        answer = httpx.post(f"{server[0]}/v1/completions", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400
        assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_key_is_asked_for() -> None:
    with serving(api_key="secret") as (address, _):
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{address}/v1", api_key="wrong", max_retries=0).models.list()
        right = openai.OpenAI(base_url=f"{address}/v1", api_key="secret", max_retries=0)
        assert [model.id for model in right.models.list()] == ["tiny"]


def test_pages_of_other_sites_may_not_ask(server: Any) -> None:
    asked = {"origin": "https://elsewhere.example"}
    assert httpx.get(f"{server[0]}/v1/models", headers=asked).status_code == 403
    assert httpx.get(f"{server[0]}/v1/models", headers={"host": "rebound.example"}).status_code == 403
    assert httpx.get(f"{server[0]}/v1/models", headers={"origin": server[0]}).status_code == 200
    with serving(cors_origin=("https://friend.example",)) as (address, _):
        answer = httpx.get(f"{address}/v1/models", headers={"origin": "https://friend.example"})
        assert answer.headers["access-control-allow-origin"] == "https://friend.example"


def test_many_clients_some_of_whom_go_away(client: Any, server: Any) -> None:
    address, service = server

    def ask(number: int) -> tuple[int, str]:
        body = {"model": "tiny", "prompt": f"Question {number}", "max_tokens": 12, "temperature": 0, "stream": True}
        if number % 5 == 0:  # goes away in the middle
            with httpx.stream("POST", f"{address}/v1/completions", json={**body, "max_tokens": 10**6}) as stream:
                next(stream.iter_lines())
            return number, ""
        if number % 7 == 0:
            assert httpx.post(f"{address}/v1/completions", content=b"{").status_code in (400, 422)
            return number, ""
        return number, "".join(chunk.choices[0].text for chunk in client.completions.create(**body))

    with ThreadPoolExecutor(8) as pool:
        got = dict(pool.map(ask, range(1, 41)))
    for number, text in got.items():
        if text:
            assert text == expected(server, f"Question {number}", 12)
    answer = client.completions.create(model="tiny", prompt="Still there?", max_tokens=4, temperature=0)
    assert answer.choices[0].text == expected(server, "Still there?", 4)
    for _ in range(100):
        if service.engine.active == service.engine.waiting == 0:
            break
        httpx.get(f"{address}/v1/models")
    assert (service.engine.active, service.engine.waiting) == (0, 0)


def test_a_busy_server_says_so() -> None:
    with serving(max_sessions=1, max_queue=1) as (address, _service):
        long = {"model": "tiny", "prompt": "Long", "max_tokens": 10**6, "temperature": 0, "stream": True}
        with httpx.stream("POST", f"{address}/v1/completions", json=long) as one:
            lines = one.iter_lines()  # kept, or the stream would be closed
            next(lines)
            with httpx.stream("POST", f"{address}/v1/completions", json=long):
                busy = httpx.post(f"{address}/v1/completions", json={"model": "tiny", "prompt": "x"})
                assert busy.status_code == 503
                assert busy.headers["retry-after"] == "1"
                assert json.loads(busy.text)["error"]["code"] == "busy"
