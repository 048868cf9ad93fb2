"""Recall from end to end: what a perfect reader of sinks and window finds, what is counted, and the command."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer
from transformers.utils import logging

import ahn
import ahn.checkpoint  # what it imports draws random numbers once, which the seed of a run does not foresee
from ahn.cli import main
from ahn.cli.texts import reference
from ahn.evaluation.arms import arm_reader
from ahn.evaluation.journal import Journal
from ahn.evaluation.recall import findings
from ahn.evaluation.recall.findings import by_depth, capacity_curve, cells, heat_map, moved_and_dropped, verdicts
from ahn.evaluation.recall.items import ItemMaker, RecallItem
from ahn.evaluation.recall.tasks import TASKS, RecallSettings
from ahn.evaluation.report import read_report
from ahn.models.text import sentences
from tests.cli.test_cli import write_tokenizer
from tests.tiny import tiny

SINKS, WINDOW = 100, 900
SETTINGS = RecallSettings(
    tuple(TASKS), (2500,), arms=("full", "window"), depths=3, items=1, values=2, facts=(4,), distractors=3
)


class PerfectReader:
    """Knows by heart what its arm still sees, and nothing else: it writes all of that as its answer."""

    opened = 0

    def __init__(self, model: Any, arm: str, score: bool) -> None:
        PerfectReader.opened += 1
        self.tokenizer, self.arm, self.score = model.tokenizer, arm, score
        self.ids: list[int] = []
        self.start = 0
        self.seconds, self.cache_bytes = 1.0, 7

    def prefill(self, ids: torch.Tensor) -> None:
        self.ids += ids.tolist()

    def fork(self) -> PerfectReader:
        twin = copy.copy(self)
        twin.ids, twin.start, twin.score = list(self.ids), len(self.ids), True
        return twin

    def seen(self, ids: list[int]) -> str:
        exact = [*ids[:SINKS], *ids[max(SINKS, len(ids) - WINDOW) :]]
        return str(self.tokenizer.decode(ids if self.arm == "full" else exact))

    @property
    def nll(self) -> torch.Tensor:
        cue = str(self.tokenizer.decode(self.ids[: self.start])).split("<assistant>")[-1]
        value = self.tokenizer.decode(self.ids[self.start :])
        known = (value if cue.endswith(" are") else cue + value) in self.seen(self.ids[: self.start])
        return torch.full((len(self.ids) - self.start,), 0.0 if known else 1.0)

    def answer(self, tokenizer: Any, limit: int, stop: Collection[int]) -> str:
        return self.seen(self.ids)


class Model:
    generation_config = None

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recall")
    tiny("qwen3", vocab_size=259, head_dim=8).save_pretrained(folder / "model")
    write_tokenizer(folder / "model", chat=True)
    (folder / "text.txt").write_text("It was a bright cold day in April. The clocks were striking! Why? " * 60)
    (folder / "short.txt").write_text("It was a bright cold day in April.")
    return folder


@pytest.fixture
def perfect(place: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Model, ItemMaker]:
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    monkeypatch.setattr(findings, "arm_reader", lambda model, arm, score, controls: PerfectReader(model, arm, score))
    PerfectReader.opened = 0
    return Model(tokenizer), ItemMaker(SETTINGS, tokenizer, WINDOW, SINKS, sentences(reference()[:60_000]))


class TestRun:
    def test_a_perfect_window_finds_what_is_labelled_so(self, perfect: tuple[Model, ItemMaker]) -> None:
        records = findings.measure(*perfect, Journal(None, {}))
        found = cells(records)
        assert {cell["task"] for cell in found} == set(TASKS)
        assert {cell["label"] for cell in found} >= {"window", "evicted"}
        for cell in found:
            if cell["task"] == "variables":  # late variables of a chain may still be seen, and so is the other chain
                continue
            if cell["arm"] == "full" or cell["label"] != "evicted":
                assert (cell["found"]["share"], cell["first"]["share"], cell["mean_rank"]) == (1, 1, 1), cell
            else:
                assert (cell["hits"], cell["found"]["share"], cell["first"]["share"]) == (0, 0, 0), cell
                assert cell["mean_rank"] > 1
        said = verdicts(found, SETTINGS)
        assert said[0].startswith("full found ")
        assert "NONE" not in said[0]

    def test_goes_on_where_it_stopped(self, perfect: tuple[Model, ItemMaker], tmp_path: Path) -> None:
        path, seen = tmp_path / "journal.jsonl", []
        first = findings.measure(*perfect, Journal(path, {}))
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(lines[:8]) + lines[8][:30])  # killed while it wrote the eighth record
        PerfectReader.opened = 0
        again = findings.measure(*perfect, Journal(path, {}), seen.append)
        assert PerfectReader.opened == len(first) - 7
        assert again == first
        assert (seen[0], seen[-1]) == (7 * 2500, perfect[1].tokens)
        assert path.read_text().splitlines(keepends=True) == lines

    def test_the_tail_is_read_once_with_the_same_outcome(self, place: Path) -> None:
        model = tiny("qwen3", vocab_size=259, head_dim=8)
        ahn.attach(model, ahn.AHNConfig(window=220, sinks=10))
        ids = torch.randint(3, 259, (700,), generator=torch.Generator().manual_seed(0))
        item = RecallItem(tuple(ids.tolist()), {}, {}, {}, frozenset(), 0.0, 0, 700, 0)
        whole, part = (arm_reader(model, "tail", score=False) for _ in range(2))
        whole.prefill(ids)
        part.prefill(torch.tensor(findings._context_for("tail", item, 10, 220)))
        assert part.tokens == 230
        torch.testing.assert_close(part.fork().logits, whole.fork().logits)
        assert findings._context_for("window", item, 10, 220) == item.context

    def test_what_counts_for_nothing_is_not_read(self, perfect: tuple[Model, ItemMaker]) -> None:
        model, _ = perfect
        settings = RecallSettings(("number",), (220,), arms=("full", "window"), depths=1, items=1, distractors=1)
        maker = ItemMaker(settings, model.tokenizer, 100, 0, sentences(reference()[:9_000]))
        records = findings.measure(model, maker, Journal(None, {}))
        assert PerfectReader.opened == 0
        assert moved_and_dropped(records) == (0, 1)
        assert cells(records) == []

    def test_figures(self, perfect: tuple[Model, ItemMaker], tmp_path: Path) -> None:
        records = findings.measure(*perfect, Journal(None, {}))
        for number, figure in enumerate(
            (heat_map("number", records, SETTINGS), capacity_curve(cells(records), SETTINGS))
        ):
            figure.savefig(tmp_path / f"{number}.png")
        depths, _ = by_depth((record for record in records if record["task"] == "number"), SETTINGS)
        assert depths["window", 2500, 2] == 1
        assert depths["window", 2500, 1] == 0

    def test_a_curve_of_nothing(self) -> None:
        """A span in which no fact is asked for at one of the lengths has an empty panel."""
        cell = {"task": "capacity", "length": 900, "facts": 4, "label": "evicted", "arm": "window"}
        rows = [{**cell, "found": {"share": 0.5, "low": 0.0, "high": 1.0}}]
        rows += [{**rows[0], "length": 1200}, {**rows[0], "label": "window"}]
        assert len(capacity_curve(rows, SETTINGS).axes) == 4


def record(number: int, values: list[tuple[str, bool, int]], arm: str = "window") -> dict[str, Any]:
    kept = [{"label": label, "found": hit, "rank": rank, "depth": 0} for label, hit, rank in values]
    name = {"task": "number", "length": 100, "depth": 0.0, "facts": None, "number": number, "arm": arm}
    return {**name, "moved": 2, "dropped": 1, "values": kept}


SMALL = (
    "eval recall --model ./model --window 220 --sinks 10 --lengths 700 --depths 2 --items 1 --values 1 --facts 2 "
    "--distractors 2 --haystack text.txt"
)


class TestResults:
    def test_scores_by_hand(self) -> None:
        records = [
            record(0, [("evicted", True, 1), ("evicted", False, 4), ("window", True, 1)]),
            record(1, [("evicted", False, 1)]),
        ]
        window, evicted = cells(records)
        assert (window["label"], window["contexts"], window["values"], window["found"]["share"]) == ("window", 1, 1, 1)
        assert math.isnan(window["found"]["low"])  # one text says nothing of others
        assert (evicted["contexts"], evicted["values"], evicted["hits"]) == (2, 3, 1)
        assert (evicted["found"]["share"], evicted["first"]["share"], evicted["mean_rank"]) == (1 / 3, 2 / 3, 2)
        assert (evicted["found"]["low"], evicted["found"]["high"]) == (
            0,
            0.5,
        )  # a text twice: 0 of 2, 2 of 4

    def test_zeros_of_evicted_needles_are_said(self) -> None:
        records = [record(0, [("evicted", False, 2)]), record(0, [("evicted", True, 1)], "full")]
        settings = RecallSettings(arms=("window", "full"))
        assert verdicts(cells(records), settings) == [
            "window found NONE of 1 evicted values; ranks 0% of them first, by chance 10%.",
            "full found 1 of 1 evicted values; ranks 100% of them first, by chance 10%.",
        ]
        assert "No needle was evicted" in verdicts(cells([record(0, [("window", True, 1)])]), settings)[0]

    def test_what_was_moved_counts_once_for_all_arms(self) -> None:
        assert moved_and_dropped([record(0, []), record(0, [], "full"), record(1, [])]) == (4, 2)


class TestCommand:
    @pytest.fixture(autouse=True)
    def here(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
        monkeypatch.chdir(place)
        monkeypatch.setenv("COLUMNS", "80")
        verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        yield
        logging.set_verbosity(verbosity)
        (logging.enable_progress_bar if bars else logging.disable_progress_bar)()

    def test_all_arms_report_page_and_plots(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main([*SMALL.split(), "--out", "run"]) == 0
        shown = capsys.readouterr()
        assert "evicted" in shown.out
        assert "evicted values" in shown.out
        assert "the memory is untrained" in shown.err
        assert max(map(len, (line for line in shown.out.splitlines() if "number" in line))) <= 80
        report = read_report("run/report.json")
        assert report.command == "recall"
        assert {cell["arm"] for cell in report.results["cells"]} == {
            "full",
            "window",
            "ahn",
            "ct_max",
            "ct_mean",
            "tail",
        }
        assert {cell["label"] for cell in report.results["cells"]} == {"window", "evicted"}
        assert "Evicted needles" in Path("run/report.html").read_text()
        assert Path("run/recall_number.png").stat().st_size > 0
        assert Path("run/recall_capacity.png").stat().st_size > 0
        lines = [json.loads(line) for line in Path("run/journal.jsonl").read_text().splitlines()]
        assert len(lines) == 1 + 3 * 6
        assert main([*SMALL.split(), "--out", "run"]) == 0
        assert "going on with run: 18 finished items" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("words", "says"),
        [
            ("--tasks number,colour", "--tasks must be number, word,"),
            ("--lengths 1k", "--lengths must be whole numbers of at least 1 joined by commas, not '1k'."),
            ("--facts 0", "--facts must be whole numbers of at least 1"),
            ("--depths 0", "--depths must be at least 1, not 0."),
            ("--items 0", "--items must be at least 1, not 0."),
            ("--values 0", "--values must be at least 1, not 0."),
            ("--distractors 0", "--distractors must be at least 1, not 0."),
            ("--haystack none.txt", "--haystack none.txt does not exist. Check the path."),
            ("--arms window,half", "--arms takes full, window,"),
            ("--haystack short.txt", "the haystack has about 35 tokens, too few for a length of 700."),
            ("--lengths 60 --window 20", "1 needle and the question take"),
            ("--lengths 60,230", "--lengths 230 do not pass sinks + window = 230, so that nothing is evicted."),
        ],
    )
    def test_wrong_input(self, words: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main([*SMALL.split(), *words.split()]) == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        (error,) = [line for line in shown.err.splitlines() if not line.startswith("the memory is untrained")]
        assert error.startswith("error: ")
        assert says in error
