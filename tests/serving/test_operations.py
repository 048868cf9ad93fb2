"""What whoever runs the server sees: health, counts, logs, the commands `ahn serve` and `ahn chat`."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import re
import socket
from pathlib import Path
from typing import Any

import pytest

from ahn.cli import main
from ahn.serving.settings import ServeSettings
from tests.serving.common import alone, ids_of, serving

httpx = pytest.importorskip("httpx", reason="the server needs the extra serve")
ROOT = Path(__file__).parents[2]


def ask(address: str, text: str) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": 5}
    assert httpx.post(f"{address}/v1/chat/completions", json=body).status_code == 200


def test_counts_tell_what_was_done() -> None:
    with serving() as (address, service):
        assert httpx.get(f"{address}/health").json() == {"status": "ok"}
        ask(address, "Who?")
        page = httpx.get(f"{address}/metrics").text
        counts = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
        assert float(counts["ahn_tokens_read_total"]) == len(ids_of("<user>Who?</s><assistant>"))
        assert float(counts["ahn_tokens_written_total"]) == 5
        assert float(counts["ahn_step_seconds_count"]) == 4
        assert float(counts["ahn_sessions_memory"]) == 2
        assert counts['ahn_requests_total{path="/v1/chat/completions",status="200"}'] == "1.0"
        about = httpx.get(f"{address}/v1/ahn").json()
        assert (about["model"], about["window"]) == ("tiny", 16)
    assert not service.engine.is_alive


def test_logs_hold_no_prompts(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ahn.serving"), serving() as (address, _):
        ask(address, "A secret question")
        assert httpx.get(f"{address}/v1/files/secret-id").status_code == 404
        assert httpx.get(f"{address}/secret-path").status_code == 404
    lines = [json.loads(record.message) for record in caplog.records if record.name == "ahn.serving.requests"]
    assert [(line["path"], line["status"]) for line in lines] == [
        ("/v1/chat/completions", 200), ("/v1/files/{id}", 404), ("other", 404),
    ]  # fmt: skip
    assert "secret" not in caplog.text


def test_a_server_open_to_others_needs_a_key(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.delenv("AHN_API_KEY", raising=False)
    for host in ("0.0.0.0", "192.168.0.1", "example.org"):
        assert main(["serve", "--host", host]) == 2
        assert "Set AHN_API_KEY" in " ".join(capsys.readouterr().err.split())


def test_a_port_in_use_is_told_before_the_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", "--port", str(taken.getsockname()[1])]) == 2
    assert "Choose another --host or --port" in " ".join(capsys.readouterr().err.split())


def test_chat_answers_line_by_line(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    with serving(api_key="secret") as (address, service):
        monkeypatch.setattr("sys.stdin", io.StringIO("Who?\n"))
        status = main(["chat", "--url", address, "--api-key", "secret", "--max-tokens", "7", "--system", "Short."])
        expected = alone(service.engine.model, ids_of("<system>Short.</s><user>Who?</s><assistant>"), 7)
        assert (status, capsys.readouterr().out) == (0, expected + "\n")
        monkeypatch.setattr("sys.stdin", io.StringIO("Who?\n"))
        assert main(["chat", "--url", address]) == 2
        assert "the API key is missing or wrong" in " ".join(capsys.readouterr().err.split())


def test_chat_without_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "--url", "http://127.0.0.1:1"]) == 2
    assert "Start one with ahn serve" in " ".join(capsys.readouterr().err.split())


def test_examples_name_what_there_is() -> None:
    docker, unit = ((ROOT / "examples" / name).read_text() for name in ("Dockerfile", "ahn.service"))
    assert 'ENTRYPOINT ["ahn", "serve"]' in docker
    assert "ahn serve smollm2-135m --session-dir" in unit
    known = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(ServeSettings)}
    commands = [line for line in (docker + unit).splitlines() if line.startswith(("CMD", "ExecStart"))]
    assert {word for line in commands for word in re.findall(r"--[a-z-]+", line)} <= known
    copied = [word for line in docker.splitlines() if line.startswith("COPY") for word in line.split()[1:-1]]
    assert copied
    assert all((ROOT / name).exists() for name in copied)
    ignored = (ROOT / "examples" / "Dockerfile.dockerignore").read_text().split()
    assert {f"!{name}" for name in copied} <= set(ignored)
