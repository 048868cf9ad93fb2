"""Engines of vLLM for tests, and what `ahn` itself says to the same prompts."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import torch

from ahn.attachment import attachment_of
from ahn.serving.vllm.decoder import ServedForward

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"
WRITTEN = 24


def golden_folder(name: str, target: Path) -> Path:
    """The model of a golden folder alone: vLLM reads every safetensors file as weights."""
    for file in ("config.json", "model.safetensors"):
        shutil.copyfile(GOLDEN / name / file, target / file)
    return target


@contextmanager
def engine(folder: Path | str, **options: Any) -> Iterator[Any]:
    """A vLLM engine in this process."""
    from vllm.distributed import cleanup_dist_env_and_memory

    import vllm

    settings = {"max_model_len": 512, "max_num_seqs": 8, "max_num_batched_tokens": 512, "dtype": "float32"}
    settings |= {"skip_tokenizer_init": True, "kv_cache_memory_bytes": 1 << 28, "disable_log_stats": True}
    llm = vllm.LLM(model=str(folder), **{**settings, **options})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def layers_by_kernels(llm: Any) -> list[bool]:
    """For each decoder layer that the kernels look at, whether they take it; for an engine in this process."""
    model = llm.llm_engine.model_executor.driver_worker.model_runner.model
    forwards = [vars(module).get("forward") for module in model.model.modules()]
    paths = [each.path for each in forwards if isinstance(each, ServedForward)]
    return [path is not None and bool(path._verified) for path in paths]


def sampling(**options: Any) -> Any:
    """The likeliest token, without an end."""
    from vllm import SamplingParams

    return SamplingParams(max_tokens=WRITTEN, ignore_eos=True, detokenize=False, logprobs=1, top_k=1, **options)


def answers(llm: Any, prompts: Sequence[list[int]], **options: Any) -> list[list[tuple[list[int], list[float]]]]:
    """For each prompt its answers, tokens and their log probabilities each."""
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling(**options), use_tqdm=False)
    return [[read_answer(each) for each in output.outputs] for output in outputs]


def read_answer(completion: Any) -> tuple[list[int], list[float]]:
    """Tokens of an answer and their log probabilities."""
    tokens = list(completion.token_ids)
    return tokens, [step[token].logprob for step, token in zip(completion.logprobs, tokens, strict=True)]


@torch.no_grad()
def expected(model: Any, prompt: list[int]) -> tuple[list[int], list[float]]:
    """What `ahn` writes after a prompt, and how likely it finds it."""
    written = model.generate(torch.tensor([prompt]), max_new_tokens=WRITTEN, do_sample=False, eos_token_id=None)
    answer = written[0, len(prompt) :].tolist()
    logits = model(written[:, :-1]).logits[0, len(prompt) - 1 :].log_softmax(-1)
    return answer, [float(row[token]) for row, token in zip(logits, answer, strict=True)]


def check(model: Any, prompts: Sequence[list[int]], found: list[list[tuple[list[int], list[float]]]]) -> None:
    """Holds answers of vLLM to those of `ahn`."""
    exact = attachment_of(model).exact_tokens
    assert min(map(len, prompts)) + WRITTEN < exact or max(map(len, prompts)) > exact
    for prompt, mine in zip(prompts, found, strict=True):
        tokens, likelihoods = expected(model, prompt)
        for each_tokens, each_likelihoods in mine:
            assert each_tokens == tokens
            torch.testing.assert_close(torch.tensor(each_likelihoods), torch.tensor(likelihoods), atol=1e-4, rtol=1e-4)
