"""The published implementation's tensors, reproduced in every way of reading: five folders, CPU, float32."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ahn

FOLDERS = (
    "qwen2_GatedDeltaNet",
    "qwen2_DeltaNet",
    "qwen2_Mamba2",
    "qwen3_GatedDeltaNet",
    "qwen2_GatedDeltaNet_sinks128",
)


class Golden:
    """One folder: its model, with the memory attached, and its tensors."""

    def __init__(self, folder: Path) -> None:
        self.model = ahn.from_pretrained(folder)
        self.tensors = load_file(folder / "io.safetensors")
        self.config = json.loads((folder / "config.json").read_text())
        self.tolerance = 2e-4 if "sinks128" in folder.name else 1e-4

    def check(self, actual: torch.Tensor, name: str) -> None:
        torch.testing.assert_close(actual, self.tensors[name], rtol=0, atol=self.tolerance)

    @torch.no_grad()
    def decode(self, cache: ahn.HippocampalCache, name: str) -> torch.Tensor:
        steps = self.tensors[name].split(1, dim=1)
        return torch.cat([self.model(step, cache=cache).logits for step in steps], dim=1)

    def states(self, cache: ahn.HippocampalCache) -> torch.Tensor:
        layers: Any = cache.layers
        return torch.stack([layer.state for layer in layers])


@pytest.fixture(scope="module", params=FOLDERS)
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(Path(__file__).parent / "fixtures" / "golden" / request.param)


@torch.no_grad()
def test_prefill_then_decoding(golden: Golden) -> None:
    cache = ahn.HippocampalCache(golden.model)
    golden.check(golden.model(golden.tensors["input_ids"], cache=cache).logits, "prefill_logits")
    golden.check(golden.states(cache), "state_after_prefill")
    golden.check(golden.decode(cache, "decode_ids"), "decode_logits")
    golden.check(golden.states(cache), "state_after_decode")


@torch.no_grad()
def test_short_prompt_then_decoding(golden: Golden) -> None:
    cache = ahn.HippocampalCache(golden.model)
    golden.model(golden.tensors["short_input_ids"], cache=cache)
    golden.check(golden.decode(cache, "short_decode_ids"), "short_decode_logits")


@pytest.mark.parametrize("chunk", [1, 7, 40])
@torch.no_grad()
def test_prefill_in_chunks(golden: Golden, chunk: int) -> None:
    cache = ahn.HippocampalCache(golden.model)
    parts = golden.tensors["input_ids"].split(chunk, dim=1)
    logits = torch.cat([golden.model(part, cache=cache).logits for part in parts], dim=1)
    golden.check(logits, "prefill_logits")
    golden.check(golden.states(cache), "state_after_prefill")


@torch.no_grad()
def test_without_a_cache(golden: Golden) -> None:
    golden.check(golden.model(golden.tensors["input_ids"], use_cache=False).logits, "prefill_logits")


@torch.no_grad()
def test_full_mode_is_the_base_model(golden: Golden) -> None:
    if "base_prefill_logits" not in golden.tensors:
        pytest.skip("this folder holds no logits of the base model")
    with ahn.mode(golden.model, "full"):
        golden.check(golden.model(golden.tensors["input_ids"]).logits, "base_prefill_logits")


@torch.no_grad()
def test_what_each_layer_adds(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer by layer: hidden states, and the memory's output after its projection."""
    if "prefill_ahn_output" not in golden.tensors:
        pytest.skip("this folder holds no layer outputs")
    from ahn.attachment import attachment_of

    added: list[torch.Tensor] = []
    for layer in attachment_of(golden.model).layers:
        assert layer.memory is not None
        record = _recording(layer.memory.project_out, added)
        monkeypatch.setattr(layer.memory, "project_out", record)
    output = golden.model(golden.tensors["input_ids"], output_hidden_states=True)
    golden.check(torch.stack(added), "prefill_ahn_output")
    golden.check(torch.stack(output.hidden_states), "prefill_hidden_states")


def _recording(function: Callable[..., torch.Tensor], into: list[torch.Tensor]) -> Callable[..., torch.Tensor]:
    def call(*args: torch.Tensor) -> torch.Tensor:
        result = function(*args)
        into.append(result.flatten(2))
        return result

    return call


def test_greedy_text(golden: Golden) -> None:
    if "generate_ids" not in golden.tensors:
        pytest.skip("this folder holds no generated text")
    prompt, expected = golden.tensors["input_ids"], golden.tensors["generate_ids"]
    new = expected.size(1) - prompt.size(1)
    out = golden.model.generate(prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False)
    assert torch.equal(out, expected)
