"""Folders of transformers whose weights are quantised as they are read."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import ahn
from ahn.errors import ModelError
from ahn.models import filling, load_model
from ahn.quantization import QUANTIZE, QuantizedEmbedding, QuantizedLinear, quantize_model
from tests.tiny import text, tiny

WIDE = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 96}


@pytest.fixture(params=[True, False], ids=["tied", "apart"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Any]:
    model = tiny("llama", **WIDE, tie_word_embeddings=request.param)
    model.save_pretrained(tmp_path / "model", max_shard_size="50KB")
    return tmp_path / "model", model


@pytest.mark.parametrize("quantize", QUANTIZE)
@torch.no_grad()
def test_is_the_model_quantised_after_loading(folder: tuple[Path, Any], quantize: Any) -> None:
    path, expected = folder
    assert len(list(path.glob("*.safetensors"))) > 2
    model = load_model(path, quantize=quantize)
    quantize_model(expected, quantize)
    assert torch.equal(model(text()).logits, expected(text()).logits)
    assert isinstance(model.model.embed_tokens, QuantizedEmbedding)
    assert isinstance(model.lm_head, QuantizedLinear)
    assert not model.training
    assert ahn.models.base_name(model) == str(path)


def test_no_file_stays_open_for_a_second_tensor(folder: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """An open file is mapped, and what was read of it stays in memory."""
    real, taken = filling.safe_open, []

    class Counted:
        def __init__(self, *args: Any, **options: Any) -> None:
            self.opened = real(*args, **options)

        def __enter__(self) -> Any:
            taken.append(0)
            return self

        def __exit__(self, *args: Any) -> None:
            self.opened.__exit__(*args)

        def keys(self) -> Any:
            return self.opened.keys()

        def get_tensor(self, name: str) -> torch.Tensor:
            taken[-1] += 1
            return self.opened.get_tensor(name)

    monkeypatch.setattr(filling, "safe_open", Counted)
    load_model(folder[0], quantize="int8")
    assert max(taken) == 1
    assert sum(taken) > 10


@torch.no_grad()
def test_half_precision_checkpoint_is_taken_exactly(tmp_path: Path) -> None:
    tiny("llama", **WIDE).bfloat16().save_pretrained(tmp_path)
    torch.testing.assert_close(
        load_model(tmp_path, quantize="bf16")(text()).logits, load_model(tmp_path)(text()).logits, atol=1e-4, rtol=1e-4
    )


@torch.no_grad()
def test_names_that_transformers_changes_are_read_by_transformers(tmp_path: Path) -> None:
    expected = tiny("llama", **WIDE, tie_word_embeddings=True)
    expected.model.save_pretrained(tmp_path)  # without the prefix, as AutoModel saves
    model = load_model(tmp_path, quantize="int8")
    quantize_model(expected, "int8")
    torch.testing.assert_close(model(text()).logits, expected(text()).logits)


@pytest.mark.parametrize("quantize", QUANTIZE)
def test_is_not_saved_whole(folder: tuple[Path, Any], tmp_path: Path, quantize: Any) -> None:
    model, target = load_model(folder[0], quantize=quantize), tmp_path / "saved"
    attached = load_model(folder[0], quantize=quantize)
    ahn.attach(attached, ahn.AHNConfig(window=8, sinks=2))
    detached = copy.deepcopy(attached)
    ahn.detach(detached)
    for each in (model, attached, detached, copy.deepcopy(model)):
        with pytest.raises(ModelError, match=r"ahn\.save"):
            each.save_pretrained(target)
    assert not target.exists()
    ahn.save(attached, target)
    assert ahn.checkpoint.describe(target).memory == "gated_delta_net"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"quantize": "int3"}, "int4, int8, bf16"),
        ({"quantize": "int4", "device_map": "cpu"}, "device_map"),
        ({"quantize": "int4", "dtype": "bfloat16"}, "leave dtype out"),
    ],
    ids=str,
)
def test_wrong_options(folder: tuple[Path, Any], options: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelError, match=says):
        load_model(folder[0], **options)


def test_missing_weights(folder: tuple[Path, Any]) -> None:
    sorted(folder[0].glob("*.safetensors"))[0].unlink()
    with pytest.raises(ModelError):
        load_model(folder[0], quantize="int8")


@pytest.mark.slow
@torch.no_grad()
def test_smollm2_keeps_its_blocks() -> None:
    model = load_model("smollm2-135m", quantize="int4")
    layer = model.model.layers[0].mlp.down_proj
    assert layer.stored.bits == 4
    assert layer.stored.halved
    assert model.lm_head.stored is model.model.embed_tokens.stored
    assert ahn.models.base_name(model) == "smollm2-135m"
    assert sum(buffer.nbytes for buffer in model.buffers()) < 100 * 2**20
