"""A memory in two processes: heads shared between them, or layers one after the other."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("vllm")

import ahn
from tests import tiny
from tests.vllm import serving
from tests.vllm.test_served import JOINED, prompts_of, with_adapter


@pytest.fixture(autouse=True)
def two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")


@pytest.mark.parametrize("how", ["tensor_parallel_size", "pipeline_parallel_size"])
@pytest.mark.parametrize("name", ["qwen2_GatedDeltaNet", "qwen3_GatedDeltaNet"])
def test_two_processes(name: str, how: str, tmp_path: Path) -> None:
    folder, prompts = serving.golden_folder(name, tmp_path), prompts_of(name)
    with serving.engine(folder, distributed_executor_backend="mp", **{how: 2}) as llm:
        serving.check(ahn.from_pretrained(serving.GOLDEN / name), prompts, serving.answers(llm, prompts))


def test_heads_of_two_kinds_of_memory(tmp_path: Path) -> None:
    model, base, adapter = with_adapter(tmp_path, "llama:wide", **JOINED)
    prompts = [tiny.text(tokens=count, seed=count)[0].tolist() for count in (4, 30, 90)]
    options = {"distributed_executor_backend": "mp", "tensor_parallel_size": 2}
    with serving.engine(base, hf_overrides={"ahn_adapter": str(adapter)}, **options) as llm:
        serving.check(model, prompts, serving.answers(llm, prompts))
