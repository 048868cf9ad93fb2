"""Models of GGUF files: the weights and logits of the model that was written, and one line for what is wrong."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import ahn
from ahn import checkpoint
from ahn.errors import CheckpointError, ModelError
from ahn.models import load_config, load_model, load_tokenizer, resolve
from ahn.models.gguf import FAMILIES
from ahn.models.gguf_tokenizer import _SPLITS
from ahn.quantization import QuantizedLinear

HIDDEN, HEADS, KV_HEADS, HEAD, INNER, WORDS = 64, 4, 2, 16, 96, 300
TEXT = "It's 1234 words,\n\n  don't  you\tsee? Ünïcode 你好"


def pairs_from_halves(rows: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    return rows.reshape(heads, 2, len(rows) // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def small_model(architecture: str) -> Any:
    torch.manual_seed(3)
    config = AutoConfig.for_model(
        FAMILIES[architecture].model_type,
        vocab_size=WORDS,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        tie_word_embeddings=architecture in ("qwen3", "gemma"),
        pad_token_id=0,
        **({"sliding_window": None} if architecture in ("mistral", "phi3") else {}),
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.normal_(parameter, 0.5, 0.2)
        elif parameter.dim() == 2:
            torch.nn.init.normal_(parameter, 0, 0.2)
    return model


def write(path: Path, architecture: str = "llama", kind: str = "Q8_0", **changes: Any) -> Any:
    """Writes a small model, and gives back the model with the weights that the file holds."""
    model, writer = small_model(architecture), gguf.GGUFWriter(path, changes.get("named", architecture))
    for key, value in {
        "context_length": 128,
        "embedding_length": HIDDEN,
        "block_count": 2,
        "feed_forward_length": INNER,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.key_length": HEAD,
    }.items():
        if key != changes.get("without"):
            writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32(f"{architecture}.rope.freq_base", 5000.0)
    if changes.get("tokenizer", True):
        write_tokenizer(writer, changes.get("pre", "gpt-2"), changes.get("merges", ["1 2"]))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.PHI3 if architecture == "phi3" else gguf.MODEL_ARCH.QWEN3, 2)
    for name, parameter in model.named_parameters():
        stem, _, suffix = name.rpartition(".")
        data = parameter.detach().numpy()
        if FAMILIES[architecture].pairs and ("q_proj" in name or "k_proj" in name):
            data = pairs_from_halves(data, HEADS if "q_proj" in name else KV_HEADS)
        if FAMILIES[architecture].shifted_norms and "norm" in name:
            data = data + 1
        if data.ndim == 2:
            real_type = gguf.GGMLQuantizationType[kind]
            blocks = gguf.quantize(data, real_type)
            writer.add_tensor(f"{names.get_name(stem)}.{suffix}", blocks, raw_dtype=real_type)
            data = gguf.dequantize(blocks, real_type)
            if FAMILIES[architecture].pairs and ("q_proj" in name or "k_proj" in name):
                heads = HEADS if "q_proj" in name else KV_HEADS
                data = data.reshape(heads, len(data) // heads // 2, 2, -1).swapaxes(1, 2).reshape(data.shape)
            parameter.data = torch.from_numpy(np.ascontiguousarray(data))
        else:
            writer.add_tensor(f"{names.get_name(stem)}.{suffix}", np.ascontiguousarray(data))
    if extra := changes.get("extra"):
        writer.add_tensor(extra, np.ones(8, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def write_tokenizer(writer: Any, pre: str, merges: list[str]) -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = ["<s>", "</s>", "12", *sorted(ByteLevel.alphabet())]
    tokens += [f"unused{number}" for number in range(WORDS - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, *[1] * (WORDS - 2)])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    write(path)
    return path


@pytest.mark.parametrize("architecture", FAMILIES)
@torch.no_grad()
def test_is_the_model_that_was_written(tmp_path: Path, architecture: str) -> None:
    expected = write(tmp_path / "m.gguf", architecture)
    model = load_model(tmp_path / "m.gguf")
    ids = torch.randint(2, WORDS, (2, 20))
    torch.testing.assert_close(model(ids).logits, expected(ids).logits, atol=2e-4, rtol=1e-4)
    assert isinstance(model.model.layers[0].mlp.down_proj, QuantizedLinear)
    assert not any(parameter.is_meta for parameter in model.parameters())
    ahn.attach(model, ahn.AHNConfig(window=8, sinks=2))
    assert model(ids, use_cache=False).logits.isfinite().all()


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "BF16", "F16", "F32"])
@torch.no_grad()
def test_types_of_weights(tmp_path: Path, kind: str) -> None:
    expected = write(tmp_path / "m.gguf", kind=kind)
    ids = torch.randint(2, WORDS, (1, 20))
    got = load_model(tmp_path / "m.gguf")(ids).logits
    torch.testing.assert_close(got, expected(ids).logits, atol=2e-4, rtol=1e-4)


class TestTokenizer:
    @pytest.mark.parametrize("pre", _SPLITS)
    def test_round_trip(self, tmp_path: Path, pre: str) -> None:
        write(tmp_path / "m.gguf", pre=pre)
        tokenizer = load_tokenizer(tmp_path / "m.gguf")
        ids = tokenizer(TEXT)["input_ids"]
        assert tokenizer.decode(ids) == TEXT
        assert tokenizer.eos_token_id == tokenizer.pad_token_id == 1
        # "1 2" is a merge, which only rules that keep digits together may apply.
        assert (len(ids) == len(TEXT.encode()) - 1) == (pre not in ("smollm", "qwen2"))

    def test_merges_of_tokens_that_are_not_there(self, tmp_path: Path) -> None:
        write(tmp_path / "m.gguf", merges=["1 3"])
        with pytest.raises(ModelError, match="does not fit together"):
            load_tokenizer(tmp_path / "m.gguf")

    def test_none(self, tmp_path: Path) -> None:
        write(tmp_path / "m.gguf", tokenizer=False)
        with pytest.raises(ModelError, match="no tokenizer"):
            load_tokenizer(tmp_path / "m.gguf")

    def test_unknown_rule(self, tmp_path: Path) -> None:
        write(tmp_path / "m.gguf", pre="runes")
        with pytest.raises(ModelError, match="'runes'"):
            load_tokenizer(tmp_path / "m.gguf")


class TestNames:
    def test_a_file_is_a_model(self, file: Path) -> None:
        assert resolve(file) == str(file)
        assert load_config(file).hidden_size == HIDDEN

    def test_from_pretrained(self, file: Path) -> None:
        model = ahn.from_pretrained(file, config=ahn.AHNConfig(window=8, sinks=2))
        assert ahn.models.base_name(model) == str(file)

    def test_is_not_saved_or_merged(self, file: Path, tmp_path: Path) -> None:
        model = ahn.from_pretrained(file, config=ahn.AHNConfig(window=8, sinks=2))
        ahn.save(model, tmp_path / "memory")
        with pytest.raises(ModelError, match="stored in few bits"):
            model.save_pretrained(tmp_path / "whole")
        with pytest.raises(CheckpointError, match="GGUF file"):
            checkpoint.merge(file, tmp_path / "memory", tmp_path / "whole")
        assert not (tmp_path / "whole").exists()

    @pytest.mark.parametrize("options", [{"quantize": "int4"}, {"dtype": "bfloat16"}], ids=str)
    def test_what_does_not_go_with_it(self, file: Path, options: dict[str, Any]) -> None:
        with pytest.raises(ModelError, match="leave"):
            load_model(file, **options)


class TestBadFiles:
    @pytest.mark.parametrize("share", [0.0, 0.0005, 0.1, 0.5, 0.99])
    def test_cut_off(self, file: Path, tmp_path: Path, share: float) -> None:
        data = file.read_bytes()
        (tmp_path / "cut.gguf").write_bytes(data[: int(share * len(data))])
        with pytest.raises(ModelError, match="damaged, cut off"):
            load_model(tmp_path / "cut.gguf")

    @pytest.mark.parametrize("place", [8, 16])
    def test_counts_beyond_the_file(self, file: Path, tmp_path: Path, place: int) -> None:
        data = bytearray(file.read_bytes())
        data[place : place + 8] = (2**40).to_bytes(8, "little")
        (tmp_path / "count.gguf").write_bytes(data)
        with pytest.raises(ModelError, match="damaged, cut off"):
            load_model(tmp_path / "count.gguf")

    def test_unknown_type(self, file: Path, tmp_path: Path) -> None:
        data = bytearray(file.read_bytes())
        at = data.index(b"output_norm.weight") + len("output_norm.weight") + 4 + 8
        data[at : at + 4] = (99).to_bytes(4, "little")
        (tmp_path / "type.gguf").write_bytes(data)
        with pytest.raises(ModelError, match="99"):
            load_model(tmp_path / "type.gguf")

    def test_more_layers_than_the_file_holds(self, file: Path, tmp_path: Path) -> None:
        data = bytearray(file.read_bytes())
        at = data.index(b"llama.block_count") + len("llama.block_count") + 4
        data[at : at + 4] = (2**31).to_bytes(4, "little")
        (tmp_path / "layers.gguf").write_bytes(data)
        with pytest.raises(ModelError, match="incomplete"):
            load_model(tmp_path / "layers.gguf")

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"named": "runes"}, "architecture 'runes'"),
            ({"without": "embedding_length"}, "lacks llama.embedding_length"),
            ({"extra": "blk.0.runes.weight"}, "blk.0.runes"),
            ({"extra": "rope_freqs.weight"}, "scales its positions"),
        ],
        ids=str,
    )
    def test_what_cannot_be_read(self, tmp_path: Path, changes: dict[str, Any], says: str) -> None:
        write(tmp_path / "m.gguf", **changes)
        with pytest.raises(ModelError, match=says) as caught:
            load_model(tmp_path / "m.gguf")
        assert "\n" not in str(caught.value)
