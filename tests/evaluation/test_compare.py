"""Two reports side by side: what differs, and what cannot be compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ahn.cli import main
from ahn.evaluation import EvaluationError
from ahn.evaluation.differences import compare
from ahn.evaluation.report import EvaluationReport

SETTINGS: dict[str, Any] = {"window": 256, "arms": ["full", "ahn"], "adapter": None}
RESULTS: dict[str, Any] = {"arms": {"ahn": {"nll": 3.5, "closed": None, "tokens": 1000}}, "documents": [{"nll": 3.5}]}


def report(
    settings: Any = None, results: Any = None, command: str = "perplexity", **environment: Any
) -> EvaluationReport:
    return EvaluationReport(
        command, {**SETTINGS, **(settings or {})}, {**RESULTS, **(results or {})}, {"ahn": "1", **environment}
    )


class TestCompare:
    def test_the_same(self) -> None:
        found = compare(report(), report())
        assert (found.settings, found.environment, found.results) == ([], [], [])

    def test_what_differs(self) -> None:
        other = {"arms": {"ahn": {"nll": 3.25, "closed": 0.25, "tokens": 1200}}, "documents": [{"nll": 3.25}]}
        found = compare(report(), report({"window": 128, "adapter": "x", "length": 9}, other, device="A"))
        assert found.settings == [("window", "256", "128"), ("adapter", "-", "x"), ("length", "-", "9")]
        assert found.environment == [("device", "-", "A")]
        assert found.results == [
            ("arms ahn nll", "3.5000", "3.2500", "-0.2500"),
            ("arms ahn closed", "-", "0.2500", "-"),
            ("arms ahn tokens", "1,000", "1,200", "+200"),
        ]

    def test_everything(self) -> None:
        found = compare(report(), report(), everything=True)
        assert ("documents 0 nll", "3.5000", "3.5000", "0") in found.results
        assert ("arms ahn closed", "-", "-", "-") in found.results

    def test_results_that_one_lacks(self) -> None:
        found = compare(report(), report(results={"arms": {}}))
        assert found.results == [("arms ahn nll", "3.5000", "-", "-"), ("arms ahn tokens", "1,000", "-", "-")]

    def test_small_and_exact_numbers(self) -> None:
        first, second = (report(results={"arms": {"x": value}}) for value in (0.001234567, 0.0012345678))
        assert compare(first, second).results[0] == ("arms x", "0.00123457", "0.00123457", "+8e-10")

    def test_of_different_commands(self) -> None:
        with pytest.raises(EvaluationError, match=r"first report is of perplexity, the second of recall: .* cannot be"):
            compare(report(), report(command="recall"))


class TestCommand:
    @pytest.fixture(autouse=True)
    def here(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("COLUMNS", "80")
        Path("a").mkdir()
        report().write("a/report.json")
        report({"window": 128}, {"arms": {"ahn": {"nll": 3.25, "tokens": 1000}}}).write("b.json")
        report(command="recall").write("recall.json")
        Path("scores.json").write_text('{"kind": "scores"}')

    def test_tables(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["eval", "compare", "a", "b.json"]) == 0
        shown = capsys.readouterr()
        lines = [line.split() for line in shown.out.splitlines()]
        assert ["window", "256", "128"] in lines
        assert ["arms", "ahn", "nll", "3.5000", "3.2500", "-0.2500"] in lines
        assert "Versions, device and date that differ: none" in shown.out
        assert shown.err == ""

    def test_equal_reports(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["eval", "compare", "a", "a"]) == 0
        assert capsys.readouterr().out.splitlines() == [
            "Settings of perplexity that differ: none",
            "Versions, device and date that differ: none",
            "Results that differ: none",
        ]

    @pytest.mark.parametrize(
        ("line", "says"),
        [
            ("a", "Missing argument 'B'"),
            ("a missing.json", "missing.json cannot be read (No such file or directory). Check the path."),
            ("a recall.json", "the first report is of perplexity, the second of recall"),
            ("a scores.json", "scores.json is no report of an evaluation. Give the report.json of one."),
        ],
    )
    def test_wrong_input_gets_one_line(self, line: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["eval", "compare", *line.split()]) == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        assert says in shown.err
        assert shown.err.count("\n") == 1
