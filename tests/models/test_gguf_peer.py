"""GGUF files as llama.cpp itself reads them, where its package is installed (extra `bench`)."""

import json
import urllib.request
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from ahn.models import load_model, load_tokenizer
from ahn.models.gguf_model import FAMILIES
from ahn.speed.llama import _serve
from tests.models import test_gguf
from tests.models.test_gguf import HEAD, WORDS, write
from tests.models.test_gguf_tokenizer import HARD, TOKENS, add_sentencepiece

pytest.importorskip("xllamacpp")

_PLAIN = {"attention.value_length": HEAD, "rope.dimension_count": HEAD}
CASES: dict[str, dict[str, Any]] = {
    **{name: {"architecture": name, "keys": _PLAIN} for name in FAMILIES if name not in ("mistral", "phi2")},
    "phi2": {"architecture": "phi2", "keys": {"attention.key_length": None}},
    "llama 3": {
        "config": {"rope_parameters": test_gguf.TestPositions.LLAMA3},
        "keys": {**_PLAIN, "rope.freq_base": 500000.0, "vocab_size": WORDS},
        "extra": {"rope_freqs.weight": test_gguf.TestPositions().factors()},
    },
}  # llama.cpp has no architecture of the name mistral


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_the_next_token_has_the_same_probability(tmp_path: Path, case: str) -> None:
    write(tmp_path / "m.gguf", kind="F32", **CASES[case])
    server, model, compared = _serve(tmp_path / "m.gguf", 128, 1), load_model(tmp_path / "m.gguf"), 0
    call = {"max_tokens": 1, "temperature": 0.0, "logprobs": 20, "ignore_eos": True, "cache_prompt": False}
    for seed in range(10):
        ids = torch.randint(3, 255, (1, 30), generator=torch.Generator().manual_seed(seed))
        said = server.handle_completions({"prompt": ids[0].tolist(), **call})["choices"][0].get("logprobs")
        if not said:
            continue  # the token is part of a character, of which llama.cpp says nothing
        likely = said["content"][0]["top_logprobs"][:5]
        ours = model(ids).logits[0, -1].log_softmax(-1)
        assert int(ours.argmax()) == likely[0]["id"]
        for token in likely:
            assert abs(float(ours[token["id"]]) - token["logprob"]) < 0.03  # its cache is in float16
        compared += 1
    assert compared > 1


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece(tmp_path: Path, prefix: bool) -> None:
    add = partial(add_sentencepiece, add_space_prefix=prefix, add_bos_token=True)
    words = {"vocab_size": len(TOKENS)}
    write(
        tmp_path / "m.gguf", kind="F32", add_tokenizer=add, config=words, keys={"rope.dimension_count": HEAD, **words}
    )
    server, tokenizer = _serve(tmp_path / "m.gguf", 128, 1), load_tokenizer(tmp_path / "m.gguf")
    for text in (*HARD, "<|user|>x  \nx"):
        body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
        request = urllib.request.Request(f"{server.listening_address}/tokenize", body)
        with urllib.request.urlopen(request, timeout=20) as answer:
            assert tokenizer(text)["input_ids"] == json.load(answer)["tokens"]
