"""The published format, in and out: what the published implementation wrote and computed is read and computed here."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ahn
from ahn import checkpoint
from ahn.attachment import attachment_of, find_attachment
from ahn.checkpoint import published
from ahn.checkpoint.content import memory_tensors
from ahn.checkpoint.files import stored_tensors, weight_files
from ahn.errors import CheckpointError, ModelError
from tests.checkpoint.test_checkpoint import check_message, one_thread, same, weights  # noqa: F401 (a fixture)
from tests.tiny import read, text, tiny, with_memory

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"
NAMES = sorted(folder.name for folder in GOLDEN.iterdir())
GATED, TIED = "qwen2_GatedDeltaNet", "qwen2_GatedDeltaNet_sinks128"
PREFIX = "model.layers.1.ahn.fn."


def values(folder: Path) -> dict[str, Any]:
    """A folder's config.json."""
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def ahn_only(name: str, folder: Path) -> Path:
    """A folder as it is released: the memory alone."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(GOLDEN / name / "config.json", folder)
    shutil.copy(GOLDEN / name / "ahn_only.safetensors", folder)
    return folder


def merged(name: str, folder: Path) -> Path:
    """A folder with base model and memory."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(GOLDEN / name / "config.json", folder)
    shutil.copy(GOLDEN / name / "model.safetensors", folder)
    return folder


def base_only(name: str, folder: Path) -> Path:
    """The base model of a golden folder as its authors would release it, with a tokenizer file."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = load_file(GOLDEN / name / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if ".ahn." not in k}, folder / "model.safetensors", {"format": "pt"})
    clean = published.clean_config(values(GOLDEN / name))
    (folder / "config.json").write_text(json.dumps({**clean, "sliding_window": 32768, "max_window_layers": 3}))
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def published_again(folder: Path) -> dict[str, torch.Tensor]:
    """A folder's tensors as they come back: the D that nobody reads is not kept and comes back as it starts."""
    file = folder / "model.safetensors" if (folder / "model.safetensors").is_file() else folder / "ahn_only.safetensors"
    return {key: torch.ones_like(t) if key.endswith(".D") else t for key, t in load_file(file).items()}


def golden(name: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / name / "io.safetensors")


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("name", NAMES)
class TestGolden:
    def test_merged_folder(self, name: str) -> None:
        model, expected = checkpoint.from_pretrained(GOLDEN / name), golden(name)
        assert not model.training
        tolerance = 2e-4 if name == TIED else 1e-4
        torch.testing.assert_close(
            logits(model, expected["input_ids"]), expected["prefill_logits"], rtol=0, atol=tolerance
        )

    def test_its_config_is_the_base_model_s_own(self, name: str) -> None:
        model = checkpoint.from_pretrained(GOLDEN / name)
        raw, config = values(GOLDEN / name), model.config.to_dict()
        assert attachment_of(model).config.window == raw["sliding_window"]
        assert attachment_of(model).config.sinks == raw["num_attn_sinks"]
        assert config["sliding_window"] is None
        assert set(config["layer_types"]) == {"full_attention"}
        assert config["rope_parameters"]["rope_theta"] == raw["rope_theta"]
        assert not {"loss_type", "num_attn_sinks", "fa_layer_ids", "_ahn_implementation"} & set(config)
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert tied == raw["tie_word_embeddings"]
        if "base_prefill_logits" in (expected := golden(name)):
            with ahn.mode(model, "full"):
                found = logits(model, expected["input_ids"])
            torch.testing.assert_close(found, expected["base_prefill_logits"], rtol=0, atol=1e-4)

    def test_memory_alone_onto_the_base_model(self, name: str, tmp_path: Path) -> None:
        model = checkpoint.from_pretrained(base_only(name, tmp_path / "base"))
        assert find_attachment(model) is None
        checkpoint.load(model, ahn_only(name, tmp_path / "released"))
        whole = checkpoint.from_pretrained(GOLDEN / name)
        assert same(weights(model), weights(whole))
        assert attachment_of(model).config == attachment_of(whole).config

    def test_converted_there_and_back(self, name: str, tmp_path: Path) -> None:
        released = ahn_only(name, tmp_path / "released")
        checkpoint.convert(released, tmp_path / "adapter")
        assert checkpoint.describe(tmp_path / "adapter").kind == "adapter"
        checkpoint.convert(tmp_path / "adapter", tmp_path / "back")
        assert same(load_file(tmp_path / "back" / "model.safetensors"), published_again(released))
        checkpoint.convert(tmp_path / "back", tmp_path / "again")
        for file in ("ahn.safetensors", "ahn_config.json"):
            assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "adapter" / file).read_bytes()

    def test_merged_again(self, name: str, tmp_path: Path) -> None:
        base = base_only(name, tmp_path / "base")
        checkpoint.convert(GOLDEN / name, tmp_path / "adapter", base=base)
        checkpoint.merge(base, tmp_path / "adapter", tmp_path / "merged")
        found = weight_files(tmp_path / "merged")
        tensors = {key: tensor for file in found for key, tensor in load_file(file).items()}
        assert same(tensors, published_again(GOLDEN / name))
        raw, new = values(GOLDEN / name), values(tmp_path / "merged")
        ours = ("_ahn_implementation", "_layer_implementation", "num_attn_sinks", "sliding_window", "fa_layer_ids")
        assert [new[key] for key in ours] == [raw[key] for key in ours]
        assert (tmp_path / "merged" / "tokenizer_config.json").is_file()
        model = checkpoint.from_pretrained(tmp_path / "merged")
        assert same(weights(model), weights(checkpoint.from_pretrained(GOLDEN / name)))


def test_greedy_generation_is_the_published_one() -> None:
    model, expected = checkpoint.from_pretrained(GOLDEN / TIED), golden(TIED)
    ids, wanted = expected["input_ids"], expected["generate_ids"]
    found = model.generate(ids, max_new_tokens=wanted.size(1) - ids.size(1), do_sample=False)
    assert torch.equal(found, wanted)


class TestVariations:
    def test_shards_with_an_index(self, tmp_path: Path) -> None:
        folder = ahn_only(GATED, tmp_path)
        tensors = sorted(load_file(folder / "ahn_only.safetensors").items())
        (folder / "ahn_only.safetensors").unlink()
        parts = {"model-1.safetensors": dict(tensors[::2]), "model-2.safetensors": dict(tensors[1::2])}
        for name, part in parts.items():
            save_file(part, folder / name)
        places = {key: name for name, part in parts.items() for key in part}
        checkpoint.describe(folder)  # all files that there are
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
        save_file({"other": torch.ones(1)}, folder / "unrelated.safetensors")
        assert checkpoint.describe(folder).parameters == checkpoint.describe(GOLDEN / GATED).parameters

    @pytest.mark.parametrize("exact", ["1", " 1 ,", [1], "1,1"], ids=str)
    def test_layers_with_full_attention(self, exact: Any, tmp_path: Path) -> None:
        folder = merged(GATED, tmp_path / "merged")
        (folder / "config.json").write_text(json.dumps({**values(folder), "fa_layer_ids": exact}))
        tensors = load_file(folder / "model.safetensors")
        kept = {key: tensor for key, tensor in tensors.items() if not key.startswith(PREFIX)}
        save_file(kept, folder / "model.safetensors", {"format": "pt"})
        model = checkpoint.from_pretrained(folder)
        assert attachment_of(model).config.layers == (0, 2)
        checkpoint.save(model, tmp_path / "adapter")
        checkpoint.convert(tmp_path / "adapter", tmp_path / "released")
        assert values(tmp_path / "released")["fa_layer_ids"] == "1"
        assert checkpoint.describe(tmp_path / "released").layers == (0, 2)

    def test_weights_of_layers_with_full_attention_are_left_out(self, tmp_path: Path) -> None:
        folder = merged(GATED, tmp_path)
        whole = read(checkpoint.from_pretrained(folder, config=ahn.AHNConfig(layers=None)), text(1, 8))
        (folder / "config.json").write_text(json.dumps({**values(folder), "fa_layer_ids": "1"}))
        with pytest.warns(UserWarning, match=r"memory for layers \[1\] too, which keep full attention"):
            model = checkpoint.from_pretrained(folder)
        assert attachment_of(model).config.layers == (0, 2)
        assert not [key for key in memory_tensors(model) if key.startswith("layers.1.")]
        torch.testing.assert_close(read(model, text(1, 8)), whole, rtol=0, atol=1e-5)  # within the window

    def test_a_run_may_choose_its_own_window(self) -> None:
        config = ahn.AHNConfig(window=9, sinks=2, sink_positions="bounded")
        model = checkpoint.from_pretrained(GOLDEN / GATED, config=config)
        assert attachment_of(model).config == config

    def test_scaled_rope_of_an_older_transformers(self, tmp_path: Path) -> None:
        folder = merged(GATED, tmp_path)
        scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
        (folder / "config.json").write_text(json.dumps({**values(folder), "rope_scaling": scaling}))
        found = checkpoint.from_pretrained(folder).config.rope_parameters
        assert (found["rope_type"], found["factor"], found["rope_theta"]) == ("yarn", 4.0, 10000.0)

    def test_dtype(self) -> None:
        model = checkpoint.from_pretrained(GOLDEN / GATED, dtype="bfloat16")
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}

    def test_other_families_merge_too(self, tmp_path: Path) -> None:
        model = with_memory("llama")
        checkpoint.save(model, tmp_path / "adapter")
        tiny("llama").save_pretrained(tmp_path / "base")
        checkpoint.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
        assert "_layer_implementation" not in values(tmp_path / "merged")
        again = checkpoint.from_pretrained(tmp_path / "merged")
        assert torch.equal(read(again, text(tokens=40)), read(model, text(tokens=40)))

    def test_a_merged_config_also_has_the_names_that_the_published_implementation_reads(self, tmp_path: Path) -> None:
        model = with_memory("qwen2", model={"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}})
        checkpoint.save(model, tmp_path / "adapter", dtype="float32")
        tiny("qwen2", rope_parameters={"rope_type": "default", "rope_theta": 5e5}).save_pretrained(tmp_path / "base")
        checkpoint.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
        found = values(tmp_path / "merged")
        assert (found["rope_theta"], found["rope_scaling"], found["torch_dtype"]) == (5e5, None, "float32")
        assert checkpoint.from_pretrained(tmp_path / "merged").config.rope_parameters["rope_theta"] == 5e5

    def test_merging_in_shards(self, tmp_path: Path) -> None:
        base = tiny("qwen3")
        base.save_pretrained(tmp_path / "base", max_shard_size="20KB")
        checkpoint.save(with_memory("qwen3"), tmp_path / "adapter")
        checkpoint.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
        files = weight_files(tmp_path / "merged")
        assert len(files) == len(weight_files(tmp_path / "base")) + 1 > 2
        index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == stored_tensors(files).keys()
        assert same(
            weights(checkpoint.from_pretrained(tmp_path / "merged")),
            weights(checkpoint.from_pretrained(tmp_path / "base", tmp_path / "adapter")),
        )

    def test_a_converted_memory_keeps_its_dtype(self, tmp_path: Path) -> None:
        checkpoint.save(checkpoint.from_pretrained(GOLDEN / GATED), tmp_path / "adapter", dtype="bfloat16")
        checkpoint.convert(tmp_path / "adapter", tmp_path / "released")
        assert checkpoint.describe(tmp_path / "released").dtype == "bfloat16"

    def test_the_base_is_named_when_it_is_given(self, tmp_path: Path) -> None:
        base = base_only(GATED, tmp_path / "base")
        checkpoint.convert(ahn_only(GATED, tmp_path / "released"), tmp_path / "adapter", base=base)
        assert checkpoint.describe(tmp_path / "adapter").base == str(base)
        checkpoint.convert(tmp_path / "adapter", tmp_path / "back", base=base)
        assert values(tmp_path / "back")["intermediate_size"] == 96

    @pytest.mark.parametrize("kind", ["published", "merged"])
    def test_describe(self, kind: str, tmp_path: Path) -> None:
        found = checkpoint.describe({"published": ahn_only, "merged": merged}[kind](GATED, tmp_path))
        assert (found.kind, found.memory, found.layers) == (kind, "gated_delta_net", (0, 1, 2))
        assert (found.window, found.sinks, found.dtype) == (16, 5, "float32")
        assert found.parameters == sum(t.numel() for t in memory_tensors(with_golden()).values())

    def test_a_hub_id(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[list[str]] = []

        def snapshot_download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
            asked.append(allow_patterns)
            return str(GOLDEN / GATED)

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        assert find_attachment(checkpoint.from_pretrained("owner/merged")) is not None
        assert asked == [["config.json", "ahn_config.json"], ["*.json", "*.safetensors"]]


def with_golden() -> Any:
    return checkpoint.from_pretrained(GOLDEN / GATED)


def set_value(key: str, value: Any) -> Callable[[Path], None]:
    return lambda folder: (folder / "config.json").write_text(json.dumps({**values(folder), key: value})) and None


def without_value(key: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        kept = {name: value for name, value in values(folder).items() if name != key}
        (folder / "config.json").write_text(json.dumps(kept))

    return change


def tensors_of(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (file,) = folder.glob("*.safetensors")
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, {"format": "pt"})

    return apply


def pickled(folder: Path) -> None:
    (folder / "ahn_only.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def index(**places: str) -> Callable[[Path], None]:
    return lambda folder: (
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places})) and None
    )


def cut(folder: Path) -> None:
    (file,) = folder.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])


MEMORY_DAMAGED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no mark": (without_value("_ahn_implementation"), "holds no memory"),
    "unknown memory": (set_value("_ahn_implementation", "Hopfield"), "'Hopfield'; known are"),
    "memory of ours alone": (set_value("_ahn_implementation", "linearized_attention"), "format has no memory"),
    "memory is a number": (set_value("_ahn_implementation", 3), "settings cannot be used"),
    "other memory": (set_value("_ahn_implementation", "Mamba2"), "missing: layers"),
    "surplus parameters": (set_value("_ahn_implementation", "DeltaNet"), "too many: layers"),
    "router": (set_value("use_ahn_router", True), "use_ahn_router"),
    "query projection": (set_value("use_q_proj", True), "use_q_proj"),
    "no window": (set_value("sliding_window", None), "window must be"),
    "layers out of range": (set_value("fa_layer_ids", "3"), "fa_layer_ids '3'"),
    "layers all exact": (set_value("fa_layer_ids", "0,1,2"), "fa_layer_ids"),
    "layers no numbers": (set_value("fa_layer_ids", "a"), "fa_layer_ids 'a'"),
    "no such layer is stored": (
        tensors_of(lambda t: t.update({k.replace("1", "7", 1): t[k].clone() for k in [*t] if PREFIX in k})),
        "too many: layers",
    ),
    "more layers than any model": (set_value("num_hidden_layers", 10**30), "num_hidden_layers is 1000000"),
    "layers below zero": (set_value("num_hidden_layers", -3), "num_hidden_layers is -3"),
    "a width that is no number": (set_value("hidden_size", "wide"), "hidden_size is 'wide'"),
    "no sizes": (without_value("num_hidden_layers"), "does not say the base model's num_hidden_layers"),
    "config is not JSON": (lambda f: (f / "config.json").write_text("{"), "cannot be read"),
    "no weights": (lambda f: (f / "ahn_only.safetensors").unlink(), r"holds no \*.safetensors"),
    "weights are a pickle": (pickled, "pytorch_model.bin is a pickle"),
    "weights cut off": (cut, "cut off"),
    "key twice": (lambda f: shutil.copy(f / "ahn_only.safetensors", f / "b.safetensors"), "is in ahn_only.safetensors"),
    "shard missing": (index(key="gone.safetensors"), "gone.safetensors is missing"),
    "index with a path": (index(key="../other.safetensors"), "names no files"),
    "index empty": (index(), "names no files"),
    "key missing": (tensors_of(lambda t: t.pop(PREFIX + "o_norm.weight")), "missing: layers"),
    "key surplus": (tensors_of(lambda t: t.update({PREFIX + "extra": torch.ones(1)})), "too many: layers"),
    "key of a router": (
        tensors_of(lambda t: t.update({"model.layers.1.ahn.router.weight": torch.ones(1)})),
        "router.weight belongs to no memory",
    ),
    "layer missing": (tensors_of(lambda t: [t.pop(k) for k in [*t] if "layers.2." in k]), "missing: layers"),
    "no memory": (tensors_of(lambda t: (t.clear(), t.update(other=torch.ones(1)))), "hold no memory"),
    "not a number": (tensors_of(lambda t: t[PREFIX + "A_log"].fill_(float("inf"))), "not finite"),
    "wrong shape": (tensors_of(lambda t: t.update({PREFIX + "o_norm.weight": torch.ones(9)})), "instead of"),
    "other family": (set_value("model_type", "qwen3"), "model_type qwen3"),
    "other width": (set_value("hidden_size", 128), "hidden_size 128"),
}


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base model of the golden folder `GATED`."""
    return base_only(GATED, tmp_path_factory.mktemp("published") / "base")


@pytest.fixture(scope="module")
def base(base_folder: Path) -> Any:
    """That model, which no test changes."""
    return checkpoint.from_pretrained(base_folder)


@pytest.mark.parametrize(("damage", "message"), MEMORY_DAMAGED.values(), ids=MEMORY_DAMAGED.keys())
def test_a_damaged_memory_changes_nothing(
    damage: Callable[[Path], Any], message: str, tmp_path: Path, base: Any
) -> None:
    before = weights(base)
    folder = ahn_only(GATED, tmp_path)
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.load(base, folder)
    check_message(caught.value)
    assert find_attachment(base) is None
    assert same(weights(base), before)


MERGED_DAMAGED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "base key missing": (tensors_of(lambda t: t.pop("model.norm.weight")), r"1 tensor is missing: model\.norm\.weight"),
    "base key surplus": (
        tensors_of(lambda t: t.update({"model.extra": torch.ones(1)})),
        r"1 tensor is too many: model\.extra",
    ),
    "base of another shape": (
        tensors_of(lambda t: t.update({"model.norm.weight": torch.ones(9)})),
        r"\[9\] instead of \[64\]",
    ),
    "memory key missing": (tensors_of(lambda t: t.pop(PREFIX + "A_log")), "missing: layers"),
    "memory of another shape": (tensors_of(lambda t: t.update({PREFIX + "A_log": torch.ones(9)})), "instead of"),
    "memory not a number": (tensors_of(lambda t: t[PREFIX + "A_log"].fill_(float("nan"))), "not finite"),
    "unknown family": (set_value("model_type", "qwen99"), "transformers can use"),
    "impossible config": (set_value("hidden_act", 3), "transformers can use"),
    "cut off": (cut, "cut off"),
}


@pytest.mark.parametrize(("damage", "message"), MERGED_DAMAGED.values(), ids=MERGED_DAMAGED.keys())
def test_a_damaged_merged_folder(damage: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    folder = merged(GATED, tmp_path)
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.from_pretrained(folder)
    check_message(caught.value)


class TestFromPretrainedRefuses:
    def test_the_memory_alone(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="without its base model") as caught:
            checkpoint.from_pretrained(ahn_only(GATED, tmp_path))
        check_message(caught.value)

    def test_an_adapter_on_top(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="merged with a memory already") as caught:
            checkpoint.from_pretrained(GOLDEN / GATED, ahn_only(GATED, tmp_path))
        check_message(caught.value)

    @pytest.mark.parametrize(
        "settings",
        [{"memory": "mamba2"}, {"memory_positions": "none"}, {"layers": (0,)}],
        ids=lambda settings: next(iter(settings)),
    )
    def test_another_kind_of_memory(self, settings: dict[str, Any]) -> None:
        with pytest.raises(CheckpointError) as caught:
            checkpoint.from_pretrained(GOLDEN / GATED, config=ahn.AHNConfig(**settings))
        check_message(caught.value)


class TestToolsRefuse:
    """Each leaves no target behind."""

    @pytest.fixture
    def adapter(self, tmp_path: Path) -> Path:
        checkpoint.convert(ahn_only(GATED, tmp_path / "released"), tmp_path / "adapter")
        return tmp_path / "adapter"

    def refused(self, call: Callable[[], None], message: str, target: Path) -> None:
        there = sorted(target.iterdir()) if target.is_dir() else None
        with pytest.raises(CheckpointError, match=message) as caught:
            call()
        check_message(caught.value)
        assert (sorted(target.iterdir()) if target.is_dir() else None) == there
        assert not list(target.parent.glob(f".{target.name}*"))

    @pytest.mark.parametrize("to", ["published", "adapter"])
    def test_converting_to_what_it_is(self, to: Any, adapter: Path, tmp_path: Path) -> None:
        source = {"published": tmp_path / "released", "adapter": adapter}[to]
        target = tmp_path / "target"
        self.refused(lambda: checkpoint.convert(source, target, to=to), "format already", target)

    def test_converting_to_an_unknown_format(self, adapter: Path, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="Use adapter or published"):
            checkpoint.convert(adapter, tmp_path / "target", to="gguf")  # type: ignore[arg-type]

    def test_an_occupied_target(self, adapter: Path, base_folder: Path, tmp_path: Path) -> None:
        for target in (adapter, tmp_path / "released"):
            self.refused(lambda target=target: checkpoint.convert(adapter, target), "exists already", target)
            self.refused(lambda target=target: checkpoint.merge(base_folder, adapter, target), "exists already", target)

    def test_an_adapter_beside_a_model(self, adapter: Path, tmp_path: Path) -> None:
        source = tmp_path / "released"
        self.refused(lambda: checkpoint.convert(source, source), "config.json of its own", source)

    @pytest.mark.parametrize("base", ["other sizes", "merged", "pickle", "other keys", "sliding"])
    def test_a_base_model_that_cannot_be_merged(self, base: str, adapter: Path, tmp_path: Path) -> None:
        folder = base_only(GATED, tmp_path / "base")
        message = {
            "other sizes": "hidden_size 128",
            "merged": "not a base model",
            "pickle": "is a pickle",
            "other keys": r"model\.layers\.N",
            "sliding": "slide over a window",
        }[base]
        if base == "other sizes":
            set_value("hidden_size", 128)(folder)
        elif base == "merged":
            set_value("_ahn_implementation", "Mamba2")(folder)
        elif base == "pickle":
            (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        elif base == "sliding":
            (folder / "config.json").write_text(
                json.dumps({**values(folder), "use_sliding_window": True, "max_window_layers": 0})
            )
        else:
            tensors = load_file(folder / "model.safetensors")
            save_file({"x." + key: tensor for key, tensor in tensors.items()}, folder / "model.safetensors")
        target = tmp_path / "target"
        self.refused(lambda: checkpoint.merge(folder, adapter, target), message, target)

    def test_a_memory_that_the_format_cannot_express(self, tmp_path: Path) -> None:
        checkpoint.save(with_memory("qwen2", memory_positions="none"), tmp_path / "adapter")
        target = tmp_path / "target"
        self.refused(lambda: checkpoint.convert(tmp_path / "adapter", target), "memory_positions", target)

    def test_a_memory_that_the_format_does_not_have(self, tmp_path: Path) -> None:
        checkpoint.save(with_memory("qwen2", "linearized_attention"), tmp_path / "adapter")
        target, message = tmp_path / "target", "has no memory 'linearized_attention', only gated_delta_net, delta_net"
        self.refused(lambda: checkpoint.convert(tmp_path / "adapter", target), message, target)

    def test_an_adapter_that_does_not_know_its_base(self, adapter: Path, tmp_path: Path) -> None:
        raw = json.loads((adapter / "ahn_config.json").read_text())
        (adapter / "ahn_config.json").write_text(json.dumps({**raw, "base": {}}))
        target = tmp_path / "target"
        self.refused(lambda: checkpoint.convert(adapter, target), "does not say the base model's", target)
        checkpoint.convert(adapter, target, base=base_only(GATED, tmp_path / "base"))
        assert checkpoint.describe(target).kind == "published"

    def test_a_target_that_cannot_be_written(self, adapter: Path, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        target = tmp_path / "file" / "target"
        self.refused(lambda: checkpoint.convert(adapter, target), "cannot be written", target)

    def test_no_such_base_model(self, adapter: Path, tmp_path: Path) -> None:
        with pytest.raises(ModelError):
            checkpoint.merge("no-such-model", adapter, tmp_path / "target")
