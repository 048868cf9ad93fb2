"""`ahn eval qmsum`: meetings, where evidence is, scores of gold answers, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoTokenizer

import ahn
from ahn.cli import loading, main
from ahn.evaluation.errors import EvaluationError
from ahn.evaluation.journal import Journal
from ahn.evaluation.qmsum import run as qmsum_run
from ahn.evaluation.qmsum.meetings import Meeting, Query, checksum, read_meetings
from ahn.evaluation.qmsum.results import results
from ahn.evaluation.qmsum.run import item, measure
from ahn.evaluation.report import read_report
from tests.cli.test_cli import as_before, place, write_tokenizer  # noqa: F401 (fixtures)
from tests.tiny import with_memory

SINKS, WINDOW = 5, 16
MEETING: dict[str, Any] = {
    "topic_list": [],
    "meeting_transcripts": [{"speaker": f"P{turn}", "content": f"Well , number {turn} ."} for turn in range(8)],
    "specific_query_list": [
        {"query": "First?", "answer": "It was one .", "relevant_text_span": [["1", "2"]]},
        {"query": "Both?", "answer": "One and seven .", "relevant_text_span": [["1", "1"], ["7", "7"]]},
    ],
    "general_query_list": [{"query": "All?", "answer": "Numbers ."}],
}
LINE = ["eval", "qmsum", "meetings", "--model", "./model", "--adapter", "adapter", "--sink-positions", "absolute"]
LINE += ["--window", "16", "--sinks", "5"]


@pytest.fixture(autouse=True)
def here(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.chdir(tmp_path)
    for name in ("model", "adapter"):
        Path(name).symlink_to(place / name)
    Path("meetings").mkdir()
    for name in ("a", "b"):
        write(name, MEETING)
    Path("empty").mkdir()


def write(name: str, meeting: Any, folder: str = "meetings") -> Path:
    Path(folder).mkdir(exist_ok=True)
    (file := Path(folder, f"{name}.json")).write_text(json.dumps(meeting))
    return file


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = tmp_path_factory.mktemp("qmsum")
    write_tokenizer(folder, chat=True)
    model = with_memory("qwen3", model={"vocab_size": 259, "head_dim": 8, "max_position_embeddings": 512})
    return model, AutoTokenizer.from_pretrained(folder)


class TestMeetings:
    def test_read(self) -> None:
        first, second = read_meetings(Path("meetings"))
        assert (first.name, second.name) == ("a", "b")
        assert first.turns[1] == "P1: Well , number 1 .\n"
        assert [each.evidence for each in first.queries] == [((1, 2),), ((1, 1), (7, 7)), ()]
        assert len(read_meetings(Path("meetings"), 1)) == 1
        assert checksum([first]) != checksum([second])

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"meeting_transcripts": None}, 'bad/m.json: there is no list "meeting_transcripts"'),
            ({"meeting_transcripts": []}, "specific query 1: the span 1 to 2 is not within the 0 turns"),
            ({"specific_query_list": [], "general_query_list": []}, "bad/m.json holds no query"),
            ({"general_query_list": [{"query": "x"}]}, 'bad/m.json, general query 1: there is no text "answer"'),
            ({"general_query_list": [{"query": "x", "answer": " "}]}, "general query 1: its answer is empty"),
            (
                {"specific_query_list": [{"query": "x", "answer": "y", "relevant_text_span": [["7", "8"]]}]},
                "bad/m.json, specific query 1: the span 7 to 8 is not within the 8 turns. Correct it.",
            ),
            (
                {"specific_query_list": [{"query": "x", "answer": "y", "relevant_text_span": [["7"]]}]},
                "specific query 1: the span ['7'] is no pair of turns",
            ),
            (
                {"specific_query_list": [{"query": "x", "answer": "y", "relevant_text_span": []}]},
                '"relevant_text_span" is empty',
            ),
        ],
    )
    def test_a_bad_meeting_is_named(self, changes: dict[str, Any], says: str) -> None:
        write("m", {**MEETING, **changes}, "bad")
        with pytest.raises(EvaluationError) as raised:
            read_meetings(Path("bad"))
        assert says in str(raised.value)


def test_where_evidence_is(parts: tuple[Any, Any]) -> None:
    """Against the definition: token j is kept for query i if it is a sink or less than a window back."""
    _, tokenizer = parts
    turns = tuple(f"P: {'abcdefgh'[turn] * 9}\n" for turn in range(8))
    spans = [((first, last),) for first in range(8) for last in range(first, 8)]
    queries = tuple(Query("?", "x", span) for span in spans)
    for window, sinks in ((25, 5), (60, 45), (200, 5), (20, 60)):
        made = item(Meeting("m", turns, queries), tokenizer, window, sinks, chat=False)
        for span, asked in zip(spans, made.asked):
            read = torch.cat((made.ids, asked.closing))
            query = read.numel() - 1
            kept = []
            for first, last in span:
                evidence = tokenizer("".join(turns[first : last + 1]), add_special_tokens=False)["input_ids"]
                starts = [at for at in range(query) if read[at : at + len(evidence)].tolist() == evidence]
                assert len(starts) == 1
                kept += [j < sinks or query - j < window for j in range(starts[0], starts[0] + len(evidence))]
            expected = "window" if all(kept) else "both" if any(kept) else "evicted"
            assert asked.group == expected


@pytest.mark.parametrize("chat", [False, True])
def test_scores_are_those_of_the_model(parts: tuple[Any, Any], chat: bool) -> None:
    model, tokenizer = parts
    (meeting,) = read_meetings(Path("meetings"), 1)
    made = item(meeting, tokenizer, WINDOW, SINKS, chat)
    records = measure(model, tokenizer, [made], ["full", "window", "ahn"], Journal(None, {}), lambda tokens: None, 4)
    for record in records:
        for asked, answer in zip(made.asked, record["answers"]):
            ids = torch.cat((made.ids, asked.closing, asked.answer))
            with torch.no_grad(), ahn.mode(model, record["arm"]):
                logits = model(ids[None]).logits[0]
            last = asked.answer.numel()
            expected = functional.cross_entropy(logits[-last - 1 : -1], asked.answer, reduction="sum")
            assert answer["nll"] == pytest.approx(float(expected), abs=2e-3)
            assert answer["tokens"] == last
            assert 0 <= answer["rouge_l"] <= 1
    text = tokenizer.decode(torch.cat((made.ids, made.asked[0].closing, made.asked[0].answer)))
    assert text.endswith("First?</s><assistant>It was one ." if chat else "\n\nQuestion: First?\nAnswer: It was one .")


def test_results_by_hand() -> None:
    def record(meeting: str, arm: str, *answers: tuple[str, int, float]) -> dict[str, Any]:
        made = [{"group": group, "tokens": tokens, "nll": nll} for group, tokens, nll in answers]
        return {"meeting": meeting, "arm": arm, "tokens": 9, "seconds": 1.0, "cache_bytes": 7, "answers": made}

    found = results(
        [
            record("a", "window", ("evicted", 4, 8.0), ("whole", 2, 2.0)),
            record("a", "ahn", ("evicted", 4, 6.0), ("whole", 2, 2.0)),
            record("b", "window", ("evicted", 6, 12.0)),
            record("b", "ahn", ("evicted", 6, 9.0)),
        ],
        ["window", "ahn"],
    )
    evicted = found["groups"]["evicted"]
    assert (evicted["queries"], evicted["meetings"], evicted["tokens"]) == (2, 2, 10)
    assert evicted["nats"]["window"]["value"] == 2.0
    assert evicted["difference"]["ahn"] == {"value": -0.5, "interval": [-0.5, -0.5]}
    assert found["groups"]["all"]["nats"]["window"]["value"] == pytest.approx(22 / 12)
    assert found["groups"]["both"]["queries"] == 0
    assert found["arms"]["ahn"] == {"tokens": 18, "seconds": 2.0, "cache_bytes": 7}


class TestCommand:
    def test_report_and_going_on(self, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        line = [*LINE, "--answers", "3", "--arms", "window,ahn,tail,ahn+4,window+4", "--out", "out"]
        assert main(line) == 0
        table = capsys.readouterr().out
        assert "nats per token" in table
        assert "ROUGE-L" in table
        report = read_report("out/report.json")
        assert report.results["groups"]["all"]["queries"] == 6
        assert report.results["groups"]["whole"]["queries"] == 2
        assert set(report.results["groups"]["all"]["difference"]) == {"ahn", "tail", "ahn+4", "window+4"}
        assert "<svg" in Path("out/report.html").read_text()
        assert Path("out/differences.png").is_file()
        monkeypatch.setattr(qmsum_run, "arm_reader", lambda *_, **__: 1 / 0)
        assert main(line) == 0
        assert capsys.readouterr().out == table

    def test_long_meetings_are_left_out(self, capsys: Any) -> None:
        write("c", {**MEETING, "meeting_transcripts": MEETING["meeting_transcripts"] * 3})
        assert main([*LINE, "--max-tokens", "400", "--arms", "window"]) == 0
        shown = capsys.readouterr()
        assert "1 of 3 meetings are longer than --max-tokens and left out" in shown.err
        assert main([*LINE, "--max-tokens", "40"]) == 2
        assert "no meeting has at most 40 tokens; the shortest has" in capsys.readouterr().err

    def test_full_has_its_positions(self, capsys: Any) -> None:
        write("c", {**MEETING, "meeting_transcripts": MEETING["meeting_transcripts"] * 40})
        assert main([*LINE, "--arms", "full"]) == 2
        error = capsys.readouterr().err
        assert "c has " in error
        assert "Leave long meetings out with --max-tokens 4096, or full out of --arms." in error

    @pytest.mark.parametrize(
        ("words", "says"),
        [
            (["nowhere"], "nowhere does not exist. Give the folder with QMSum's JSON files."),
            (["meetings/a.json"], "meetings/a.json is a file. Give the folder"),
            (["empty"], "empty holds no .json file."),
            (["bad"], "bad/x.json is no JSON ("),
            (["meetings", "--limit", "0"], "--limit must be at least 1, not 0."),
            (["meetings", "--answers", "-1"], "--answers must be at least 0, not -1."),
            (["meetings", "--arms", "half"], "--arms takes full, window, ahn"),
        ],
    )
    def test_wrong_input(self, words: list[str], says: str, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        write("x", {}, "bad").write_text("{")
        monkeypatch.setattr(loading, "load", lambda *_, **__: 1 / 0)
        assert main(["eval", "qmsum", *words]) == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        assert shown.err.startswith("error: ")
        assert says in shown.err
        assert shown.err.count("\n") == 1
