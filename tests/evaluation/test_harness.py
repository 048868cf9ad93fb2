"""lm-evaluation-harness and a model with a memory: requests, tasks of a folder, and the command."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoTokenizer

import ahn
from ahn.cli import loading, main
from ahn.errors import ConfigError
from ahn.evaluation.errors import EvaluationError
from ahn.evaluation.journal import Journal
from ahn.evaluation.report import read_report
from tests.cli.test_cli import ENVIRONMENT, as_before, place, write_tokenizer  # noqa: F401 (fixtures)
from tests.tiny import with_memory

pytestmark = [
    pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm-evaluation-harness: pip install 'ahn[eval]'"),
    # What the harness and its old dependencies use is not ours to change.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]

SIZES = {"vocab_size": 259, "head_dim": 8, "max_position_embeddings": 512}
TEXT = "It was a bright cold day in April, and the clocks were striking thirteen."
RECORDS = [
    {"context": "Passage 1: " + TEXT, "input": "What day?", "answers": ["cold"], "all_classes": None, "length": 12},
    {"context": "Passage 2: " + TEXT, "question": "When?", "answers": ["April", "in April"], "length": 12},
]
TINY = ("--model", "./chatty", "--adapter", "adapter", "--window", "16", "--sinks", "4", "--sink-positions", "absolute")


@pytest.fixture(autouse=True)
def here(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.chdir(tmp_path)
    for name in ("chatty", "adapter"):
        Path(name).symlink_to(place / name)
    Path("data").mkdir()
    Path("data/hotpotqa.jsonl").write_text("\n".join(json.dumps(each) for each in RECORDS))
    Path("data/musique.jsonl").write_text(json.dumps(RECORDS[0]) + '\n{"context": "x", "answers": ["y"]}\n')


@pytest.fixture(autouse=True, scope="module")
def one_index() -> Any:
    """The harness' thousands of tasks are looked through once for each kind of metadata, not in every test."""
    from lm_eval import tasks

    made, real = dict[str, Any](), tasks.TaskManager
    with pytest.MonkeyPatch.context() as patch:

        def manager(metadata: Any) -> Any:
            key = json.dumps(metadata, sort_keys=True)
            if key not in made:
                made[key] = real(metadata=metadata)
            return made[key]

        patch.setattr(tasks, "TaskManager", manager)
        yield


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("harness")
    write_tokenizer(folder, chat=True)
    return {"model": with_memory("qwen3", model=SIZES), "tokenizer": AutoTokenizer.from_pretrained(folder)}


def harness(parts: dict[str, Any], **changes: Any) -> Any:
    from ahn.evaluation.harness import HarnessModel

    return HarnessModel(**{"mode": "window", **parts, **changes})


def requests(*arguments: Any) -> list[Any]:
    return [SimpleNamespace(args=each) for each in arguments]


def log_probabilities(parts: dict[str, Any], ids: list[int], mode: Any = "window") -> torch.Tensor:
    """Of each token but the first, by the model itself in one go."""
    with torch.no_grad(), ahn.mode(parts["model"], mode):
        logits = parts["model"](torch.tensor([ids])).logits[0]
    return -functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")


class TestRequests:
    def test_continuations(self, parts: dict[str, Any]) -> None:
        lm = harness(parts)
        pairs = [(TEXT, " and"), (TEXT, " so"), ("", "so"), (TEXT[:30], " then")]
        answers = lm.loglikelihood(requests(*pairs), disable_tqdm=True)
        for (context, continuation), (value, greedy) in zip(pairs, answers):
            ids = parts["tokenizer"](context + continuation)["input_ids"]
            ids = ids if context else [1, *ids]
            expected = log_probabilities(parts, ids)[-len(continuation) :].sum()
            assert value == pytest.approx(float(expected), abs=1e-3)
            assert not greedy

    def test_the_likeliest_is_greedy(self, parts: dict[str, Any]) -> None:
        lm = harness(parts)
        reader = lm._read(lm.tok_encode(TEXT))
        likeliest = list(reader.fork().generate(4))
        other = [*likeliest[:3], (likeliest[3] + 1) % 259]
        (first, greedy), (second, not_greedy) = lm._loglikelihood_tokens(
            [(None, lm.tok_encode(TEXT), likeliest), (None, lm.tok_encode(TEXT), other)], disable_tqdm=True
        )
        assert (greedy, not_greedy) == (True, False)
        assert first > second

    @pytest.mark.parametrize("mode", ["full", "ahn", "window"])
    def test_rolling_is_one_stream(self, parts: dict[str, Any], mode: str) -> None:
        (value,) = harness(parts, mode=mode).loglikelihood_rolling(requests((TEXT,)), disable_tqdm=True)
        expected = log_probabilities(parts, [1, *parts["tokenizer"](TEXT)["input_ids"]], mode).sum()
        assert value == pytest.approx(float(expected), abs=1e-3)

    def test_answers_end_at_a_text(self, parts: dict[str, Any]) -> None:
        lm = harness(parts)
        (whole,) = lm.generate_until(requests((TEXT, {"until": [], "max_gen_toks": 9, "do_sample": False})), True)
        assert len(whole) > 4
        settings = {"until": whole[2:4], "max_new_tokens": 9, "temperature": 1, "do_sample": False}
        assert lm.generate_until(requests((TEXT, settings)), True) == [whole[: whole.index(whole[2:4])]]

    def test_the_end_of_a_long_context_stays(self, parts: dict[str, Any]) -> None:
        lm = harness(parts, max_length=40)
        short = harness(parts)
        settings = {"until": ["nothing"], "max_gen_toks": 8}
        long = requests((TEXT, settings))
        assert lm.generate_until(long, True) == short.generate_until(requests((TEXT[-32:], settings)), True)
        with pytest.raises(ConfigError, match="max_length 40 has no room for 41 tokens"):
            lm.generate_until(requests((TEXT, {"max_gen_toks": 41})), True)

    def test_answers_are_kept(self, parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
        asked = requests((TEXT, {"max_gen_toks": 5}), (TEXT + "?", {"max_gen_toks": 5}))
        answers = harness(parts, journal=Journal("kept.jsonl", {})).generate_until(asked, True)
        lm = harness(parts, journal=Journal("kept.jsonl", {}))
        monkeypatch.setattr(lm, "_read", lambda *_: 1 / 0)
        assert lm.generate_until(asked, True) == answers
        other = harness(parts, mode="ahn", journal=Journal("kept.jsonl", {}))
        monkeypatch.setattr(other, "_read", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            other.generate_until(asked, True)

    def test_settings_of_a_run(self, parts: dict[str, Any]) -> None:
        narrow, wide = (harness(parts, window=window) for window in (4, 60))
        asked = requests((TEXT,))
        (first,), (second,) = (lm.loglikelihood_rolling(asked, disable_tqdm=True) for lm in (narrow, wide))
        assert abs(first - second) > 1e-3

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"mode": "half"}, "unknown arm 'half'"),
            ({"tokenizer": None}, "model and tokenizer go together"),
            ({"windows": 3}, "unknown model argument windows"),
            ({"window": 0}, "window"),
        ],
    )
    def test_wrong_arguments(self, parts: dict[str, Any], changes: dict[str, Any], says: str) -> None:
        with pytest.raises(ConfigError, match=says):
            harness(parts, **changes)

    def test_refusals(self, parts: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match="answer greedily; set do_sample=False"):
            harness(parts).generate_until(requests((TEXT, {"do_sample": True, "temperature": 0.7})), True)
        full = harness(parts, mode="full")
        with pytest.raises(ConfigError, match="more than the 512 positions that the model knows in full"):
            full.loglikelihood_rolling(requests((TEXT * 9,)), disable_tqdm=True)
        assert harness(parts).loglikelihood_rolling(requests((TEXT * 9,)), disable_tqdm=True)[0] < 0


def test_the_other_model_classes_stay_known() -> None:
    from lm_eval.api.registry import get_model

    import ahn.evaluation.harness  # noqa: F401

    assert get_model("hf").__name__ == "HFLM"
    assert get_model("ahn").__name__ == "HarnessModel"


class TestTasks:
    def test_made_texts_follow_the_seed(self) -> None:
        """RULER draws its needles from the random numbers of the process."""
        pytest.importorskip("wonderwords", reason="RULER needs it: pip install wonderwords")
        from ahn.evaluation.harness.tasks import checksums, load_tasks

        metadata = {"tokenizer": "./chatty", "max_seq_lengths": [600]}
        random.seed(3)
        expected = random.Random(3).random()
        alone = checksums(load_tasks(["niah_single_1"], None, metadata, seed=1))
        assert random.random() == expected  # the caller's numbers go on
        both = checksums(load_tasks(["niah_multikey_2", "niah_single_1"], None, metadata, seed=1))
        assert alone.items() < both.items()
        assert checksums(load_tasks(["niah_single_1"], None, metadata, seed=2)) != alone

    def test_a_folder_of_longbench(self) -> None:
        pytest.importorskip("fuzzywuzzy", reason="the harness' LongBench needs it: pip install 'lm_eval[longbench]'")
        from ahn.evaluation.harness.tasks import load_tasks

        (task,) = load_tasks(["longbench_hotpotqa"], "data", {})
        docs = list(task.eval_docs)
        assert [doc["question"] for doc in docs] == ["What day?", "When?"]
        assert docs[1]["answers"] == ["April", "in April"]

    @pytest.mark.parametrize(
        ("name", "says"),
        [
            ("longbench_hotpot", "there is no task 'longbench_hotpot'. Did you mean 'longbench_hotpotqa'?"),
            ("passkeys", "there is no task 'passkeys'. Did you mean 'passkey'?"),
            ("longbench_qmsum", "data holds no qmsum.jsonl. Give the folder"),
            ("longbench_musique", 'data/musique.jsonl, line 2: the record has no "question". Correct it'),
            ("babilong_qa1", "babilong_qa1 cannot be loaded ("),
        ],
    )
    def test_wrong_names_and_data(self, name: str, says: str) -> None:
        from ahn.evaluation.harness.tasks import load_tasks

        with pytest.raises(EvaluationError) as raised:
            load_tasks([name], "data", {}, ["passkey"])
        assert says in str(raised.value)
        assert "\n" not in str(raised.value)


class TestCommand:
    @pytest.fixture(autouse=True)
    def needs(self) -> None:
        pytest.importorskip("fuzzywuzzy", reason="the harness' LongBench needs it: pip install 'lm_eval[longbench]'")

    def test_beside_our_own(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        line = [
            "eval",
            "run",
            "--tasks",
            "hotpotqa,longbench_hotpotqa",
            "--data",
            "data",
            *TINY,
            "--arms",
            "window,ahn",
        ]
        assert main([*line, "--max-tokens", "300", "--out", "out"]) == 0
        shown = capsys.readouterr().out
        assert "longbench_hotpotqa" in shown
        report = read_report("out/report.json")
        rows = report.results["harness"]
        assert {row["task"] for row in rows} == {"longbench_hotpotqa"}
        assert {row["metric"] for row in rows} == {"score", "qa_f1_score"}
        assert rows[0]["items"] == 2
        assert set(rows[0]["scores"]) == {"window", "ahn"}
        assert "qa_f1_score" in Path("out/report.html").read_text()
        from ahn.evaluation.harness.model import HarnessModel

        monkeypatch.setattr(HarnessModel, "_read", lambda *_: 1 / 0)
        assert main([*line, "--max-tokens", "300", "--out", "out"]) == 0
        Path("data/hotpotqa.jsonl").write_text(json.dumps(RECORDS[1]))
        assert main([*line, "--max-tokens", "300", "--out", "out"]) == 2
        assert "was begun with records = " in capsys.readouterr().err

    def test_made_tasks_go_on(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("wonderwords", reason="RULER needs it: pip install wonderwords")
        metadata = json.dumps({"max_seq_lengths": [600]})
        line = ["eval", "run", "--tasks", "niah_single_1", "--metadata", metadata, "--limit", "2", *TINY]
        line += ["--arms", "window", "--out", "out"]
        assert main(line) == 0
        assert "niah_single_1" in capsys.readouterr().out
        from ahn.evaluation.harness.model import HarnessModel

        with monkeypatch.context() as patch:
            patch.setattr(HarnessModel, "_read", lambda *_: 1 / 0)
            assert main(line) == 0
        assert main([*line, "--seed", "1"]) == 2
        assert "was begun with seed = 0, not 1" in capsys.readouterr().err

    def test_wrong_input(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(loading, "load", lambda *_, **__: 1 / 0)
        assert main(["eval", "run", "--tasks", "longbench_musique", "--data", "data", *TINY]) == 2
        error = capsys.readouterr().err
        assert "data/musique.jsonl, line 2" in error
        assert error.count("error: ") == 1

    def test_the_harness_own_command_line(self) -> None:
        """`--model ahn` by name, its arguments as a text, and a task that is made on the spot."""
        Path("task.yaml").write_text(
            "task: tiny_words\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: words.jsonl\n"
            "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{text}}'\ndoc_to_target: 0\n"
            "doc_to_choice: ['day', 'night']\nmetric_list:\n  - metric: acc\n"
        )
        Path("words.jsonl").write_text('{"text": "It was a bright cold"}\n{"text": "It was a"}\n')
        words = ["run", "--model", "ahn", "--tasks", "tiny_words", "--include_path", "."]
        arguments = "base=./chatty,adapter=./adapter,mode=ahn,window=16,sinks=4"
        done = subprocess.run(
            [sys.executable, "-m", "ahn.evaluation.harness", *words, "--model_args", arguments],
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert "tiny_words" in done.stdout
