"""What must hold for every family, with every memory, far beyond the window."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ahn
from ahn.attachment import attachment_of
from tests.tiny import DOCUMENTED, FAMILIES, MEMORIES, awaken, read, registered, text, tiny

TOLERANCE = 1.5e-4  # the random weights are large: rounding grows from layer to layer
SINKS, WINDOW = 5, 16


@pytest.fixture(scope="module", params=FAMILIES)
def base(request: pytest.FixtureRequest) -> Any:
    return tiny(request.param)


PAIRS = [(family, MEMORIES[0]) for family in FAMILIES]
# A memory sees sizes alone of its family: these have heads that the kernels take or not, and values unlike keys.
PAIRS += [(f, memory) for f in ("llama", "llama:wide", "deepseek_v3") for memory in (*MEMORIES[1:], DOCUMENTED)]


@pytest.fixture(params=PAIRS, ids="-".join)
def model(request: pytest.FixtureRequest) -> Any:
    family, name = request.param
    base = tiny(family)
    torch.manual_seed(1)  # some draws of Mamba2's step are so ill-conditioned that float32 alone passes the tolerance
    with registered(name) as memory, ahn.attached(base, ahn.AHNConfig(memory=memory, window=WINDOW, sinks=SINKS)):
        awaken(base)
        yield base


@torch.no_grad()
def test_every_way_of_reading_agrees(model: Any) -> None:
    ids = text(2)
    at_once = read(model, ids)
    for chunks in (1, [7, 30, 1, 1, 20, 16], 21):
        torch.testing.assert_close(read(model, ids, chunks), at_once, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(model(ids, use_cache=False).logits, at_once, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_base_model_up_to_sinks_and_window(model: Any) -> None:
    ids = text(2)
    exact = min(
        [SINKS + WINDOW] + [layer.sliding_window or 99 for layer in attachment_of(model).layers if layer.memory]
    )
    with ahn.mode(model, "full"):
        expected = model(ids).logits
    actual = model(ids).logits
    torch.testing.assert_close(actual[:, :exact], expected[:, :exact], rtol=0, atol=TOLERANCE)
    assert (actual[:, exact:] - expected[:, exact:]).abs().amax() > 1e-2, "the memory does nothing beyond the window"


@torch.no_grad()
def test_padded_rows_read_like_each_alone(model: Any) -> None:
    """Left padding of any size, also more than sinks and window, one-shot, chunked and token by token."""
    rows = [text(1, n, seed=n) for n in (60, 53, 24, 3)]
    ids, mask = padded(rows)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    alone = [read(model, row)[0] for row in rows]
    for chunks in (None, 13, 1):
        logits = read(model, ids, chunks, attention_mask=mask, position_ids=positions)
        assert logits.isfinite().all()
        for row, expected in zip(logits, alone, strict=True):
            torch.testing.assert_close(row[-len(expected) :], expected, rtol=0, atol=TOLERANCE)


def padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of texts padded on the left, and its attention mask."""
    longest = max(row.size(1) for row in rows)
    ids = torch.cat([torch.nn.functional.pad(row, (longest - row.size(1), 0)) for row in rows])
    return ids, (ids != 0).long()


@torch.no_grad()
def test_attach_then_detach_changes_nothing(base: Any) -> None:
    ids = text(2)
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    before, settings = base(ids).logits, base.config.to_dict()
    implementation = base.config._attn_implementation
    attributes = set(vars(base))
    ahn.attach(base, ahn.AHNConfig(window=WINDOW, sinks=SINKS))
    base(ids)
    ahn.detach(base)
    after = base.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], weights[name]) for name in weights)
    assert torch.equal(base(ids).logits, before)
    assert base.config.to_dict() == settings
    assert base.config._attn_implementation == implementation
    assert set(vars(base)) == attributes
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in base.modules())


@torch.no_grad()
def test_untrained_memory_is_silent(base: Any) -> None:
    ids = text(2)
    with ahn.attached(base, ahn.AHNConfig(window=WINDOW, sinks=SINKS)):
        logits = base(ids).logits
        with ahn.mode(base, "window"):
            assert torch.equal(base(ids).logits, logits)


def test_full_mode_is_bit_identical(base: Any) -> None:
    ids = text(2)
    expected = base.generate(ids, max_new_tokens=8, do_sample=False)
    with ahn.attached(base, ahn.AHNConfig(window=WINDOW, sinks=SINKS)):
        awaken(base)
        with ahn.mode(base, "full"), torch.no_grad():
            logits = base(ids).logits
            assert torch.equal(base.generate(ids, max_new_tokens=8, do_sample=False), expected)
    with torch.no_grad():
        assert torch.equal(base(ids).logits, logits)


REFUSED = {"bloom", "falcon", "gptj", "codegen", "mpt", "t5", "bert", "mamba", "jamba", "falcon_h1"} - FAMILIES.keys()


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_refused_by_name_with_the_reason(family: str) -> None:
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
    other = {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "d_model": 32, "n_heads": 4, "n_layers": 2}
    more = {"d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4, "state_size": 4, "intermediate_size": 32}
    hybrid = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}
    config = transformers.AutoConfig.for_model(family)
    for key, value in {**sizes, **other, **more, **hybrid, "num_key_value_heads": 2, "bos_token_id": 1}.items():
        if hasattr(config, key):
            setattr(config, key, value)
    kind = transformers.AutoModelForSeq2SeqLM if family == "t5" else transformers.AutoModelForCausalLM
    model = kind.from_config(config)
    with pytest.raises(ahn.AHNError) as error:
        ahn.attach(model)
    message = str(error.value)
    assert type(model).__name__.lower()[:4] in message.lower()
    assert "\n" not in message
    assert "_ahn_attachment" not in vars(model)
