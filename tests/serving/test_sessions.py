"""What was read before is not read again: conversations, documents, restarts, and a server that is killed."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ahn.serving.errors import RequestError
from ahn.serving.extraction import text_of_file
from ahn.serving.keys import PrefixKey, model_key
from ahn.serving.requests import Generation
from ahn.serving.store import PrefixStore
from tests.serving.common import (
    GREEDY,
    alone,
    answers,
    ids_of,
    running,
    serving,
    text_of_all,
    tiny_model,
)
from tests.tiny import byte_tokenizer

httpx = pytest.importorskip("httpx", reason="the server needs the extra serve")
BOOK = "Call me Ishmael. Some years ago, never mind how long precisely, I thought I would sail about a little. "
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(anchors=4)


def chat(address: str, messages: list[dict[str, str]], document: str | None = None, limit: int = 6) -> tuple[str, int]:
    """The greedy answer to a conversation, and how many of its tokens had been read before."""
    body = {"model": "tiny", "messages": messages, "max_tokens": limit, "temperature": 0, "ahn": {"document": document}}
    answer = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    usage = answer.json()["usage"]
    return answer.json()["choices"][0]["message"]["content"], usage["prompt_tokens_details"]["cached_tokens"]


def upload(address: str, name: str, data: bytes) -> dict[str, Any]:
    """Sends a document and waits until it has been read."""
    answer = httpx.post(f"{address}/v1/files", files={"file": (name, data)}, data={"purpose": "user_data"})
    assert answer.status_code == 200, answer.text
    for _ in range(600):
        file = httpx.get(f"{address}/v1/files/{answer.json()['id']}").json()
        if file["status"] != "uploaded":
            return dict(file)
        time.sleep(0.05)
    raise TimeoutError("the document is still being read")


def test_only_what_is_new_is_read(model: Any) -> None:
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who is Ishmael?"}]
    with serving(model=model) as (address, service):
        first, cached = chat(address, asked)
        assert cached == 0
        again, cached = chat(address, asked)
        read_before = len(ids_of("<system>Be brief.</s><user>Who is Ishmael?</s>"))
        assert (again, cached) == (first, read_before)
        other = [asked[0], {"role": "user", "content": "And Ahab?"}]
        assert chat(address, other)[1] == len(ids_of("<system>Be brief.</s>"))
        # The turn that is the model's own answer is found by the tokens that it wrote.
        words = "".join(letter for letter in first if letter.isascii())
        turn = [*asked, {"role": "assistant", "content": words}, {"role": "user", "content": "Go on."}]
        answer, cached = chat(address, turn)
        assert cached >= read_before
        rendered = f"<system>Be brief.</s><user>Who is Ishmael?</s><assistant>{words}</s><user>Go on.</s><assistant>"
        assert answer == alone(model, ids_of(rendered), 6)
        assert service.engine.store.size.in_memory > 0


def test_an_answer_is_gone_on_from_by_its_tokens(model: Any) -> None:
    prompt = ids_of(BOOK)
    with running(model) as engine:
        first = Generation(prompt, 10, GREEDY, marks=[len(prompt)])
        (increments,) = answers(engine, [first])
        written = ids_of(text_of_all(increments))
        second = Generation([*prompt, *written[:5], *ids_of(" More")], 4, GREEDY)
        (more,) = answers(engine, [second])
        assert second.cached_tokens == len(prompt)
        assert text_of_all(more) == alone(model, second.tokens, 4)


def test_the_store_keeps_its_bounds(model: Any, tmp_path: Path) -> None:
    prompts = [ids_of(BOOK + f"Chapter {number}.") for number in range(5)]
    with running(model, tmp_path) as engine:
        answers(engine, [Generation(prompts[0], 1, GREEDY, marks=[len(prompts[0])])])
        one = engine.store.size.memory_bytes
        engine.store.flush()
        file = engine.store.size.disk_bytes
    shutil.rmtree(tmp_path)
    with running(model, tmp_path, store_bytes=2 * one) as engine:
        engine.store._disk_most = 3 * file + 100
        for prompt in prompts:
            answers(engine, [Generation(prompt, 1, GREEDY, marks=[len(prompt)])])
        engine.store.flush()
        size = engine.store.size
        assert (size.in_memory, size.on_disk) == (2, 3)
        assert size.memory_bytes <= 2 * one
        assert len(list(tmp_path.iterdir())) == 3
        # One that went to disk comes back.
        back = Generation([*prompts[2], 40], 3, GREEDY)
        (increments,) = answers(engine, [back])
        assert back.cached_tokens == len(prompts[2])
        assert text_of_all(increments) == alone(model, back.tokens, 3)


def test_a_damaged_file_is_read_anew(model: Any, tmp_path: Path) -> None:
    prompt = ids_of(BOOK)
    with running(model, tmp_path) as engine:
        answers(engine, [Generation(prompt, 1, GREEDY, marks=[40, len(prompt)])])
    longest = max(tmp_path.iterdir(), key=lambda file: int(file.name.split(".")[1]))
    longest.write_bytes(longest.read_bytes()[:-9] + b"otherwise")
    (tmp_path / "note.txt").write_text("not ours")
    with running(model, tmp_path) as engine:
        again = Generation([*prompt, 50], 3, GREEDY)
        (increments,) = answers(engine, [again])
        assert again.cached_tokens == 40
        assert text_of_all(increments) == alone(model, again.tokens, 3)
        assert not longest.exists()


def test_documents_are_read_once(model: Any, tmp_path: Path) -> None:
    question = [{"role": "user", "content": "Who?"}]
    with serving(tmp_path, model=model) as (address, service):
        file = upload(address, "book.md", (BOOK * 3).encode())
        assert (file["status"], file["filename"]) == ("processed", "book.md")
        assert file["ahn"]["read_tokens"] == file["ahn"]["tokens"] == len(ids_of("<user>" + BOOK * 3))
        assert file["ahn"]["full_cache_bytes"] > file["ahn"]["cache_bytes"] > 0
        assert upload(address, "copy.md", (BOOK * 3).encode())["id"] == file["id"]  # the same text
        first, cached = chat(address, question, file["id"])
        assert cached == file["ahn"]["tokens"]
        assert first == alone(model, ids_of(f"<user>{BOOK * 3}\n\nWho?</s><assistant>"), 6)
        spans = httpx.get(f"{address}/v1/files/{file['id']}/anchors").json()["data"]
        assert 0 < len(spans) <= 4
        text = httpx.get(f"{address}/v1/files/{file['id']}/content").text
        assert text == BOOK * 3
        assert all(text[start:end] for start, end in spans)
        assert [each["id"] for each in httpx.get(f"{address}/v1/files").json()["data"]] == [file["id"]]
    with serving(tmp_path, model=model) as (address, service):  # after a restart
        assert chat(address, question, file["id"])[0] == first
        assert httpx.get(f"{address}/v1/files/{file['id']}").json()["status"] == "processed"
        assert httpx.delete(f"{address}/v1/files/{file['id']}").json()["deleted"]
        assert httpx.get(f"{address}/v1/files/{file['id']}").status_code == 404
        service.engine.store.flush()
        assert not list(tmp_path.rglob("file-*"))


def test_a_document_that_was_not_read_to_its_end_is_read_after_a_restart(model: Any, tmp_path: Path) -> None:
    with serving(tmp_path, model=model) as (address, _):
        body = {"file": ("long.txt", (BOOK * 6).encode())}
        id = httpx.post(f"{address}/v1/files", files=body).json()["id"]
        early = {"model": "tiny", "messages": [{"role": "user", "content": "Who?"}], "ahn": {"document": id}}
        answer = httpx.post(f"{address}/v1/chat/completions", json=early)
        assert answer.status_code == 409
        assert "still being read" in answer.json()["error"]["message"]
    with serving(tmp_path, model=model) as (address, _):
        assert upload(address, "long.txt", (BOOK * 6).encode())["id"] == id


def test_a_system_message_comes_behind_a_document(model: Any) -> None:
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    with serving(model=model) as (address, _):
        file = upload(address, "book.txt", BOOK.encode())
        answer, _ = chat(address, asked, file["id"])
        assert answer == alone(model, ids_of(f"<user>{BOOK}\n\nBe brief.\n\nWho?</s><assistant>"), 6)


@contextlib.contextmanager
def process(folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), *sys.path]))}
    command = [sys.executable, "-m", "tests.serving.worker", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT) as server:
        assert server.stdout is not None
        try:
            yield server, server.stdout.readline().strip()
        finally:
            server.kill()


def test_a_killed_server_loses_no_stored_session(tmp_path: Path) -> None:
    asked = [{"role": "user", "content": BOOK}]
    model = tiny_model()
    with process(tmp_path) as (server, address):
        first, _ = chat(address, asked)
        file = upload(address, "book.txt", BOOK.encode())
        deadline = time.monotonic() + 20
        while len(list(tmp_path.rglob("*.cache"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        for number in range(4):  # it is killed while it writes others
            chat(address, [{"role": "user", "content": f"{BOOK} {number}"}], limit=1)
        server.send_signal(signal.SIGKILL)
        server.wait()
    folder = tmp_path / model_key(model, "tiny")
    store = PrefixStore(model, 10**9, folder, 10**9)
    for name in [each.name for each in folder.glob("*.cache")]:
        key = PrefixKey.of_file(name)
        assert key is not None
        assert store._get(key) is not None, name
    store.close()
    with serving(tmp_path, model=model) as (address, _):
        again, cached = chat(address, asked)
        assert (again, cached) == (first, len(ids_of(f"<user>{BOOK}</s>")))
        assert httpx.get(f"{address}/v1/files/{file['id']}").json()["status"] == "processed"


def pdf(text: str) -> bytes:
    """A PDF of one page with a line of text."""
    stream = f"BT /F1 12 Tf 20 100 Td ({text}) Tj ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 300 200] /Contents 4 0 R"
        b" /Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    out = io.BytesIO(b"%PDF-1.4\n")
    out.seek(0, io.SEEK_END)
    places = []
    for number, body in enumerate(objects, 1):
        places.append(out.tell())
        out.write(b"%d 0 obj\n%s\nendobj\n" % (number, body))
    start = out.tell()
    out.write(b"xref\n0 6\n0000000000 65535 f \n" + b"".join(b"%010d 00000 n \n" % place for place in places))
    out.write(b"trailer << /Size 6 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % start)
    return out.getvalue()


def test_texts_of_files() -> None:
    pytest.importorskip("pypdf", reason="the server needs the extra serve")
    pytest.importorskip("selectolax", reason="the server needs the extra serve")
    assert text_of_file("a.pdf", pdf("Call me Ishmael.")).strip() == "Call me Ishmael."
    page = b"<!doctype html><head><title>T</title></head><body><p>Call me</p><script>1</script><p>Ishmael."
    assert text_of_file("a.html", page) == "Call me\nIshmael.\n"
    assert text_of_file("a.txt", "Grüße\r\n".encode()) == "Grüße\n"
    assert text_of_file("a", "Grüße".encode("utf-16")) == "Grüße"


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.txt", b"", "has no text"),
        ("a.txt", b" \n ", "has no text"),
        ("a.bin", b"\x00\x01\x02", "no text in UTF-8"),
        ("a.txt", b"\xe9t\xe9", "no text in UTF-8"),
        ("a.pdf", b"%PDF-1.4 and no more", "cannot be read as PDF"),
    ],
)
def test_files_without_text_are_refused(name: str, data: bytes, words: str) -> None:
    pytest.importorskip("pypdf", reason="the server needs the extra serve")
    with pytest.raises(RequestError, match=words):
        text_of_file(name, data)


def test_the_same_files_serve_generate(model: Any, tmp_path: Path) -> None:
    import ahn

    with running(model, tmp_path) as engine:
        prompt = ids_of(BOOK)
        answers(engine, [Generation(prompt, 1, GREEDY, marks=[len(prompt)])])
    (file,) = tmp_path.glob("*.cache")
    assert ahn.HippocampalCache.load(file, model).seen_tokens == len(ids_of(BOOK))
    assert byte_tokenizer().decode(prompt) == BOOK
