"""llama.cpp as an arm: what it is asked, and what is said where it is not there; the real one where it is installed."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest

import ahn
from ahn.cli import main
from ahn.errors import ModelError
from ahn.models import load_model
from ahn.models.gguf_file import GGUFFile
from ahn.speed import llama, measure
from ahn.speed.llama import LlamaBaseline, find_gguf
from tests.models.test_gguf import HEAD, KV_HEADS, write


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    write(path)
    return path


class Server:
    """Answers as llama.cpp does."""

    asked: ClassVar[list[dict[str, Any]]] = []

    def __init__(self, parameters: Any) -> None:
        assert parameters.n_ctx <= GGUFFile(Path(parameters.model.path)).value("llama.context_length")
        if parameters.n_ctx > 5000:
            raise RuntimeError("failed to\n allocate")

    def handle_completions(self, request: dict[str, Any]) -> dict[str, Any]:
        Server.asked.append(request)
        new = len(request["prompt"]) - 40
        return {"timings": {"predicted_per_token_ms": 12.0, "prompt_ms": 3.0 * new, "prompt_n": new}}


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    module: Any = ModuleType("xllamacpp")
    module.Server = Server
    threads = SimpleNamespace
    module.CommonParams = lambda: SimpleNamespace(
        model=SimpleNamespace(), cpuparams=threads(), cpuparams_batch=threads()
    )
    monkeypatch.setitem(sys.modules, "xllamacpp", module)
    monkeypatch.setattr(llama, "find_spec", lambda name: module)
    monkeypatch.setattr(llama, "_REST", 0.0)
    monkeypatch.setattr(Server, "asked", [])
    return Server.asked


def test_asks_for_the_text_and_takes_what_it_says(file: Path, stand_in: list[dict[str, Any]]) -> None:
    baseline = LlamaBaseline(file, 40, threads=1)
    assert baseline.cache_bytes == 2 * 2 * 2 * KV_HEADS * HEAD * 40
    assert baseline.decode() == 0.012
    assert baseline.read(64) == pytest.approx(64 * 0.003)
    texts = [len(request["prompt"]) for request in stand_in]
    assert texts == [40, 40, 104]
    assert all(request["cache_prompt"] and request["ignore_eos"] for request in stand_in)


def test_is_measured_beside_the_others(file: Path, stand_in: list[dict[str, Any]]) -> None:
    model = ahn.from_pretrained(file, config=ahn.AHNConfig(window=16, sinks=2))
    speed = measure(model, ["llama.cpp", "ahn"], [40], rounds=1)
    assert speed.find("decoding", "llama.cpp", 40).seconds.median == 0.012
    mine = speed.find("decoding", "ahn", 40)
    assert mine.of_first.median == pytest.approx(0.012 / mine.seconds.median)


def test_what_cannot_be_timed(file: Path, stand_in: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=r"cannot read .* failed to allocate"):
        LlamaBaseline(file, 6000, threads=1)
    monkeypatch.setattr(Server, "handle_completions", lambda self, request: {"error": "no way"})
    with pytest.raises(ModelError, match="error"):
        LlamaBaseline(file, 40, threads=1).decode()


def test_needs_the_package_and_a_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(file)
    monkeypatch.setattr(llama, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"ahn\[bench\]"):
        find_gguf(model)
    monkeypatch.setattr(llama, "find_spec", lambda name: object())
    assert find_gguf(model) == file
    model.config._name_or_path = "some/folder"
    with pytest.raises(ModelError, match="GGUF"):
        find_gguf(model)


def test_the_command_says_it_first(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("ahn.cli.bench.find_spec", lambda name: None)
    assert main(["bench", "--arms", "llama.cpp,ahn", "--model", "nowhere"]) == 2
    assert "ahn[bench]" in capsys.readouterr().err


def test_the_real_one(file: Path) -> None:
    pytest.importorskip("xllamacpp")
    baseline = LlamaBaseline(llama.find_gguf(load_model(file)), 40, threads=1)
    assert baseline.decode() > 0
    assert baseline.read(64) > 0
