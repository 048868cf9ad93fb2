"""Adapters of peft on a base whose weights are in few bits, with a memory beside them."""

from typing import Any

import pytest
import torch

import ahn
from ahn.errors import ModelError
from ahn.quantization import QUANTIZE
from tests.quantization.test_layers import dequantized, quantized_tiny
from tests.tiny import awaken, text

TARGETS = (["q_proj", "down_proj"], "all-linear")


def adapted(model: Any, targets: Any) -> Any:
    """A model with a memory and an adapter, the same for the same shapes."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    ahn.attach(model, ahn.AHNConfig(window=12, sinks=3))
    awaken(model)
    settings = peft.LoraConfig(target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    return peft.get_peft_model(model, settings)


@pytest.mark.filterwarnings("ignore")  # peft asks for names that are deprecated
@pytest.mark.parametrize("quantize", QUANTIZE)
@pytest.mark.parametrize("targets", TARGETS, ids=["some", "all"])
def test_trains_and_generates_as_on_the_dequantised_base(quantize: str, targets: Any) -> None:
    model, ids = quantized_tiny(quantize), text(2, 40)
    losses, gradients, answers = [], [], []
    for each in (model, dequantized(model)):
        wrapped = adapted(each, targets)
        learning = [parameter for name, parameter in wrapped.named_parameters() if "lora" in name]
        optimizer = torch.optim.SGD(learning, lr=0.1)
        before = wrapped(input_ids=ids, labels=ids).loss
        before.backward()
        gradients.append([parameter.grad.clone() for parameter in learning])
        optimizer.step()
        after = wrapped(input_ids=ids, labels=ids).loss
        assert after < before
        losses.append([before, after])
        answers.append(wrapped.eval().generate(input_ids=ids, max_new_tokens=4))
    torch.testing.assert_close(losses[0], losses[1], atol=1e-4, rtol=0)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-4, rtol=1e-3)
    assert torch.equal(answers[0], answers[1])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("quantize", QUANTIZE)
@torch.no_grad()
def test_switched_off_it_is_the_base(quantize: str) -> None:
    model, ids = quantized_tiny(quantize), text(1, 40)
    expected = model(ids).logits
    wrapped = adapted(model, ["q_proj", "down_proj"])
    with ahn.mode(model, "full"):
        assert not torch.allclose(wrapped(ids).logits, expected, atol=1e-3)
        with wrapped.disable_adapter():
            assert torch.equal(wrapped(ids).logits, expected)


@pytest.mark.filterwarnings("ignore")
def test_is_not_merged() -> None:
    with pytest.raises(ModelError, match="keep the adapter beside the model"):
        adapted(quantized_tiny("int4"), ["q_proj"]).merge_and_unload()
