"""Reports, pages, journals and intervals: what goes in comes out, and what is broken gets one clear line."""

from __future__ import annotations

import html.parser
import json
import math
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from matplotlib.figure import Figure

from ahn.evaluation import EvaluationError
from ahn.evaluation.bootstrap import interval
from ahn.evaluation.journal import Journal
from ahn.evaluation.page import Page
from ahn.evaluation.report import EvaluationReport, environment, read_report
from ahn.evaluation.tables import ResultTable
from tests.tiny import tiny


class TestReport:
    def test_round_trip(self, tmp_path: Path) -> None:
        results = {"nll": np.float32(1.5), "all": np.arange(3), "none": math.nan, "far": [math.inf], "at": Path("x")}
        EvaluationReport("perplexity", {"window": 4, "name": "né"}, results, {"seed": 0}).write(
            tmp_path / "report.json"
        )
        report = read_report(tmp_path / "report.json")
        assert report.results == {"nll": 1.5, "all": [0, 1, 2], "none": None, "far": [None], "at": "x"}
        assert (report.command, report.settings) == ("perplexity", {"window": 4, "name": "né"})
        text = (tmp_path / "report.json").read_text(encoding="utf-8")
        assert "né" in text
        assert "\n  " in text
        assert [each.name for each in tmp_path.iterdir()] == ["report.json"]

    def test_environment(self) -> None:
        facts = environment(tiny(), seed=3)
        assert {"ahn", "torch", "transformers", "python", "device", "threads", "date"} <= facts.keys()
        assert (facts["dtype"], facts["seed"]) == ("float32", 3)
        assert "/" not in "".join(map(str, facts.values()))
        assert "seed" not in environment()

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            (None, "cannot be read (No such file or directory). Check the path."),
            ("{", "is no JSON"),
            ("[1]", "is no report of an evaluation"),
            ('{"kind": "scores"}', "is no report of an evaluation"),
            ('{"kind": "evaluation", "command": "x", "settings": 3}', "is no report of an evaluation"),
            ("\udcff", "is no JSON"),
            ("[" * 100_000, "is no JSON"),
        ],
    )
    def test_what_is_none(self, tmp_path: Path, text: str | None, says: str) -> None:
        file = tmp_path / "report.json"
        if text is not None:
            file.write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(EvaluationError) as raised:
            read_report(file)
        assert says in str(raised.value)
        assert str(file) in str(raised.value)


class Tags(html.parser.HTMLParser):
    """Tags and ids of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data")]


class TestPage:
    def page(self, tmp_path: Path) -> str:
        page = Page("a < b & <script>alert(1)</script>")
        page.heading("<h>")
        page.text("1 < 2 & 3")
        page.table(ResultTable(["arm", "nll"], [["window", 1.23456], ["<b>", None], ["ahn", math.nan]], "what & why"))
        page.facts({"arms": ["full", "window"], "versions": {"torch": "2"}, "tokens": 12_345, "adapter": None})
        for name in ("first", "second"):
            figure = Figure()
            panel = figure.subplots()
            panel.plot([0, 1], [0, 1], marker="o")
            panel.set_title("x < y")
            page.figure(name, figure, 'a "figure"')
        page.write(tmp_path / "report.html")
        return (tmp_path / "report.html").read_text(encoding="utf-8")

    def test_needs_nothing_else_and_escapes(self, tmp_path: Path) -> None:
        text = self.page(tmp_path)
        tags = Tags(text)
        assert tags.tags.count("svg") == 2
        assert not {"script", "link", "img", "iframe", "object"} & set(tags.tags)
        assert all(source.startswith("#figure") for source in tags.sources)
        assert len(tags.ids) == len(set(tags.ids))
        assert {source[1:] for source in tags.sources} <= set(tags.ids)
        assert "@import" not in text
        assert "<metadata>" not in text
        for shown in ("1 &lt; 2 &amp; 3", "&lt;b&gt;", "1.235", "what &amp; why", "full, window", "torch 2", "12,345"):
            assert shown in text
        assert "viewport" in text
        assert "color-scheme: light dark" in text

    def test_the_same_every_time(self, tmp_path: Path) -> None:
        assert self.page(tmp_path) == self.page(tmp_path)

    def test_columns_of_numbers_are_at_the_right(self, tmp_path: Path) -> None:
        page = Page("x")
        page.table(ResultTable(["name", "share"], [["a1", "25 % (20 to 31)"], ["b", "-"], ["c", "-1.5"]]))
        page.write(tmp_path / "x.html")
        text = (tmp_path / "x.html").read_text(encoding="utf-8")
        assert '<th scope="col">name' in text
        assert '<th scope="col" class="number">share' in text


class TestJournal:
    settings: ClassVar[dict[str, Any]] = {"model": "tiny", "window": 4, "files": {"a.txt": "00"}}

    def test_goes_on(self, tmp_path: Path) -> None:
        file = tmp_path / "run" / "journal.jsonl"
        journal = Journal(file, self.settings)
        assert not file.exists()
        journal.add("a", {"nll": [1.0, math.nan]})
        journal.add("b", {"nll": np.array([2.0])})
        assert Journal(file, self.settings).done == journal.done == {"a": {"nll": [1.0, None]}, "b": {"nll": [2.0]}}
        assert json.loads(file.read_text().splitlines()[0])["settings"] == self.settings

    @pytest.mark.parametrize("lost", range(1, 30))
    def test_a_torn_last_line_is_dropped(self, tmp_path: Path, lost: int) -> None:
        file = tmp_path / "journal.jsonl"
        journal = Journal(file, self.settings)
        journal.add("a", {"é": 1})
        journal.add("b", {"é": 2})
        file.write_bytes(file.read_bytes()[:-lost])
        again = Journal(file, self.settings)
        assert set(again.done) == {"a"}
        again.add("b", {"é": 3})
        assert Journal(file, self.settings).done == {"a": {"é": 1}, "b": {"é": 3}}

    def test_a_torn_first_line(self, tmp_path: Path) -> None:
        file = tmp_path / "journal.jsonl"
        file.write_text('{"settings": {"mod')
        journal = Journal(file, self.settings)
        assert journal.done == {}
        journal.add("a", {})
        assert Journal(file, self.settings).done == {"a": {}}

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"window": 5}, "was begun with window = 4, not 5; go on with the same settings or name another folder."),
            ({"model": "huge"}, "was begun with model = tiny, not huge;"),
            ({"seed": 0}, "was begun with seed = nothing, not 0;"),
            ({"files": {"a.txt": "01"}}, 'was begun with files = {"a.txt": "00"}, not {"a.txt": "01"};'),
        ],
    )
    def test_other_settings(self, tmp_path: Path, changes: dict[str, Any], says: str) -> None:
        Journal(tmp_path / "j", self.settings).add("a", {})
        with pytest.raises(EvaluationError) as raised:
            Journal(tmp_path / "j", {**self.settings, **changes})
        assert says in str(raised.value)

    def test_pinned(self, tmp_path: Path) -> None:
        journal = Journal(tmp_path / "j", self.settings)
        journal.pin("weights", "aa")
        journal.add("a", {})
        Journal(tmp_path / "j", self.settings).pin("weights", "aa")
        with pytest.raises(EvaluationError, match="begun with weights = aa, not bb"):
            Journal(tmp_path / "j", self.settings).pin("weights", "bb")

    @pytest.mark.parametrize("line", ["7", "{", '{"key": "a"}', '{"record": 3, "key": "a"}'])
    def test_what_is_none(self, tmp_path: Path, line: str) -> None:
        (tmp_path / "j").write_text(f"{line}\n")
        with pytest.raises(EvaluationError, match="line 1: it is no line of a journal"):
            Journal(tmp_path / "j", self.settings)
        (tmp_path / "j").write_text(json.dumps({"settings": self.settings}) + f"\n{line}\n")
        with pytest.raises(EvaluationError, match="line 2: it is no line of a journal"):
            Journal(tmp_path / "j", self.settings)

    def test_in_memory(self) -> None:
        journal = Journal(None, self.settings)
        journal.pin("weights", "aa")
        journal.add("a", {"x": 1})
        assert journal.done == {"a": {"x": 1}}

    def test_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(EvaluationError, match="cannot be written"):
            Journal(tmp_path / "x", {})._append(tmp_path / "file" / "j", b"")


class TestInterval:
    def test_of_a_mean(self) -> None:
        """Of many values the interval is that of the normal distribution."""
        values = np.random.default_rng(1).normal(size=400)
        low, high = interval(values, lambda rows: float(rows.mean()), draws=4000)
        half = 1.96 * values.std() / 20
        assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.01)

    def test_pairs_stay_together(self) -> None:
        values = np.random.default_rng(1).normal(size=(30, 1)) * 100 + [0.0, 1.0]
        ends = interval(values, lambda rows: float((rows[:, 1] - rows[:, 0]).mean()), draws=200)
        assert ends == pytest.approx((1.0, 1.0))

    def test_is_the_same_every_time_and_narrower_at_a_lower_level(self) -> None:
        values = [1.0, 2.0, 5.0, 9.0]
        mean = np.mean
        assert interval(values, mean, draws=500) == interval(values, mean, draws=500)
        low, high = interval(values, mean, draws=500, level=0.5)
        wide = interval(values, mean, draws=500)
        assert wide[0] < low < high < wide[1]

    def test_one_item_tells_nothing(self) -> None:
        assert all(map(math.isnan, interval([3.0], np.mean)))

    def test_draws_without_a_value_are_left_out(self) -> None:
        values = np.array([[1.0, 0.0], [1.0, 2.0]])
        assert interval(values, lambda rows: rows[:, 0].sum() / rows[:, 1].sum(), draws=300) == (0.5, 1.0)

    @pytest.mark.parametrize("wrong", [{"draws": 0}, {"level": 0.0}, {"level": 1.0}])
    def test_refuses(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(EvaluationError, match="draws must be"):
            interval([1.0, 2.0], np.mean, **wrong)
