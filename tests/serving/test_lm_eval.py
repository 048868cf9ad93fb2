"""The evaluation harness asks the server by its own clients, `local-completions` and `local-chat-completions`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.serving.common import alone, ids_of, serving
from tests.tiny import byte_tokenizer

clients = pytest.importorskip("lm_eval.models.openai_completions", reason="the harness is not installed")
pytest.importorskip("tenacity", reason="the harness is installed without its extra api")
instances = pytest.importorskip("lm_eval.api.instance")


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    with serving() as both:
        yield both


def asked(kind: str, *arguments: Any) -> Any:
    return instances.Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def test_completions(server: Any, tmp_path: Path) -> None:
    address, service = server
    byte_tokenizer().save_pretrained(tmp_path)
    client = clients.LocalCompletionsAPI(
        model="tiny", base_url=f"{address}/v1/completions", tokenizer=str(tmp_path), tokenizer_backend="huggingface"
    )
    pairs = [("Call me", " Ishmael"), ("It was the best", " of times")]
    told = client.loglikelihood([asked("loglikelihood", *pair) for pair in pairs])
    for (context, continuation), (logprob, _) in zip(pairs, told, strict=True):
        ids = torch.tensor([ids_of(context + continuation)])
        with torch.no_grad():
            logits = service.engine.model(ids).logits[0, len(context) - 1 : -1]
        expected = torch.log_softmax(logits.float(), dim=-1).gather(1, ids[0, len(context) :, None]).sum()
        assert logprob == pytest.approx(float(expected), abs=1e-3)
    (written,) = client.generate_until([asked("generate_until", "Call me", {"until": ["\0"], "max_gen_toks": 9})])
    assert written == alone(service.engine.model, ids_of("Call me"), 9)


def test_chat(server: Any) -> None:
    import json

    from lm_eval.models.api_models import JsonChatStr

    address, service = server
    client = clients.LocalChatCompletion(model="tiny", base_url=f"{address}/v1/chat/completions")
    messages = JsonChatStr(json.dumps([{"role": "user", "content": "Who?"}]))
    (written,) = client.generate_until([asked("generate_until", messages, {"until": ["\0"], "max_gen_toks": 9})])
    assert written == alone(service.engine.model, ids_of("<user>Who?</s><assistant>"), 9)
