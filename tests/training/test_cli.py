"""`ahn train`: one line for every wrong input, before any work; a table and a next step at the end."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from transformers.utils import logging

from ahn.cli import main
from ahn.cli.app import command
from ahn.training.settings import TrainSettings
from tests.training.common import write_base

SURFACE = [
    "--config", "--resume", "--dry-run", "--data", "--out", "--model", "--base", "--memory", "--adapter", "--dtype",
    "--quantize", "--stages", "--steps", "--transfer-steps", "--length", "--min-length", "--pack", "--cut",
    "--held-out", "--valid", "--streaming", "--download", "--window", "--sinks", "--draw", "--anchors", "--batch",
    "--accumulation", "--lr", "--seed", "--checkpointing", "--loss-share", "--teacher-cache", "--log-every",
    "--save-every", "--report-to",
]  # fmt: skip
HIDDEN = ["--base"]  # the older spelling of --model
SMALL = ["--stages", "transfer,distill", "--steps", "2", "--transfer-steps", "2", "--length", "128", "--window", "12"]


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A command sets how much transformers says, for its own process."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    monkeypatch.delenv("AHN_DEBUG", raising=False)
    yield
    logging.set_verbosity(verbosity)
    (logging.enable_progress_bar if bars else logging.disable_progress_bar)()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a base model and texts."""
    write_base(tmp_path / "base")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text(" ".join(str(number**3) for number in range(900)))
    (tmp_path / "cpu.yaml").write_text("arguments: {use_cpu: true}\nsinks: 4\ndtype: float32\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_training_and_going_on(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--base", "./base", "--data", "texts", "--out", "out", "--config", "cpu.yaml", *SMALL]
    assert main(words) == 0
    shown = capsys.readouterr()
    assert "transfer 2/2: loss" in shown.err
    assert "distill 2/2: loss" in shown.err
    for word in ("full", "window", "ahn", "perplexity", "wrote out"):
        assert word in shown.out
    weights = (place / "out" / "ahn.safetensors").read_bytes()
    assert main(["train", "--out", "out", "--resume"]) == 0  # the settings are in the folder
    assert "done before" in capsys.readouterr().err
    assert (place / "out" / "ahn.safetensors").read_bytes() == weights
    shutil.rmtree(place / "out" / "distill")
    assert main([*words, "--resume"]) == 0
    assert (place / "out" / "ahn.safetensors").read_bytes() == weights


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "there is no folder to write to. Name one with --out."),
        (["--out", "o"], "there is nothing to train on"),
        (["--out", "o", "--resume"], "o holds nothing to resume. Check the path, or begin a run with --data."),
        (["--out", "base", "--resume"], "base holds nothing to resume."),
        (["--out", "o", "--data", "nowhere.txt"], "nowhere.txt does not exist"),
        (["--out", "o", "--data", "base"], "no file to train on"),
        (["--out", "o", "--data", "texts", "--valid", "./none"], "./none does not exist"),
        (["--out", "base", "--data", "texts"], "base is not empty"),
        (["--out", "base", "--data", "texts", "--resume"], "holds no train.yaml"),
        (["--out", "cpu.yaml", "--data", "texts"], "is a file"),
        (["--out", "o", "--data", "texts", "--model", "./none"], "There is no folder at './none'"),
        (["--out", "o", "--data", "texts", "--memory", "lstm"], "unknown memory 'lstm'"),
        (["--out", "o", "--data", "texts", "--steps", "0"], "steps must be at least 1"),
        (["--out", "o", "--data", "texts", "--steps", "many"], "--steps"),
        (["--out", "o", "--data", "texts", "--stages", "learn"], "stages must be"),
        (["--out", "o", "--data", "texts", "--length", "8"], "a sequence of 8 tokens leaves nothing"),
        (["--out", "o", "--data", "texts", "--config", "none.yaml"], "--config none.yaml does not exist"),
        (["--out", "o", "--data", "texts", "--config", "bad.yaml"], "bad.yaml is no YAML"),
        (["--out", "o", "--data", "texts", "--config", "odd.yaml"], "unknown settings stepz"),
        (["--out", "o", "--data", "texts", "--report-to", "paper"], "report_to names paper"),
        (["--out", "o", "--data", "texts", "--config", "schedule.yaml"], "transformers refuses the arguments"),
    ],
)
def test_wrong_input_gets_one_line(
    place: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    (place / "bad.yaml").write_text("steps: [1")
    (place / "odd.yaml").write_text("stepz: 1")
    (place / "schedule.yaml").write_text("schedule: zigzag")
    assert main(["train", "--model", "./base", *words]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert error.startswith("error: ")
    assert "\n" not in error
    assert not (place / "o").exists()


def test_a_bad_record_is_named(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "bad.jsonl").write_text('{"text": "fine"}\n{"txt": "oops"}\n')
    assert (
        main(["train", "--model", "./base", "--data", "bad.jsonl", "--out", "o", "--config", "cpu.yaml", *SMALL]) == 2
    )
    assert 'bad.jsonl, line 2: the record has neither "text" nor "messages"' in capsys.readouterr().err


def test_the_defaults_in_the_help_are_those_of_the_settings() -> None:
    options: list[Any] = command().commands["train"].params
    checked = 0
    for option in options:
        if shown := re.search(r"\[default: (\S+?)\]", option.help or ""):
            default = getattr(TrainSettings(), option.name)
            assert shown[1] == (",".join(map(str, default)) if isinstance(default, tuple) else str(default)), (
                option.name
            )
            checked += 1
    assert checked > 12
    assert isinstance(command(), typer.core.TyperGroup)


def test_the_surface_is_frozen() -> None:
    options: list[Any] = command().commands["train"].params
    names = [name for option in options for name in (*option.opts, *option.secondary_opts)]
    assert names == SURFACE
    assert [option.opts[0] for option in options if option.hidden] == HIDDEN
