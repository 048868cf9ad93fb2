"""What goes wrong beside a request: disks, caches, clients and other servers. It ends nobody else's answer."""

from __future__ import annotations

import io
import json
import logging
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import ahn
from ahn.cli import main
from ahn.errors import OutputError
from ahn.generation import Reader
from ahn.serving import documents
from ahn.serving.requests import Choice, Generation
from ahn.serving.sampling import Sampling
from ahn.serving.store import PrefixStore
from tests.serving.common import GREEDY, alone, answers, ids_of, running, serving, text_of_all, tiny_model
from tests.serving.test_sessions import BOOK, chat, upload

httpx = pytest.importorskip("httpx", reason="the server needs the extra serve")
WHO = [{"role": "user", "content": "Who?"}]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(anchors=4)


def test_an_answer_that_fails_ends_no_other(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    advance = Choice.advance

    def failing(choice: Choice) -> int | None:
        if choice.generation.limit == 9 and choice.count == 2:
            raise ZeroDivisionError("unforeseen")
        return advance(choice)

    monkeypatch.setattr(Choice, "advance", failing)
    good, bad = Generation(ids_of("a"), 8, GREEDY), Generation(ids_of("b"), 9, GREEDY)
    with running(model) as engine:
        engine.submit(bad)
        (increments,) = answers(engine, [good])
    assert text_of_all(increments) == alone(model, good.tokens, 8)
    assert bad.cancelled
    assert engine.active == 0


def test_a_temperature_near_zero_takes_the_likeliest(model: Any) -> None:
    cold = Generation(ids_of("a"), 6, Sampling(temperature=1e-40))
    with running(model) as engine:
        (increments,) = answers(engine, [cold])
    assert text_of_all(increments) == alone(model, cold.tokens, 6)


def test_a_document_whose_cache_is_damaged_is_read_again(model: Any, tmp_path: Path) -> None:
    with serving(tmp_path, model=model) as (address, service):
        id = upload(address, "book.txt", BOOK.encode())["id"]
        first = chat(address, WHO, id)
        service.engine.store.flush()
    for file in tmp_path.rglob(f"{id}*.cache"):
        file.write_bytes(b"damaged")
    body = {"model": "tiny", "messages": WHO, "ahn": {"document": id}}
    with serving(tmp_path, model=model) as (address, _):
        answer = httpx.post(f"{address}/v1/chat/completions", json=body)
        assert (answer.status_code, "ask again later" in answer.text) == (409, True)
        assert httpx.post(f"{address}/v1/chat/completions", json=body).status_code in (200, 409)
        assert upload(address, "book.txt", BOOK.encode())["status"] == "processed"
        assert chat(address, WHO, id)[0] == first[0]


def test_what_a_deleted_document_left_is_removed(model: Any, tmp_path: Path) -> None:
    with serving(tmp_path, model=model) as (address, service):
        id = upload(address, "book.txt", BOOK.encode())["id"]
        service.engine.store.flush()
    for file in tmp_path.rglob(f"{id}.json"):
        file.unlink()
    with serving(tmp_path, model=model):
        assert not list(tmp_path.rglob(f"{id}*.cache"))


def test_a_full_disk_ends_no_answer(model: Any, tmp_path: Path, monkeypatch: Any, caplog: Any) -> None:
    """Documents and sessions stay in memory, and the log says that they are not kept."""

    def full(*_: Any) -> None:
        raise OutputError("cannot write: No space left on device")

    with (
        caplog.at_level(logging.WARNING, "ahn.serving"),
        serving(tmp_path, model=model, session_bytes=1) as (address, service),
    ):
        monkeypatch.setattr("ahn.cache.HippocampalCache.save", full)
        monkeypatch.setattr(documents.DocumentShelf, "save", lambda *_: None)
        id = upload(address, "book.txt", BOOK.encode())["id"]
        first = chat(address, WHO, id)
        service.engine.store.flush()
        assert chat(address, [{"role": "user", "content": "Else?"}])[0]
        assert chat(address, WHO, id)[0] == first[0]
        monkeypatch.setattr(documents, "write_text", full)
        answer = httpx.post(f"{address}/v1/files", files={"file": ("other.txt", b"Other.")})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "disk")
        assert [each["id"] for each in httpx.get(f"{address}/v1/files").json()["data"]] == [id]
    assert "not kept over a restart" in caplog.text
    assert "the server failed" not in caplog.text


def test_facts_that_cannot_be_written_are_logged(model: Any, tmp_path: Path, monkeypatch: Any, caplog: Any) -> None:
    written = []

    def once(path: Path, text: str) -> None:
        written.append(path)
        if len(written) > 2:
            raise OutputError("cannot write: No space left on device")
        path.write_text(text)

    monkeypatch.setattr(documents, "write_text", once)
    with serving(tmp_path, model=model) as (address, _):
        id = upload(address, "book.txt", BOOK.encode())["id"]
        assert chat(address, WHO, id)[0]
    assert "a document is not kept over a restart" in caplog.text


def test_one_folder_has_one_server(model: Any, tmp_path: Path) -> None:
    store = PrefixStore(model, 10**9, tmp_path / "kept", 10**9)
    with pytest.raises(OutputError, match="another server uses"):
        PrefixStore(model, 10**9, tmp_path / "kept", 10**9)
    store.close()
    PrefixStore(model, 10**9, tmp_path / "kept", 10**9).close()


def test_what_is_forgotten_is_not_written(model: Any, tmp_path: Path) -> None:
    store = PrefixStore(model, 10**9, tmp_path, 10**9)
    cache = ahn.HippocampalCache(model)
    save, waits = ahn.HippocampalCache.save, []

    def forgetting(cache: Any, path: Path) -> None:
        waits.append(path)
        store.forget("file-1")
        save(cache, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ahn.HippocampalCache, "save", forgetting)
        Reader(model, cache, score=False).prefill(torch.tensor([5, 6]))
        store.keep("file-1", [1, 2], cache)
        store.flush()
    assert waits
    assert not list(tmp_path.glob("*.cache"))
    assert not store.roots()
    store.close()


def test_documents_are_read_one_at_a_time(model: Any) -> None:
    with serving(model=model) as (address, service):
        body = {"model": "tiny", "prompt": "Go", "max_tokens": 10**6, "stream": True, "temperature": 0}
        with httpx.stream("POST", f"{address}/v1/completions", json=body) as stream:
            lines = stream.iter_lines()
            next(lines)
            for number in range(3):
                text = f"{number} {BOOK}".encode()
                httpx.post(f"{address}/v1/files", files={"file": (f"{number}.txt", text)})
            for _ in range(400):
                files = service.shelf.documents()
                begun = [each for each in files if 0 < each.read_tokens < each.tokens]
                assert all(each.read_tokens / each.seconds < 10**5 for each in begun)
                assert len(begun) <= 1
                if all(each.status == "processed" for each in files):
                    break
                time.sleep(0.01)
            assert next(lines) is not None


def test_a_body_that_never_comes(model: Any) -> None:
    with serving(model=model, max_seconds=1) as (address, _):
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as client:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: 9\r\n\r\n"
            client.sendall(head.encode())
            client.settimeout(20)
            told = ""
            while "}}" not in told:
                told += client.recv(65536).decode()
    assert told.startswith("HTTP/1.1 408")
    assert "longer than 1 seconds" in told


def test_a_page_that_does_not_exist(model: Any) -> None:
    with serving(model=model) as (address, _):
        for name in ("nothing.js", "a" * 300 + ".js", "%00.js", "..%2fapp.py"):
            answer = httpx.get(f"{address}/page/{name}")
            assert answer.status_code == 404
            assert answer.json()["error"]["type"] == "not_found_error"


def test_an_error_that_nobody_foresaw(model: Any, monkeypatch: Any) -> None:
    def failing(*_: Any) -> None:
        raise ZeroDivisionError("unforeseen")

    with serving(model=model) as (address, service):
        monkeypatch.setattr(service.shelf, "documents", failing)
        answer = httpx.get(f"{address}/v1/files")
        assert answer.status_code == 500
        assert answer.json()["error"]["message"] == "the server failed: ZeroDivisionError"


def test_streams_hold_no_separators_of_lines(model: Any, monkeypatch: Any, capsys: Any) -> None:
    words = "a\u2028b\x85ü\n"
    monkeypatch.setattr("ahn.serving.answers.ChatShape.delta", lambda self, text: {"delta": {"content": words}})
    with serving(model=model) as (address, _):
        body = {"model": "tiny", "messages": WHO, "max_tokens": 1, "stream": True}
        lines = httpx.post(f"{address}/v1/chat/completions", json=body).text.splitlines()
        said = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
        assert said[-1]["choices"][0]["delta"]["content"] == words
        monkeypatch.setattr("sys.stdin", io.StringIO("Who?\n"))
        assert main(["chat", "--url", address, "--max-tokens", "1"]) == 0
        assert "a\u2028b\x85ü" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["file", "/proc/none"])
def test_a_folder_that_cannot_be_written_is_told_first(place: str, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "file").write_text("no folder")
    assert main(["serve", "--port", "0", "--session-dir", str(tmp_path / place)]) == 2
    assert "Name another folder" in " ".join(capsys.readouterr().err.split())
