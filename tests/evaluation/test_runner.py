"""`ahn eval run`: records of benchmarks asked in several arms, resumed, scored side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import ahn
from ahn.cli import loading, main
from ahn.evaluation.arms import ARMS, arm_reader
from ahn.evaluation.benchmarks import runner as benchmark_runner
from ahn.evaluation.benchmarks.question_sets import PromptRules, QuestionSet, check_sets
from ahn.evaluation.benchmarks.runner import BenchmarkRunner
from ahn.evaluation.journal import Journal
from ahn.evaluation.report import read_report
from tests.cli.test_cli import as_before, place, write_tokenizer  # noqa: F401 (fixtures)
from tests.tiny import with_memory

SIZES = {"vocab_size": 259, "head_dim": 8, "max_position_embeddings": 512}
RECORDS: dict[str, list[dict[str, Any]]] = {
    "passkey": [
        {"id": 3, "context": "The grass is green. " * 6, "input": "The key?", "answer": ["71432"], "options": []},
        {"id": 4, "context": "The sky is blue. " * 7, "input": "The key?", "answer": ["11111"], "options": []},
    ],
    "factrecall_en_16k": [{"context": "Long ago. " * 9, "input": "Who?", "answers": ["Newton"], "length": 9}],
    "triviaqa": [
        {"_id": "a", "context": "Passage: x\nAnswer: y\n", "question": "Passage: z\nAnswer:", "answers": ["z"]}
    ],
}
TASKS = ("eval", "run", "--tasks", "passkey,factrecall_en_16k", "--data", "data")
TINY = ("--model", "./chatty", "--adapter", "adapter", "--window", "16", "--sinks", "4", "--sink-positions", "absolute")


@pytest.fixture(autouse=True)
def here(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.chdir(tmp_path)
    for name in ("model", "chatty", "adapter"):
        Path(name).symlink_to(place / name)
    for name, records in RECORDS.items():
        write(name, *records)
    Path("empty").mkdir()


def write(name: str, *records: Any, folder: str = "data") -> None:
    Path(folder).mkdir(exist_ok=True)
    lines = (each if isinstance(each, str) else json.dumps(each) for each in records)
    Path(folder, f"{name}.jsonl").write_text("\n".join(lines))


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> BenchmarkRunner:
    folder = tmp_path_factory.mktemp("runner")
    write_tokenizer(folder, chat=True)
    from transformers import AutoTokenizer

    model = with_memory("qwen3", model=SIZES)
    return BenchmarkRunner(model, AutoTokenizer.from_pretrained(folder), ["full", "window", "ahn"], PromptRules())


class TestSets:
    def test_the_first_records_once(self) -> None:
        sets = check_sets(["passkey", "triviaqa", "passkey"], "data", PromptRules(), limit=1)
        assert [(each.target.name, each.items) for each in sets] == [("passkey", 1), ("triviaqa", 1)]
        assert [sample.id for sample in sets[0].samples()] == [3]
        assert next(sets[1].samples()).question == "Passage: z\nAnswer:"

    def test_checksums_tell_changes(self) -> None:
        (before,), (limited,) = (
            check_sets(["passkey"], "data", PromptRules()),
            check_sets(["passkey"], "data", PromptRules(), 1),
        )
        changed = [RECORDS["passkey"][0], {**RECORDS["passkey"][1], "answer": ["22222"]}]
        write("passkey", *changed)
        (after,), (kept,) = (
            check_sets(["passkey"], "data", PromptRules()),
            check_sets(["passkey"], "data", PromptRules(), 1),
        )
        assert before.checksum != after.checksum
        assert limited.checksum == kept.checksum

    @pytest.mark.parametrize(("name", "chat"), [("passkey", False), ("passkey", True), ("triviaqa", True)])
    def test_prompts(self, runner: BenchmarkRunner, name: str, chat: bool) -> None:
        """A chat template opens the text itself, and no prompt of examples goes into one."""
        (asked,) = check_sets([name], "data", PromptRules())
        sample = next(asked.samples())
        text = runner.tokenizer.decode(PromptRules(chat=chat).prompt_ids(sample, runner.tokenizer))
        assert text.startswith("<user>") == (chat and name == "passkey")
        assert sample.context in text


class TestAnswers:
    @pytest.mark.parametrize("arm", ["window", "tail"])
    def test_ends(self, runner: BenchmarkRunner, arm: str) -> None:
        reader = arm_reader(runner.model, arm, score=False)
        reader.prefill(torch.arange(3, 43))
        whole = reader.fork().answer(runner.tokenizer, 12, ())
        assert len(whole) > 5
        end = whole[3:5]
        assert reader.fork().answer(runner.tokenizer, 12, (), ["nowhere", end]) == whole[: whole.index(end)]
        assert reader.fork().answer(runner.tokenizer, 12, (), ["nowhere", ""]) == whole

    def test_answers_are_those_of_the_arm(self, runner: BenchmarkRunner) -> None:
        (asked,) = check_sets(["passkey"], "data", PromptRules())
        sample = next(asked.samples())
        ids = runner.prompting.prompt_ids(sample, runner.tokenizer)
        record = runner.answer(sample, ids, "window")
        with ahn.mode(runner.model, "window"):
            cache = ahn.HippocampalCache(runner.model)
            logits = runner.model(torch.tensor([ids]), cache=cache).logits[0, -1]
            written = []
            for _ in range(6):
                written.append(int(logits.argmax()))
                if written[-1] == 2:
                    break
                logits = runner.model(torch.tensor([written[-1:]]), cache=cache).logits[0, -1]
        assert record["prediction"] == runner.tokenizer.decode(written, skip_special_tokens=True)
        assert (record["id"], record["answers"], record["tokens"], record["arm"]) == (3, ["71432"], len(ids), "window")


class TestRun:
    def test_goes_on_where_it_stopped(
        self, runner: BenchmarkRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sets = check_sets(["passkey", "factrecall_en_16k"], "data", PromptRules())
        lengths, told = runner.lengths(sets), list[int]()
        whole = runner.run(sets, lengths, Journal(None, {}), told.append)
        assert told[-1] == 3 * sum(map(sum, lengths.values()))
        answer, count = BenchmarkRunner.answer, 0

        def stops(*arguments: Any) -> Any:
            nonlocal count
            count += 1
            if count == 5:
                raise KeyboardInterrupt
            return answer(*arguments)

        journal = tmp_path / "journal.jsonl"
        monkeypatch.setattr(BenchmarkRunner, "answer", stops)
        with pytest.raises(KeyboardInterrupt):
            runner.run(sets, lengths, Journal(journal, {}), told.append, tmp_path / "predictions")
        told.clear()
        again = runner.run(sets, lengths, Journal(journal, {}), told.append, tmp_path / "predictions")
        assert count == 10  # five of the nine answers were left, the one that was stopped among them
        assert told[0] == 3 * lengths["passkey"][0] + lengths["passkey"][1]
        costless = [{**record, "seconds": 0} for record in again]
        assert costless == [{**record, "seconds": 0} for record in whole]
        lines = [json.loads(line) for line in Path("predictions/ahn.jsonl").read_text().splitlines()]
        assert [(line["task"], line["id"]) for line in lines] == [
            ("passkey", 3),
            ("passkey", 4),
            ("factrecall_en_16k", 0),
        ]

    def test_command(self, capsys: pytest.CaptureFixture[str]) -> None:
        arms = (*ARMS, "ahn+4", "window+4")
        assert main([*TASKS, *TINY, "--arms", ",".join(arms), "--out", "out"]) == 0
        shown = capsys.readouterr().out
        assert "passkey" in shown
        assert "average of 1 of 11, 16k" in shown
        assert "…" not in shown
        report = read_report("out/report.json")
        assert report.settings["tasks"] == ["passkey", "factrecall_en_16k"]
        found = report.results["benchmarks"]
        assert [(each["task"], each["items"]) for each in found["sets"]] == [("factrecall_en", 1), ("passkey", 2)]
        assert set(found["sets"][0]["scores"]) == set(arms)
        assert set(found["sets"][0]["differences"]) == set(arms) - {"window"}
        assert found["arms"]["full"]["cache_bytes"] > found["arms"]["window"]["cache_bytes"]
        page = Path("out/report.html").read_text()
        assert "<svg" in page
        assert "ahn - window" in page
        assert Path("out/scores.png").stat().st_size > 1000
        assert main(["eval", "score", "out/predictions/tail.jsonl"]) == 0

    def test_the_same_again_asks_nothing(self, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
        assert main([*TASKS, *TINY, "--out", "out"]) == 0
        table = capsys.readouterr().out
        monkeypatch.setattr(benchmark_runner, "arm_reader", lambda *_, **__: 1 / 0)
        assert main([*TASKS, *TINY, "--out", "out"]) == 0
        again = capsys.readouterr()
        assert again.out == table
        assert "going on with out: 9 finished items" in again.err
        write("passkey", RECORDS["passkey"][0])
        assert main([*TASKS, *TINY, "--out", "out"]) == 2
        assert "was begun with records = " in capsys.readouterr().err

    def test_prompts_of_ones_own_and_no_folder(self, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
        read: list[str] = []
        original = PromptRules.prompt_ids
        monkeypatch.setattr(
            PromptRules,
            "prompt_ids",
            lambda prompting, sample, tokens: (
                read.append(prompting.templates["passkey"]) or original(prompting, sample, tokens)
            ),
        )
        Path("own.json").write_text(json.dumps({"passkey": "{context} {input}"}))
        line = ("eval", "run", "--tasks", "passkey", "--data", "data", "--prompts", "own.json", "--no-chat")
        assert main([*line, *TINY, "--arms", "window", "--limit", "1", "--max-tokens", "40"]) == 0
        assert set(read) == {"{context} {input}"}
        assert not Path("out").exists()
        assert "passkey" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "Missing option '--tasks'"),
        (("--tasks", ","), "there is no task. Name some with --tasks"),
        (("--tasks", "passkeys", "--data", "data"), "there is no task 'passkeys'. Did you mean 'passkey'?"),
        (("--tasks", "cmrc_mixup", "--data", "data"), "cmrc_mixup has several lengths. Name one: cmrc_mixup_16k"),
        (("--tasks", "passkey", "--data", "nowhere"), "there is no folder nowhere"),
        (("--tasks", "passkey", "--data", "empty"), "empty holds no passkey.jsonl"),
        (("--tasks", "passkey", "--data", "data", "--limit", "0"), "--limit must be at least 1, not 0."),
        (("--tasks", "passkey", "--data", "data", "--max-tokens", "1"), "--max-tokens must be at least 2, not 1."),
        (("--tasks", "passkey", "--data", "data", "--window", "0"), "--window must be at least 1, not 0."),
        (("--tasks", "passkey", "--data", "data", "--arms", "half"), "--arms takes full, window, ahn"),
        (("--tasks", "passkey", "--data", "data", "--scoring", "paper"), "passkey has no scoring of the paper's own"),
        (("--tasks", "passkey", "--data", "data", "--prompts", "no.json"), "--prompts no.json does not exist."),
        (("--tasks", "number_string", "--data", "data"), "data/number_string.jsonl, line 2: it is no JSON ("),
        (("--tasks", "math_find", "--data", "data"), "data/math_find.jsonl, line 1: "),
        (("--tasks", "code_debug", "--data", "data"), 'data/code_debug.jsonl, line 1: the record has no "context"'),
    ],
    ids=str,
)
def test_wrong_input_before_a_model_is_loaded(
    words: tuple[str, ...], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write("number_string", RECORDS["passkey"][0], '{"id": 1,')
    write("math_find", {**RECORDS["passkey"][0], "answer": ["four"]})
    write("code_debug", {"id": 0, "input": "x", "answer": ["f", "A"], "options": ["f", "g", "h", "i"]})
    monkeypatch.setattr(loading, "load", lambda *_, **__: 1 / 0)
    assert main(["eval", "run", *words]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert says in shown.err
    assert shown.err.count("\n") == 1


def test_a_prompt_beyond_the_positions(runner: BenchmarkRunner) -> None:
    write("passkey", RECORDS["passkey"][0], {**RECORDS["passkey"][1], "context": "The sky is blue. " * 40})
    sets = check_sets(["passkey"], "data", PromptRules())
    says = r"data/passkey.jsonl, line 2: the prompt has \d+ tokens and its answer up to 6, more than the 512 positions"
    with pytest.raises(ahn.AHNError, match=says) as raised:
        runner.lengths(sets)
    room = int(str(raised.value).split("--max-tokens ")[1].split(",")[0])
    short = BenchmarkRunner(runner.model, runner.tokenizer, runner.arms, PromptRules(max_tokens=room))
    assert short.lengths(sets)["passkey"][1] <= 512 - 6
    bounded = BenchmarkRunner(runner.model, runner.tokenizer, ["window", "ahn"], PromptRules())
    assert bounded.lengths(sets)["passkey"][1] > 512


def test_sets_are_read_again() -> None:
    (asked,) = check_sets(["passkey"], "data", PromptRules())
    assert isinstance(asked, QuestionSet)
    assert list(asked.samples()) == list(asked.samples())
