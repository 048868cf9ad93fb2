"""Adapters: what was saved comes back bit for bit, and a damaged or foreign one changes nothing."""

import dataclasses
import json
import os
import re
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ahn
from ahn import checkpoint
from ahn.attachment import attachment_of, find_attachment
from ahn.checkpoint import adapter, files
from ahn.checkpoint.content import BaseInfo, memory_tensors
from ahn.config import USUAL_ANCHORS
from ahn.errors import AHNError, CheckpointError, ConfigError, ModelError
from tests.tiny import awaken, give_score_weights, read, text, tiny, with_memory

REMEDY = re.compile(r".+: .+\. [A-Z].+\.")


def weights(model: Any) -> dict[str, torch.Tensor]:
    """A copy of a model's whole state."""
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def memories(model: Any) -> dict[str, torch.Tensor]:
    return {key: tensor.detach().clone() for key, tensor in memory_tensors(model).items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Whether two states are equal to the bit."""
    return left.keys() == right.keys() and all(
        left[key].dtype == right[key].dtype and torch.equal(left[key], right[key]) for key in left
    )


def check_message(error: AHNError) -> None:
    """An error is one line that ends with what to do."""
    assert REMEDY.fullmatch(str(error)), str(error)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models as small as these are faster without a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base() -> Any:
    """A base model that no test changes."""
    return tiny()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter for `base`."""
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    checkpoint.save(with_memory(), folder)
    return folder


@pytest.fixture(scope="module")
def model_folder(base: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That base model in a folder."""
    folder = tmp_path_factory.mktemp("base") / "model"
    base.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of that adapter, to be spoiled."""
    shutil.copytree(saved, tmp_path / "adapter")
    return tmp_path / "adapter"


class TestRoundTrip:
    @pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
    def test_weights_settings_and_outputs(self, family: str, memory: str, tmp_path: Path) -> None:
        model = with_memory(family, memory)
        expected = read(model, text(tokens=40))
        checkpoint.save(model, tmp_path)
        other = tiny(family)
        checkpoint.load(other, tmp_path)
        assert same(memories(other), memories(model))
        assert attachment_of(other).config == attachment_of(model).config
        assert torch.equal(read(other, text(tokens=40)), expected)

    @pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
    def test_others_may_read_what_the_umask_lets_them(self, saved: Path) -> None:
        umask = os.umask(0o022)
        os.umask(umask)
        assert {file.stat().st_mode & 0o777 for file in saved.iterdir()} == {0o666 & ~umask}

    @pytest.mark.parametrize(
        "settings",
        [{"layers": (0, 2)}, {"memory_positions": "none"}, {"sink_positions": "bounded"}],
        ids=lambda settings: next(iter(settings)),
    )
    def test_settings(self, settings: dict[str, Any], tmp_path: Path) -> None:
        model = with_memory(**settings)
        checkpoint.save(model, tmp_path)
        other = tiny()
        checkpoint.load(other, tmp_path)
        assert attachment_of(other).config == attachment_of(model).config
        assert torch.equal(read(other, text(tokens=40)), read(model, text(tokens=40)))

    def test_onto_an_attached_memory_keeps_the_settings_of_the_run(self, saved: Path) -> None:
        model = tiny()
        config = ahn.AHNConfig(window=9, sinks=2, sink_positions="bounded")
        ahn.attach(model, config)
        checkpoint.load(model, saved)
        assert attachment_of(model).config == config
        assert same(memories(model), memories(with_memory()))

    def test_saves_nothing_of_the_base_model(self, saved: Path) -> None:
        assert sorted(file.name for file in saved.iterdir()) == ["README.md", "ahn.safetensors", "ahn_config.json"]
        keys = load_file(saved / "ahn.safetensors").keys()
        assert all(re.fullmatch(r"layers\.[012]\.[A-Za-z_.]+", key) for key in keys)
        values = json.loads((saved / "ahn_config.json").read_text())
        assert values["format_version"] == 1
        assert values["base"]["model_type"] == "llama"
        assert values["base"]["hidden_size"] == 32

    @pytest.mark.parametrize("dtype", ["bfloat16", torch.float16, "float32"], ids=str)
    def test_in_another_dtype(self, dtype: Any, tmp_path: Path) -> None:
        model = with_memory()
        checkpoint.save(model, tmp_path, dtype=dtype)
        wanted = getattr(torch, str(dtype).removeprefix("torch."))
        assert {tensor.dtype for tensor in load_file(tmp_path / "ahn.safetensors").values()} == {wanted}
        other = tiny()
        checkpoint.load(other, tmp_path)
        expected = {key: tensor.to(wanted).float() for key, tensor in memories(model).items()}
        assert same(memories(other), expected)

    def test_into_a_model_of_another_dtype(self, saved: Path) -> None:
        model = tiny().to(torch.bfloat16)
        checkpoint.load(model, saved)
        assert {tensor.dtype for tensor in memories(model).values()} == {torch.bfloat16}

    def test_keeps_the_parameters_and_what_they_require(self, saved: Path) -> None:
        model = with_memory()
        before = memory_tensors(model)
        checkpoint.load(model, saved)
        assert all(after is before[key] and after.requires_grad for key, after in memory_tensors(model).items())

    def test_replaces_an_older_adapter(self, folder: Path) -> None:
        model = with_memory(memory="mamba2")
        checkpoint.save(model, folder)
        assert checkpoint.describe(folder).memory == "mamba2"
        assert "| memory | mamba2 |" in (folder / "README.md").read_text()
        assert len(list(folder.iterdir())) == 3


class TestSavingIsAllOrNothing:
    @pytest.fixture
    def newer(self) -> Any:
        model = with_memory()
        with torch.no_grad():
            for parameter in memory_tensors(model).values():
                parameter.mul_(2)
        return model

    @pytest.mark.parametrize(("step", "survives"), [(1, "old"), (2, "old"), (3, "new")])
    @pytest.mark.parametrize("death", [KeyboardInterrupt, OSError])
    def test_dying_at_every_step(
        self, step: int, survives: str, death: type[BaseException], folder: Path, newer: Any
    ) -> None:
        old = memories(with_memory())
        calls = 0
        replace = os.replace

        def dies(*args: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == step:
                raise death("died")
            replace(*args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "replace", dies)
            with pytest.raises((KeyboardInterrupt, CheckpointError)):
                checkpoint.save(newer, folder)
        model = tiny()
        checkpoint.load(model, folder)
        assert same(memories(model), {"old": old, "new": memories(newer)}[survives])
        checkpoint.save(newer, folder)
        checkpoint.load(model, folder)
        assert same(memories(model), memories(newer))

    def test_dying_before_the_first_adapter_is_complete_leaves_none(self, tmp_path: Path) -> None:
        def dies(*args: Any) -> None:
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(adapter, "write_json", dies)
            with pytest.raises(KeyboardInterrupt):
                checkpoint.save(with_memory(), tmp_path)
        with pytest.raises(CheckpointError, match="neither"):
            checkpoint.load(tiny(), tmp_path)

    def test_leftovers_are_removed_once_they_are_old(self, folder: Path) -> None:
        old, young = folder / ".ahn-old.tmp", folder / ".ahn-young.tmp"
        for file in (old, young):
            file.touch()
        os.utime(old, (0, 0))
        checkpoint.save(with_memory(), folder)
        assert young.exists()
        assert not old.exists()

    def test_several_processes_may_save_the_same_weights(self, tmp_path: Path) -> None:
        model, errors = with_memory(), []

        def save() -> None:
            try:
                for _ in range(5):
                    checkpoint.save(model, tmp_path)
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=save) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        checkpoint.load(tiny(), tmp_path)

    def test_reading_while_it_is_saved_anew(self, folder: Path, newer: Any) -> None:
        """The config is read, then both files are replaced, then the weights are read."""
        original = files.read_json
        answers = iter([original(folder / "ahn_config.json")])
        checkpoint.save(newer, folder)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(adapter, "read_json", lambda file: next(answers, None) or original(file))
            model = tiny()
            checkpoint.load(model, folder)
        assert same(memories(model), memories(newer))


class TestSaveRefuses:
    def test_a_model_without_a_memory(self, base: Any, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=r"call ahn\.attach"):
            checkpoint.save(base, tmp_path / "new")
        assert not (tmp_path / "new").exists()

    def test_weights_that_are_not_finite_and_keeps_the_old(self, folder: Path) -> None:
        model = with_memory()
        attachment_of(model).layers[1].memory.o_proj.data[0, 0, 0] = float("nan")
        with pytest.raises(CheckpointError, match="diverged") as caught:
            checkpoint.save(model, folder)
        check_message(caught.value)
        checkpoint.load(tiny(), folder)

    def test_weights_that_its_dtype_cannot_hold(self, tmp_path: Path) -> None:
        model = with_memory()
        attachment_of(model).layers[1].memory.o_proj.data[0, 0, 0] = 1e6
        with pytest.raises(CheckpointError, match="float16 is too small"):
            checkpoint.save(model, tmp_path, dtype="float16")

    @pytest.mark.parametrize("dtype", ["int8", "float12", torch.int64], ids=str)
    def test_a_dtype_that_is_none(self, dtype: Any, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="Use float32, bfloat16, float16"):
            checkpoint.save(with_memory(), tmp_path, dtype=dtype)

    def test_a_place_that_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(CheckpointError) as caught:
            checkpoint.save(with_memory(), tmp_path / "file")
        check_message(caught.value)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Changes an adapter's tensors and makes its checksum right again."""
    content = adapter.read_adapter("adapter", folder)
    tensors = content.tensors()
    change(tensors)
    adapter.write_adapter(folder, content.config, content.base, tensors)


def rewrite_config(folder: Path, *path: str, value: Any) -> None:
    """Changes one value of an adapter's config."""
    values = json.loads((folder / "ahn_config.json").read_text())
    inner = values
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    (folder / "ahn_config.json").write_text(json.dumps(values))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


def resave_weights_only(folder: Path) -> None:
    tensors = load_file(folder / "ahn.safetensors")
    save_file({key: tensor * 2 for key, tensor in tensors.items()}, folder / "ahn.safetensors")


DAMAGED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / "ahn_config.json").unlink(), "neither ahn_config.json nor config.json"),
    "no weights": (lambda f: (f / "ahn.safetensors").unlink(), "ahn.safetensors is missing"),
    "weights cut off": (lambda f: cut(f / "ahn.safetensors"), "cut off"),
    "weights empty": (lambda f: (f / "ahn.safetensors").write_bytes(b""), "cut off"),
    "weights are a pickle": (lambda f: torch.save({}, f / "ahn.safetensors"), "no safetensors file"),
    "one bit differs": (lambda f: flip_a_bit(f / "ahn.safetensors"), "checksums differ"),
    "weights of another save": (resave_weights_only, "not the one that ahn_config.json was saved with"),
    "config is not JSON": (lambda f: (f / "ahn_config.json").write_text("{"), "cannot be read"),
    "config is a list": (lambda f: (f / "ahn_config.json").write_text("[]"), "no JSON object"),
    "config is not UTF-8": (lambda f: (f / "ahn_config.json").write_bytes(b"\xff\xfe"), "cannot be read"),
    "newer format": (lambda f: rewrite_config(f, "format_version", value=2), "format version is 2"),
    "no format": (lambda f: rewrite_config(f, "format_version", value=None), "format version is None"),
    "no checksum": (lambda f: rewrite_config(f, "weights", value=None), "no checksum"),
    "checksum is a path": (lambda f: rewrite_config(f, "weights", "sha256", value="../x"), "no checksum"),
    "unknown memory": (lambda f: rewrite_config(f, "config", "memory", value="hopfield"), "'hopfield'; known are"),
    "unknown setting": (lambda f: rewrite_config(f, "config", "colour", value=1), "unknown settings colour"),
    "no settings": (lambda f: rewrite_config(f, "config", value=None), "no settings of a memory"),
    "impossible window": (lambda f: rewrite_config(f, "config", "window", value=-1), "window must be"),
    "another memory's weights": (lambda f: rewrite_config(f, "config", "memory", value="mamba2"), "missing: layers"),
    "key missing": (lambda f: rewrite(f, lambda t: t.pop("layers.1.b_proj.weight")), r"layers\.1\.b_proj\.weight"),
    "layer missing": (lambda f: rewrite(f, lambda t: [t.pop(k) for k in [*t] if "s.2." in k]), "missing: layers"),
    "no tensors": (lambda f: rewrite(f, lambda t: t.clear()), "missing: layers"),
    "key surplus": (lambda f: rewrite(f, lambda t: t.update(lm_head=torch.ones(2))), "1 tensor is too many: lm_head"),
    "layer surplus": (
        lambda f: rewrite(f, lambda t: t.update({k.replace("s.2.", "s.3."): v.clone() for k, v in t.items()})),
        "too many: layers",
    ),
    "wrong shape": (
        lambda f: rewrite(f, lambda t: t.update({"layers.0.o_norm": torch.ones(9)})),
        r"\[9\] instead of \[8\]",
    ),
    "not a number": (lambda f: rewrite(f, lambda t: t["layers.0.A_log"].fill_(float("nan"))), "not finite"),
    "integers": (lambda f: rewrite(f, lambda t: t.update({"layers.0.A_log": torch.ones(4).long()})), "stored in I64"),
    "other family": (
        lambda f: rewrite_config(f, "base", "model_type", value="qwen2"),
        "made for a model with model_type qwen2, but this is a model with model_type llama",
    ),
    "other width": (lambda f: rewrite_config(f, "base", "hidden_size", value=64), "hidden_size 64"),
    "more layers than any model": (
        lambda f: rewrite_config(f, "base", "num_hidden_layers", value=10**30),
        "num_hidden_layers is 1000000",
    ),
    "other depth": (lambda f: rewrite_config(f, "base", "num_hidden_layers", value=4), "num_hidden_layers 4"),
    "other heads": (lambda f: rewrite_config(f, "base", "num_attention_heads", value=8), "num_attention_heads 8"),
    "other kv heads": (lambda f: rewrite_config(f, "base", "num_key_value_heads", value=4), "num_key_value_heads 4"),
    "other head size": (lambda f: rewrite_config(f, "base", "head_dim", value=16), "head_dim 16"),
}


class TestLoadRefuses:
    @pytest.fixture(autouse=True)
    def nothing_changes(self, base: Any) -> Iterator[None]:
        before, implementation = weights(base), base.config._attn_implementation
        yield
        assert find_attachment(base) is None
        assert same(weights(base), before)
        assert base.config._attn_implementation == implementation

    @pytest.mark.parametrize(("damage", "message"), DAMAGED.values(), ids=DAMAGED.keys())
    def test_a_damaged_or_foreign_adapter(
        self, damage: Callable[[Path], Any], message: str, folder: Path, base: Any
    ) -> None:
        damage(folder)
        with pytest.raises(CheckpointError, match=message) as caught:
            checkpoint.load(base, folder)
        check_message(caught.value)

    @pytest.mark.parametrize(
        "name",
        ["", "missing", "./missing", "missing/two", "smollm2-135m/no_such_memory", "../up", "a/b/c", "x.safetensors"],
    )
    def test_what_is_not_there(self, name: str, base: Any) -> None:
        with pytest.raises(CheckpointError) as caught:
            checkpoint.load(base, name)
        check_message(caught.value)

    def test_a_file(self, folder: Path, base: Any) -> None:
        with pytest.raises(CheckpointError, match="Give the folder") as caught:
            checkpoint.load(base, folder / "ahn.safetensors")
        check_message(caught.value)

    def test_a_base_model(self, base: Any, model_folder: Path) -> None:
        with pytest.raises(CheckpointError, match="holds no memory") as caught:
            checkpoint.load(base, model_folder)
        check_message(caught.value)

    def test_the_other_base_model_by_name(self, saved: Path, base: Any) -> None:
        other = tiny(hidden_size=48, num_key_value_heads=4)
        other.config._name_or_path = "someone/else"
        with pytest.raises(
            CheckpointError, match=r"made for .*hidden_size 32.* this is 'someone/else' with hidden_size 48"
        ):
            checkpoint.load(other, saved)
        assert find_attachment(other) is None

    @pytest.mark.parametrize(
        "settings",
        [{"memory": "delta_net"}, {"layers": (0, 1)}, {"memory_positions": "none"}],
        ids=lambda settings: next(iter(settings)),
    )
    def test_a_memory_of_another_kind_than_the_attached(self, settings: dict[str, Any], saved: Path) -> None:
        model = with_memory(**settings)
        before = weights(model)
        with pytest.raises(CheckpointError, match=r"ahn\.detach") as caught:
            checkpoint.load(model, saved)
        check_message(caught.value)
        assert same(weights(model), before)

    @pytest.mark.parametrize("case", ["key missing", "wrong shape", "not a number", "weights cut off"])
    def test_a_damaged_one_onto_an_attached_memory(self, case: str, folder: Path) -> None:
        model = with_memory()
        before = weights(model)
        DAMAGED[case][0](folder)
        with pytest.raises(CheckpointError):
            checkpoint.load(model, folder)
        assert same(weights(model), before)

    def test_values_too_large_for_the_model(self, folder: Path) -> None:
        rewrite(folder, lambda tensors: tensors["layers.0.o_proj"].fill_(1e6))
        model = tiny().to(torch.float16)
        with pytest.raises(CheckpointError, match="too large for the model's dtype") as caught:
            checkpoint.load(model, folder)
        check_message(caught.value)
        assert find_attachment(model) is None


class TestBaseNames:
    @pytest.mark.parametrize(
        ("saved_for", "loaded_onto", "warned"),
        [
            ("Qwen/Qwen2.5-3B", "Qwen/Qwen2.5-3B", False),
            ("Qwen/Qwen2.5-3B", "/models/qwen2.5-3b", False),
            ("Qwen/Qwen2.5-3B", "/cache/models--Qwen--Qwen2.5-3B/snapshots/0123abcd", False),
            ("Qwen/Qwen2.5-3B", "", False),
            ("", "Qwen/Qwen2.5-3B", False),
            ("Qwen/Qwen2.5-3B", "Qwen/Qwen2.5-3B-Instruct", True),
        ],
    )
    def test_another_name_is_a_warning(self, saved_for: str, loaded_onto: str, warned: bool, tmp_path: Path) -> None:
        model = with_memory()
        model.config._name_or_path = saved_for
        checkpoint.save(model, tmp_path)
        other = tiny()
        other.config._name_or_path = loaded_onto
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            checkpoint.load(other, tmp_path)
        assert [str(w.filename) for w in caught if "trained for" in str(w.message)] == [__file__] * warned

    def test_name_and_revision_are_saved(self, tmp_path: Path) -> None:
        model = with_memory()
        model.config._name_or_path, model.config._commit_hash = "owner/name", "0123abcd"
        checkpoint.save(model, tmp_path)
        description = checkpoint.describe(tmp_path)
        assert (description.base, description.base_revision) == ("owner/name", "0123abcd")


class TestNames:
    def test_of_shipped_adapters(self, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(files, "SHIPPED", tmp_path)
        shutil.copytree(saved, tmp_path / "smollm2-135m" / "gated_delta_net")
        assert files.shipped() == ["smollm2-135m/gated_delta_net"]
        model = tiny()
        checkpoint.load(model, "smollm2-135m/gated_delta_net")
        assert same(memories(model), memories(with_memory()))
        with pytest.raises(CheckpointError, match=r"\(smollm2-135m/gated_delta_net\)"):
            checkpoint.load(tiny(), "smollm2-135m/mamba2")

    def test_of_the_adapter_that_is_taken_for_a_model(
        self, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(files, "SHIPPED", tmp_path)
        assert files.shipped_for("some") is None
        for name in ("mamba2", "gated_delta_net", "hybrid"):
            shutil.copytree(saved, tmp_path / "some" / name)
            assert files.shipped_for("some") == (None if name == "mamba2" else f"some/{name}")

    def test_of_a_hub_id(self, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[Any] = []

        def snapshot_download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
            asked.append((name, revision, allow_patterns))
            return str(saved)

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        checkpoint.load(tiny(), "owner/name", revision="v2")
        assert asked == [("owner/name", "v2", ["*.json", "*.safetensors"])]

    def test_a_folder_wins_over_a_hub_id(self, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        shutil.copytree(saved, tmp_path / "owner" / "name")
        monkeypatch.chdir(tmp_path)
        checkpoint.load(tiny(), "owner/name")


class TestFromPretrained:
    def test_a_base_model_alone(self, model_folder: Path, base: Any) -> None:
        model = checkpoint.from_pretrained(model_folder)
        assert find_attachment(model) is None
        assert same(weights(model), weights(base))

    def test_with_settings(self, model_folder: Path) -> None:
        config = ahn.AHNConfig("mamba2", window=9, sinks=1)
        assert attachment_of(checkpoint.from_pretrained(model_folder, config=config)).config == config

    def test_with_an_adapter(self, model_folder: Path, saved: Path) -> None:
        model = checkpoint.from_pretrained(model_folder, saved)
        assert torch.equal(read(model, text(tokens=40)), read(with_memory(), text(tokens=40)))

    def test_with_both_the_settings_are_those_of_the_run(self, model_folder: Path, saved: Path) -> None:
        config = ahn.AHNConfig(window=9, sinks=1)
        model = checkpoint.from_pretrained(model_folder, saved, config)
        assert attachment_of(model).config == config
        assert same(memories(model), memories(with_memory()))

    def test_anchors_are_kept_where_there_are_weights_for_them(self, model_folder: Path, tmp_path: Path) -> None:
        def anchors(**options: Any) -> int:
            return attachment_of(checkpoint.from_pretrained(model_folder, tmp_path / "a", **options)).config.anchors

        model = with_memory(window=64)
        checkpoint.save(model, tmp_path / "a")
        assert anchors() == 0
        give_score_weights(model)
        checkpoint.save_anchors(model, tmp_path / "a")
        assert anchors() == USUAL_ANCHORS
        assert (anchors(anchors=0), anchors(anchors=7)) == (0, 7)
        config = ahn.AHNConfig(window=64, sinks=5, anchors=3)
        assert (anchors(config=config), anchors(config=config, anchors=0)) == (3, 0)
        assert anchors(config=ahn.AHNConfig(window=64, sinks=5)) == 0
        both = checkpoint.from_pretrained(model_folder, tmp_path / "a")
        read(both, text(tokens=300), 100, cache=(cache := ahn.HippocampalCache(both)))
        assert len(cache.anchor_tokens[0]) == USUAL_ANCHORS
        assert cache.settings.anchor_score == "learned"
        checkpoint.save(with_memory(window=64, anchors=5), tmp_path / "a")
        assert anchors() == 5
        checkpoint.save(with_memory(window=1), tmp_path / "a")
        assert anchors() == 0  # too short a window to choose any
        with pytest.raises(ConfigError, match=r"a config must be an ahn\.AHNConfig, not dict"):
            anchors(config={"window": 64})
        with pytest.raises(ConfigError, match=r"window is a setting of the memory: .*ahn\.AHNConfig\(window="):
            anchors(window=64)
        with pytest.raises(ModelError, match=r"unexpected keyword argument 'wndow'\. Leave that option out\.$"):
            anchors(wndow=64)
        for wrong in (-1, True, "7"):
            with pytest.raises(ConfigError, match="anchors must be a whole number of at least 0"):
                anchors(anchors=wrong)
        with pytest.raises(ConfigError, match="anchors need a window of at least"):
            anchors(anchors=4)

    def test_with_a_dtype(self, model_folder: Path, saved: Path) -> None:
        model = checkpoint.from_pretrained(model_folder, saved, dtype="bfloat16")
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}

    def test_a_bad_adapter_is_found_before_the_base_model_is_loaded(self, folder: Path) -> None:
        cut(folder / "ahn.safetensors")
        with pytest.raises(CheckpointError, match="cut off"):
            checkpoint.from_pretrained("no/such-model", folder)

    @pytest.mark.parametrize("name", ["", "no-such-model", "no/such-model", "./missing"])
    def test_no_such_base_model(self, name: str) -> None:
        with pytest.raises(ModelError):
            checkpoint.from_pretrained(name)

    def test_an_adapter_alone_names_its_base_model(self, model_folder: Path, tmp_path: Path) -> None:
        checkpoint.save(checkpoint.from_pretrained(model_folder, config=ahn.AHNConfig("mamba2", 9, 1)), tmp_path / "a")
        model = checkpoint.from_pretrained(tmp_path / "a")
        assert attachment_of(model).config == ahn.AHNConfig("mamba2", 9, 1)
        deep = checkpoint.from_pretrained(tmp_path, subfolder="a", config=ahn.AHNConfig("mamba2", 30, 2))
        assert attachment_of(deep).config == ahn.AHNConfig("mamba2", 30, 2)

    def test_an_adapter_that_names_no_base_model(self, saved: Path, model_folder: Path) -> None:
        with pytest.raises(CheckpointError, match=r"which base model it was made for\. Name the base model: ahn"):
            checkpoint.from_pretrained(saved)
        with pytest.raises(CheckpointError, match=r"it is an adapter, so it takes no adapter\. Name its base model"):
            checkpoint.from_pretrained(saved, adapter=saved)

    @pytest.mark.parametrize("subfolder", ["deep", "..", "../saved0"])
    def test_no_such_subfolder(self, subfolder: str, saved: Path) -> None:
        with pytest.raises(CheckpointError, match="it has no subfolder"):
            checkpoint.load(tiny(), saved, subfolder=subfolder)


class TestDescribe:
    def test_an_adapter(self, saved: Path) -> None:
        found = checkpoint.describe(saved)
        tensors = load_file(saved / "ahn.safetensors")
        assert (found.kind, found.memory, found.layers) == ("adapter", "gated_delta_net", (0, 1, 2))
        assert found.parameters == sum(tensor.numel() for tensor in tensors.values())
        assert found.weight_bytes == 4 * found.parameters
        assert (found.dtype, found.window, found.sinks, found.format_version) == ("float32", 16, 5, 1)
        assert found.base_sizes["hidden_size"] == 32
        json.dumps(dataclasses.asdict(found))

    def test_several_dtypes(self, folder: Path) -> None:
        rewrite(folder, lambda t: t.update({"layers.0.o_norm": t["layers.0.o_norm"].bfloat16()}))
        found = checkpoint.describe(folder)
        assert found.dtype == "bfloat16, float32"
        assert found.weight_bytes == 4 * found.parameters - 2 * 8

    @pytest.mark.parametrize("case", ["weights cut off", "weights of another save", "newer format", "unknown memory"])
    def test_refuses_a_damaged_one(self, case: str, folder: Path) -> None:
        damage, message = DAMAGED[case]
        damage(folder)
        with pytest.raises(CheckpointError, match=message) as caught:
            checkpoint.describe(folder)
        check_message(caught.value)


def test_base_of_a_model_with_separate_head_size_and_without() -> None:
    assert BaseInfo.of_model(tiny("qwen3")).head_dim == 8
    assert BaseInfo.of_model(tiny("qwen2")).head_dim == 8
    assert BaseInfo.of_model(tiny("gpt2")).num_key_value_heads == 4


def test_awakened_memories_are_not_zero() -> None:
    """The tests above would say little about a memory that adds nothing."""
    model = tiny()
    plain = read(model, text(tokens=40))
    ahn.attach(model, ahn.AHNConfig(window=16, sinks=5))
    awaken(model)
    assert not torch.allclose(read(model, text(tokens=40)), plain, atol=1e-3)
