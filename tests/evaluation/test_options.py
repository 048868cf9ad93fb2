"""What the commands that run a model share: their options are checked before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from ahn.anchors.queries import AnchorQueries
from ahn.attachment import attachment_of
from ahn.cli import main
from ahn.cli.evaluation import recall, runs
from ahn.cli.loading import ModelSettings
from ahn.errors import AHNError
from ahn.evaluation.arm_names import GRAMMAR
from ahn.evaluation.page import Page
from ahn.evaluation.report import read_report
from tests.tiny import awaken, give_score_weights, with_memory

TINY = ModelSettings("tiny", window=16, sinks=4)
ARMS = ("window", "ahn")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file.txt").write_text("x")
    Path("full").mkdir()
    Path("full/letter.txt").write_text("dear all")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--window 0", "--window must be at least 1, not 0."),
        ("--sinks -1", "--sinks must be at least 0, not -1."),
        ("--sink-positions far", "--sink-positions must be bounded or absolute, not 'far'."),
        ("--arms window,half", f"--arms takes {GRAMMAR}, not 'half'."),
        ("--arms ,", f"--arms takes {GRAMMAR}, not ''."),
        ("--seed -1", "--seed must be at least 0, not -1."),
        ("--adapter ./missing", "--adapter ./missing does not exist."),
        ("--out file.txt", "--out file.txt is a file. Name a folder."),
        ("--out full", "--out full holds other things than an evaluation. Name another folder."),
    ],
)
@pytest.mark.parametrize("command", ["perplexity file.txt", "recall"])
def test_wrong_options(command: str, words: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", *command.split(), *words.split()]) == 2
    shown = capsys.readouterr()
    assert says in shown.err
    assert (shown.out, shown.err.count("\n")) == ("", 1)


def test_arms_are_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    monkeypatch.setattr(recall, "open_run", lambda command, source, options, arms, **own: opened.append(arms) or 1 / 0)
    assert main(["eval", "recall", "--arms", "window, ahn,window"]) == 1
    assert opened == [ARMS]


def test_goes_on_with_the_same_settings_only(capsys: pytest.CaptureFixture[str]) -> None:
    shared = (TINY, runs.RunOptions(Path("run")), ARMS)
    run = runs.open_run("perplexity", *shared, length=5)
    assert run.settings["arms"] == ["window", "ahn"]
    assert not Path("run").exists()
    run.journal.add("a", {"x": 1})
    assert capsys.readouterr().err == ""
    assert runs.open_run("perplexity", *shared, length=5).journal.done == {"a": {"x": 1}}
    assert capsys.readouterr().err == "going on with run: 1 finished item\n"
    with pytest.raises(AHNError, match="was begun with length = 5, not 6;"):
        runs.open_run("perplexity", *shared, length=6)
    with pytest.raises(AHNError, match="was begun with command = perplexity, not recall;"):
        runs.open_run("recall", *shared, length=5)


def test_says_how_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    run = runs.open_run("perplexity", TINY, runs.RunOptions(Path("run")), ARMS)
    run.journal.add("a", {})
    with pytest.raises(KeyboardInterrupt), run.working():
        raise KeyboardInterrupt
    assert capsys.readouterr().err == "1 finished item kept in run; the same command goes on.\n"


def test_finish(capsys: pytest.CaptureFixture[str]) -> None:
    run = runs.open_run("perplexity", TINY, runs.RunOptions(Path("run")), ARMS)
    page = Page("x")
    page.figure("curve", Figure(), "a curve")
    run.finish({"nll": 1.5}, page, with_memory())
    assert capsys.readouterr().out == "wrote report.json, report.html, curve.png to run\n"
    report = read_report("run/report.json")
    assert (report.command, report.settings["window"], report.results) == ("perplexity", 16, {"nll": 1.5})
    assert report.environment["seed"] == 0
    assert "Measured with" in Path("run/report.html").read_text()
    assert {each.name for each in Path("run").iterdir()} == {"report.json", "report.html", "curve.png"}


def test_weights_checksum() -> None:
    model = with_memory()
    before = checksum(model)
    assert before == checksum(with_memory())
    awaken(model)
    assert checksum(model) == before
    model.get_input_embeddings().weight.data.add_(1)
    assert checksum(model) == before
    next(attachment_of(model).layers[0].memory.parameters()).data.add_(1)
    assert checksum(model) != before
    assert checksum(with_memory().bfloat16()) != before


def test_score_checksum() -> None:
    model = with_memory()
    give_score_weights(model)
    before = score_checksum(model)
    assert before != score_checksum(with_memory())
    votes = attachment_of(model).layers[0].score_weights("asked")
    assert isinstance(votes, AnchorQueries)
    votes.queries.add_(1)
    assert score_checksum(model) != before


def checksum(model: Any) -> str:
    return runs.weights_checksum((layer.index, layer.memory) for layer in attachment_of(model).layers)


def score_checksum(model: Any) -> str:
    return runs.weights_checksum((layer.index, layer.anchor_weights) for layer in attachment_of(model).layers)
