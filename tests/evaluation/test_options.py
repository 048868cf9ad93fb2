"""What the commands that run a model share: their options are checked before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from ahn.anchors.queries import AnchorQueries
from ahn.attachment import attachment_of
from ahn.cli.evaluation import options
from ahn.cli.terminal import UsageError
from ahn.errors import AHNError
from ahn.evaluation import arms
from ahn.evaluation.arm_names import GRAMMAR
from ahn.evaluation.page import Page
from ahn.evaluation.report import EvaluationReport, read_report
from tests.tiny import awaken, give_score_weights, with_memory

GOOD: dict[str, Any] = {
    "model": "tiny",
    "adapter": None,
    "window": 16,
    "sinks": 4,
    "sink_positions": "bounded",
    "arms": "window, ahn,window",
    "out": None,
    "seed": 0,
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file.txt").write_text("x")
    Path("full").mkdir()
    Path("full/letter.txt").write_text("dear all")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"window": 0}, "--window must be at least 1, not 0."),
        ({"sinks": -1}, "--sinks must be at least 0, not -1."),
        ({"sink_positions": "far"}, "--sink-positions must be bounded or absolute, not 'far'."),
        (
            {"arms": "window,half"},
            f"--arms takes {GRAMMAR}, not 'half'.",
        ),
        (
            {"arms": ","},
            f"--arms takes {GRAMMAR}, not ''.",
        ),
        ({"seed": -1}, "--seed must be at least 0, not -1."),
        ({"adapter": "./missing"}, "--adapter ./missing does not exist."),
        ({"out": Path("file.txt")}, "--out file.txt is a file. Name a folder."),
        ({"out": Path("full")}, "--out full holds other things than an evaluation. Name another folder."),
    ],
)
def test_wrong_options(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as raised:
        options.open_run("perplexity", **{**GOOD, **changes})
    assert says in str(raised.value)


def test_goes_on_with_the_same_settings_only(capsys: pytest.CaptureFixture[str]) -> None:
    settings = {**GOOD, "out": Path("run")}
    run = options.open_run("perplexity", **settings, length=5)
    assert run.arms == ["window", "ahn"]
    assert not Path("run").exists()
    run.journal.add("a", {"x": 1})
    assert capsys.readouterr().err == ""
    assert options.open_run("perplexity", **settings, length=5).journal.done == {"a": {"x": 1}}
    assert capsys.readouterr().err == "going on with run: 1 finished item\n"
    with pytest.raises(AHNError, match="was begun with length = 5, not 6;"):
        options.open_run("perplexity", **settings, length=6)
    with pytest.raises(AHNError, match="was begun with command = perplexity, not recall;"):
        options.open_run("recall", **settings, length=5)


def test_says_how_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    run = options.open_run("perplexity", **{**GOOD, "out": Path("run")})
    run.journal.add("a", {})
    with pytest.raises(KeyboardInterrupt), run.working():
        raise KeyboardInterrupt
    assert capsys.readouterr().err == "1 finished item kept in run; the same command goes on.\n"


def test_finish(capsys: pytest.CaptureFixture[str]) -> None:
    run = options.open_run("perplexity", **{**GOOD, "out": Path("run")})
    run.finish(EvaluationReport("perplexity", run.settings, {}, {}), Page("x"), {"curve": Figure()})
    assert capsys.readouterr().out == "wrote report.json, report.html, curve.png to run\n"
    assert read_report("run/report.json").settings["window"] == 16
    assert {each.name for each in Path("run").iterdir()} == {"report.json", "report.html", "curve.png"}


def test_weights_checksum() -> None:
    model = with_memory()
    before = options.weights_checksum(model)
    assert before == options.weights_checksum(with_memory())
    awaken(model)
    assert options.weights_checksum(model) == before
    model.get_input_embeddings().weight.data.add_(1)
    assert options.weights_checksum(model) == before
    next(attachment_of(model).sites[0].memory.parameters()).data.add_(1)
    assert options.weights_checksum(model) != before
    assert options.weights_checksum(with_memory().bfloat16()) != before


def test_votes_checksum() -> None:
    model = with_memory()
    give_score_weights(model)
    before = options.score_checksum(model)
    assert before != options.score_checksum(with_memory())
    votes = attachment_of(model).sites[0].score_weights("asked")
    assert isinstance(votes, AnchorQueries)
    votes.queries.add_(1)
    assert options.score_checksum(model) != before


def test_arms_are_those_of_evaluation() -> None:
    assert options.ARMS == arms.ARMS
