"""The settings: their defaults, their file, and what is said when one cannot work."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

import ahn.training
from ahn.errors import ConfigError
from ahn.memories import memory_names
from ahn.training.settings import TrainSettings, read_yaml, write_yaml


def test_the_file_gives_the_same_settings(tmp_path: Path) -> None:
    settings = TrainSettings(
        data=("a", "b"),
        out="x",
        layers=(0, 2),
        losses={"kl": 1.0, "ce": 0.5},
        initial_decay=None,
        arguments={"tf32": True},
    )
    write_yaml(settings, tmp_path / "train.yaml")
    assert TrainSettings.from_dict(read_yaml(tmp_path / "train.yaml")) == settings


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"length": 1024}, "none"),
        ({"length": 1024, "batch": 2}, "attention"),
        ({"length": 4096}, "layers"),
        ({"length": 4096, "checkpointing": "none"}, "none"),
    ],
)
def test_the_longer_the_more_is_computed_again(values: Any, expected: str) -> None:
    assert TrainSettings(**values).recomputed == expected


def test_numbers_may_come_as_text() -> None:
    """YAML reads 1e-3 as a text."""
    assert TrainSettings.from_dict({"lr": "1e-3", "losses": {"kl": "2"}, "initial_decay": ["0.1", 1]}).lr == 0.001


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rate": 1}, "unknown settings learning_rate; known are .*lr"),
        ({"lr": "fast"}, "lr must be a number, not 'fast'"),
        ({"lr": 0}, "lr must be a positive number"),
        ({"steps": 1.5}, "steps must be a whole number, not 1.5"),
        ({"steps": True}, "steps must be a whole number"),
        ({"steps": 0}, "steps must be at least 1, not 0"),
        ({"pack": "yes"}, "pack must be true or false"),
        ({"data": "texts"}, "data must be a list, not 'texts'"),
        ({"losses": ["kl"]}, "losses must be names with numbers"),
        ({"losses": {"l2": 1}}, "unknown loss 'l2'; known are kl, ce, attention"),
        ({"losses": {"kl": 0}}, "no loss has a positive weight"),
        ({"stages": ["distill", "transfer"]}, "stages must be transfer, distill or both in this order"),
        ({"stages": []}, "stages must be"),
        ({"stages": ["start", "distill"]}, "in this order, or start, not"),
        ({"draw": "sometimes"}, "draw must be one of random, fixed"),
        ({"checkpointing": "all"}, "checkpointing must be one of none, attention, layers, not 'all'"),
        ({"initial_gate": "wide"}, "initial_gate must be a number, not 'wide'"),
        ({"loss_share": 0}, "loss_share must be a share above 0 and at most 1, not 0"),
        (
            {"teacher_cache": "x", "losses": {"kl": 1, "attention": 1}},
            "teacher_cache does not serve the loss attention",
        ),
        ({"per_document": 0}, "per_document must be at least 1"),
        ({"per_document": 2, "pack": True}, "needs documents that are cut, not packed"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"initial_decay": [2, 1]}, "initial_decay must be a range"),
        ({"initial_decay": [1]}, "initial_decay must be a list"),
        ({"length": 16}, "a sequence of 16 tokens leaves nothing"),
        ({"draw": "fixed", "window": 2048}, r"sinks \+ window = 2080"),
        ({"draw": "fixed", "length": 512, "min_length": 100}, "a sequence of 100 tokens leaves nothing"),
        ({"min_length": 4096}, "min_length must be from 2 to the length 1024"),
        ({"held_out": 1}, "held_out must be a share"),
        ({"window": 0}, "window must be a whole number of at least 1"),
        ({"sink_positions": "near"}, "sink_positions must be one of"),
        ({"layers": [0, 0]}, "layers names a layer twice"),
        ({"warmup": -1}, "warmup must be at least 0"),
        ({"warmup": float("nan")}, "warmup must be at least 0"),
        ({"slice_tokens": 0}, "slice_tokens must be at least 1"),
        ({"scale_lr": 0.03, "arguments": {"optim": "sgd"}}, "scale_lr and transfer_relative are of our own AdamW"),
        ({"transfer_relative": True, "arguments": {"optim": "sgd"}}, "are of our own AdamW; leave them"),
        ({"trained_memories": ["mamba2"]}, "trained_memories must name memories of gated_delta_net, not"),
        ({"memory": "mamba2+delta_net", "trained_memories": []}, r"memories of mamba2\+delta_net, not \[\]"),
    ],
)
def test_what_cannot_work(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainSettings.from_dict(values)


@pytest.mark.parametrize(
    ("content", "message"),
    [("a: [1", "is no YAML"), ("- a\n- b\n", "holds no settings"), ("", "holds no settings"), (None, "cannot be read")],
)
def test_files_that_are_none(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "train.yaml").write_text(content)
    with pytest.raises(ConfigError, match=rf"train\.yaml {message}"):
        read_yaml(tmp_path / "train.yaml")


def test_every_setting_is_documented() -> None:
    for field in dataclasses.fields(TrainSettings):
        assert re.fullmatch(r"[A-Z].*\.|tensorboard.*\.|distill.*\.", field.metadata["help"]), field.name


def test_the_help_names_every_memory() -> None:
    described = TrainSettings.__dataclass_fields__["memory"].metadata["help"]
    assert sorted(re.findall(r"\w+", described.split(": ")[1])) == sorted(memory_names())


def test_older_files_name_the_model_base(tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text("base: some-model\n")
    assert TrainSettings.from_dict(read_yaml(tmp_path / "train.yaml")).model == "some-model"
    assert TrainSettings.from_dict({"base": "some-model"}).model == "some-model"


def test_every_public_name_of_the_room_is_there() -> None:
    for name in ahn.training.__all__:
        assert getattr(ahn.training, name).__name__ == name
