"""A whole training, from settings to table and plot, killed on the way and gone on with."""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

import ahn
from ahn import checkpoint
from ahn.attachment import attachment_of
from ahn.checkpoint.content import memory_tensors
from ahn.errors import AHNError, ConfigError
from ahn.training.model_card import write_training_card
from ahn.training.report import PLOT
from ahn.training.run import train
from ahn.training.settings import TrainSettings, read_yaml, write_yaml
from ahn.training.trainer import AHNTrainer
from tests.tiny import with_memory
from tests.training.common import write_base


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model and texts."""
    folder = tmp_path_factory.mktemp("run")
    write_base(folder / "base")
    (folder / "texts").mkdir()
    for number in range(6):
        words = " ".join(f"{word * (number + 3) % 97}" for word in range(120))
        (folder / "texts" / f"{number}.txt").write_text(words)
    return folder


def settings(place: Path, out: Path, **changes: Any) -> TrainSettings:
    values: dict[str, Any] = {
        "data": [str(place / "texts")],
        "out": str(out),
        "base": str(place / "base"),
        "dtype": "float32",
        "stages": ["transfer", "distill"],
        "transfer_steps": 3,
        "steps": 5,
        "length": 64,
        "min_length": 48,
        "window": 12,
        "sinks": 4,
        "totals": [16, 24],
        "sink_counts": [0, 4],
        "accumulation": 2,
        "held_out": 0.2,
        "save_every": 2,
        "log_every": 1,
        "report_tokens": 256,
        "licence": "mit",
        "arguments": {"use_cpu": True},
    }
    return TrainSettings.from_dict({**values, **changes})


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """A training that nothing disturbed."""
    train(settings(place, place / "whole"))
    return place / "whole"


def test_a_base_in_few_bits_stays_frozen(place: Path, tmp_path: Path) -> None:
    outcome = train(settings(place, tmp_path / "out", quantize="int4", stages=["distill"], steps=2, transfer_steps=1))
    assert outcome.report is not None
    assert all(map(math.isfinite, outcome.report.nll.values()))
    assert checkpoint.describe(tmp_path / "out").memory == "gated_delta_net"


def test_a_base_in_few_bits_has_no_other_dtype(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dtype=bfloat16"):
        settings(place, tmp_path / "out", quantize="int4", dtype="bfloat16")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"report_tokens": 0}, []),
        ({"held_out": 0.0}, ["no closing table: no text is held out"]),
        ({"window": 70, "totals": [16]}, ["no closing table: no held-out text is longer than sinks and window"]),
    ],
)
def test_why_there_is_no_closing_table(
    changes: dict[str, Any], expected: list[str], place: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    few = {"stages": ["transfer"], "transfer_steps": 1}
    assert train(settings(place, tmp_path / "out", **few, **changes), say=said.append).report is None
    assert [line for line in said if "closing table" in line] == expected


@pytest.mark.parametrize("name", ["output_dir", "max_steps", "seed", "save_steps", "remove_unused_columns"])
def test_arguments_cannot_take_the_place_of_settings(name: str, place: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"arguments must not name {name}, which other settings decide"):
        train(settings(place, tmp_path / "out", arguments={name: "3"}))
    assert list(tmp_path.iterdir()) == []


def test_a_refused_training_leaves_no_folder(place: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    checkpoint.save(with_memory("llama"), tmp_path / "another")
    for changes in ({"data": [str(tmp_path / "empty.txt")]}, {"adapter": str(tmp_path / "another")}):
        with pytest.raises(AHNError):
            train(settings(place, tmp_path / "out", **changes))
        assert not (tmp_path / "out").exists()


def test_what_is_written(whole: Path, place: Path) -> None:
    assert {path.name for path in whole.iterdir()} == {
        "ahn.safetensors", "ahn_config.json", "train.yaml", "report.json", PLOT, "README.md", "transfer",
        "distill",
    }  # fmt: skip
    written = TrainSettings.from_dict(read_yaml(whole / "train.yaml"))
    assert written == settings(place, whole, precision=written.precision)  # which was measured
    assert written.precision != "auto"
    for stage, steps in (("transfer", 3), ("distill", 5)):
        log = json.loads((whole / stage / "trainer_state.json").read_text())["log_history"]
        assert [line["step"] for line in log if "eval_loss" in line] == [0, steps]
    report = json.loads((whole / "report.json").read_text())
    assert set(report["nll"]) == {"full", "window", "ahn"}
    assert (report["window"], report["sinks"], report["memory"]) == (12, 4, "gated_delta_net")
    assert report["tokens"] > 0
    assert (whole / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "memory" not in json.loads((place / "base" / "config.json").read_text())


def test_the_model_card(whole: Path, place: Path, tmp_path: Path) -> None:
    card = ModelCard.load(whole / "README.md")
    assert (card.data.library_name, card.data.license, card.data.datasets) == ("ahn", "mit", None)
    report = json.loads((whole / "report.json").read_text())
    for mode, nll in report["nll"].items():
        assert f"| {mode} | {nll:.4f} | {math.exp(nll):.3f} |" in card.text
    assert "| steps | 3 of transfer, 5 of distill |" in card.text
    assert str(place / "texts") not in card.text
    own = "# A text of somebody's own\n"
    (tmp_path / "README.md").write_text(own)
    named = settings(place, tmp_path, data=["owner/texts"])
    assert not write_training_card(with_memory("llama"), named, None, tmp_path)
    assert (tmp_path / "README.md").read_text() == own
    (tmp_path / "README.md").unlink()
    assert write_training_card(with_memory("llama"), named, None, tmp_path)
    assert ModelCard.load(tmp_path / "README.md").data.datasets == ["owner/texts"]


def test_the_weights_can_be_used(whole: Path, place: Path) -> None:
    model = ahn.from_pretrained(place / "base", whole)
    assert attachment_of(model).config == ahn.AHNConfig("gated_delta_net", 12, 4)
    assert any(tensor.abs().max() > 0 for name, tensor in memory_tensors(model).items() if name.endswith("o_proj"))


def killed_training(folder: Path, where: str, when: int) -> None:
    """A training that goes on, killed at the `when`-th call of a function."""
    owner, name = {"step": (AHNTrainer, "compute_loss"), "save": (torch, "save"), "replace": (os, "replace")}[where]
    function, calls = getattr(owner, name), itertools.count(1)

    def deadly(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == when:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    setattr(owner, name, deadly)
    train(TrainSettings.from_dict(read_yaml(folder / "train.yaml")), resume=True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a process that starts as a copy of this one")
def test_killed_again_and_again_it_ends_with_the_same_weights(whole: Path, place: Path, tmp_path: Path) -> None:
    """SIGKILL in a step, in the middle of a save, and while a file takes its name."""
    write_yaml(settings(place, tmp_path / "out"), tmp_path / "train.yaml")
    reached: list[list[str]] = []
    for where, when in [("step", 3), ("save", 2), ("replace", 14), ("save", 5)]:
        process = multiprocessing.get_context("fork").Process(target=killed_training, args=(tmp_path, where, when))
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL
        reached.append(sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("checkpoint-*")))
    assert all(any(".saving" in name for name in names) for names in reached[1:])  # they died while saving
    train(settings(place, tmp_path / "out"), resume=True)
    expected, actual = (load_file(folder / "ahn.safetensors") for folder in (whole, tmp_path / "out"))
    assert expected.keys() == actual.keys()
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []
    logs = [json.loads((folder / "distill" / "trainer_state.json").read_text()) for folder in (whole, tmp_path / "out")]
    losses = [[line["loss"] for line in log["log_history"] if "loss" in line] for log in logs]
    assert losses[0] == losses[1]


class TestGoingOn:
    def test_a_folder_in_use_is_not_touched(self, whole: Path, place: Path) -> None:
        before = (whole / "ahn.safetensors").read_bytes()
        with pytest.raises(ConfigError, match=r"is not empty.*--resume"):
            train(settings(place, whole))
        assert (whole / "ahn.safetensors").read_bytes() == before

    @pytest.mark.parametrize("name", ["optimizer.pt", "every"])
    def test_a_damaged_checkpoint_is_left_out(self, whole: Path, place: Path, tmp_path: Path, name: str) -> None:
        """The run goes on from the checkpoint before, or from the start, and ends with the same weights."""
        shutil.copytree(whole, tmp_path / "out")
        for file in [*(tmp_path / "out").glob("*.safetensors"), *(tmp_path / "out").glob("**/ahn_config.json")]:
            if file.parent.name in ("out", "distill"):
                file.unlink()
        found = sorted((tmp_path / "out" / "distill").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
        assert len(found) > 1
        for damaged in found if name == "every" else found[-1:]:
            file = damaged / ("trainer_state.json" if name == "every" else name)
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        said: list[str] = []
        train(settings(place, tmp_path / "out", report_tokens=0), resume=True, say=said.append)
        assert sum("is damaged and left out" in line for line in said) == (len(found) if name == "every" else 1)
        expected, actual = (load_file(folder / "ahn.safetensors") for folder in (whole, tmp_path / "out"))
        assert [key for key in expected if not torch.equal(actual[key], expected[key])] == []

    def test_other_settings_are_refused(self, whole: Path, place: Path) -> None:
        with pytest.raises(ConfigError, match=r"was begun with lr = 0\.0001, not 0\.5"):
            train(settings(place, whole, lr=0.5), resume=True)

    def test_a_folder_of_something_else(self, place: Path) -> None:
        with pytest.raises(ConfigError, match=r"holds no train\.yaml"):
            train(settings(place, place / "texts"), resume=True)

    def test_a_finished_training_stays_as_it_is(self, whole: Path, place: Path) -> None:
        before = (whole / "ahn.safetensors").read_bytes()
        said: list[str] = []
        train(settings(place, whole, report_tokens=0), resume=True, say=said.append)
        assert (whole / "ahn.safetensors").read_bytes() == before
        assert "distill: done before" in said


def test_weights_to_start_from(whole: Path, place: Path, tmp_path: Path) -> None:
    changes = {"adapter": str(whole), "stages": ["distill"], "steps": 1, "lr": 1e-12, "report_tokens": 0}
    train(settings(place, tmp_path / "out", **changes))
    before, after = (load_file(folder / "ahn.safetensors") for folder in (whole, tmp_path / "out"))
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-6)


def test_weights_of_another_memory_to_start_from(whole: Path, place: Path, tmp_path: Path) -> None:
    changes = {"adapter": str(whole), "memory": "delta_net", "stages": ["distill"], "steps": 1, "lr": 1e-12}
    said: list[str] = []
    train(settings(place, tmp_path / "out", report_tokens=0, **changes), say=said.append)
    assert f"from {whole}: b_proj.weight, g_proj.weight, o_norm, o_proj" in said
    before, after = (load_file(folder / "ahn.safetensors") for folder in (whole, tmp_path / "out"))
    assert after.keys() < before.keys()
    for name, tensor in after.items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=1e-6)


def test_weights_for_some_layers_and_a_closed_form_for_the_others(whole: Path, place: Path, tmp_path: Path) -> None:
    changes = {"adapter": str(whole), "memory": "gated_delta_net+linearized_attention", "stages": ["start"]}
    said: list[str] = []
    train(settings(place, tmp_path / "out", report_tokens=0, initial_texts=4, **changes), say=said.append)
    assert "solving the read-out of the other layers on a few texts" in said
    given, made = (load_file(folder / "ahn.safetensors") for folder in (whole, tmp_path / "out"))
    kept = {name for name in made if name in given and torch.equal(made[name], given[name])}
    assert kept == {name for name in made if "layers.2." not in name}
    assert all(bool(tensor.any()) for name, tensor in made.items() if name not in kept and "g_proj.weight" not in name)


@pytest.mark.parametrize("stage", ["transfer", "distill"])
def test_some_of_several_memories_learn(whole: Path, place: Path, tmp_path: Path, stage: str) -> None:
    memory = {"adapter": str(whole), "memory": "gated_delta_net+linearized_attention", "initial_texts": 4}
    rates = {"transfer_relative": True, "transfer_lr": 0.02, "lr": 0.02, "weight_decay": 0.0}
    weights = []
    for name, changes in (("start", {"stages": ["start"]}), ("out", {"stages": [stage], **rates})):
        changes |= {"trained_memories": ["linearized_attention"], "report_tokens": 0}
        weights.append(
            load_file(train(settings(place, tmp_path / name, **memory, **changes)).folder / "ahn.safetensors")
        )
    for name, before in weights[0].items():
        assert torch.equal(before, weights[1][name]) is ("layers.2." not in name), name


def test_the_initial_weights_alone(place: Path, tmp_path: Path) -> None:
    """Linearised attention from the closed form: the same each time, with a card and no plot."""
    changes = {"memory": "linearized_attention", "stages": ["start"], "initial_texts": 4, "report_tokens": 500}
    outcomes = [train(settings(place, tmp_path / name, **changes)) for name in ("first", "second")]
    first, second = (load_file(outcome.folder / "ahn.safetensors") for outcome in outcomes)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert all(bool(tensor.abs().max() > 0) for name, tensor in first.items() if "g_proj.weight" not in name)
    assert outcomes[0].curves == {}
    assert not (outcomes[0].folder / "loss.png").exists()
    assert "0 of start" in ModelCard.load(outcomes[0].folder / "README.md").text
    with pytest.raises(ConfigError, match="is not empty"):
        train(settings(place, tmp_path / "first", **changes))


def test_streaming_and_other_text_for_the_table(place: Path, tmp_path: Path) -> None:
    changes = {"streaming": True, "valid": [str(place / "texts" / "0.txt")], "stages": ["distill"], "steps": 2}
    outcome = train(settings(place, tmp_path / "out", eval_every=1, pack=True, **changes))
    assert outcome.report is not None
    assert [line["step"] for line in outcome.curves["distill"] if "eval_loss" in line] == [0, 1, 2]
