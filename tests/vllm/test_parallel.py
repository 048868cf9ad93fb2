"""A memory in two processes: heads shared between them, or layers one after the other."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("vllm")

import ahn
from tests.vllm import serving
from tests.vllm.test_served import prompts_of


@pytest.mark.parametrize("how", ["tensor_parallel_size", "pipeline_parallel_size"])
@pytest.mark.parametrize("name", ["qwen2_GatedDeltaNet", "qwen3_GatedDeltaNet"])
def test_two_processes(name: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    folder, prompts = serving.golden_folder(name, tmp_path), prompts_of(name)
    with serving.engine(folder, distributed_executor_backend="mp", **{how: 2}) as llm:
        serving.check(ahn.from_pretrained(serving.GOLDEN / name), prompts, serving.answers(llm, prompts))
