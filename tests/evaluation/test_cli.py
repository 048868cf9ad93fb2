"""`ahn eval`: its surface, what its commands do, and what wrong input gets."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ahn.cli import main
from ahn.cli.app import command

RUN = [
    "--arms",
    "--model",
    "--adapter",
    "--window",
    "--sinks",
    "--sink-positions",
    "--cache-dtype",
    "--quantize",
    "--out",
    "--seed",
    "--anchor-weights",
]
SURFACE = {
    "perplexity": [
        "FILE", "--length", "--pieces", "--ngram", "--rare", "--arms", "--equal-bytes", "--other-text", "--precision",
        "--plot",
        *RUN[1:],
    ],
    "compare": ["A", "B", "--all"],
    "recall": [
        "--tasks", "--lengths", "--depths", "--items", "--values", "--facts", "--distractors", "--haystack", *RUN,
    ],
    "run": [
        "--tasks", "--data", "--limit", "--max-tokens", "--scoring", "--prompts", "--chat", "--no-chat", "--metadata",
        *RUN,
    ],
    "prompts": ["FILE", "--out", "--variant"],
    "score": ["FILE", "--task", "--scoring", "--json"],
}  # fmt: skip
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
LINES = {
    "hotpotwikiqa_mixup_16k.jsonl": [
        {"pred": "The capital is Paris.", "answers": ["Paris"], "gold_ans": "Paris", "length": 13_000},
        {"pred": "London", "answers": ["London"], "gold_ans": "it was the city of London on Thames", "length": 12_000},
    ],
    "cmrc_mixup_32k.jsonl": [{"pred": "北京", "answers": ["北京"], "gold_ans": None, "length": 27_000}],
    "preds_passkey.jsonl": [{"id": 0, "prediction": "71432", "ground_truth": "71432"}],
}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("AHN_DEBUG", raising=False)
    for name, lines in LINES.items():
        Path(name).write_text("\n".join(json.dumps(line) for line in lines))
    Path("broken.jsonl").write_text('{"id": 0, "prediction": "x", "answers": ["x"]}\n{"id": 1,\n')
    Path("nothing").mkdir()
    Path("empty.jsonl").write_text("\n")
    return tmp_path


def options_of(name: str) -> list[str]:
    parameters: list[Any] = command().commands["eval"].commands[name].params
    return [
        word
        for each in parameters
        for word in ([each.metavar] if each.param_type_name == "argument" else [*each.opts, *each.secondary_opts])
    ]


class TestSurface:
    def test_no_command_without_a_frozen_surface(self) -> None:
        assert set(command().commands["eval"].commands) == set(SURFACE)

    @pytest.mark.parametrize("name", SURFACE)
    def test_arguments_and_options(self, name: str) -> None:
        assert options_of(name) == SURFACE[name]

    @pytest.mark.parametrize("name", SURFACE)
    def test_help_has_examples_that_fit(self, name: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["eval", name, "--help"]) == 0
        shown = capsys.readouterr()
        assert f"ahn eval {name} " in shown.out.split("Examples:")[1]
        assert max(map(len, shown.out.splitlines())) <= 80
        assert shown.err == ""

    @pytest.mark.parametrize("words", [["eval"], ["eval", "--help"], ["eval", "-h"]])
    def test_without_a_command(self, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        assert main(words) == 0
        shown = capsys.readouterr().out
        assert all(name in shown for name in SURFACE)


class TestPrompts:
    """Files in the form of the published ones, with words of their own."""

    LVEVAL = """
from metrics import qa_f1_score
DATASET_MAXGEN = {"cmrc_mixup": 64}
DATASET_PROMPT = {
    "cmrc_mixup": "阅读：{context}\\n\\n问题：{input}\\n回答：",
    "factrecall_en": "Article: {context}\\n"
    "Question: {input}\\nAnswer:",
}
DATASET_METRIC = {"cmrc_mixup": qa_f1_score}
"""
    INFINITEBENCH = """
gpt4_templates = {"passkey": "Find it.\\n{context}\\n{input}"}  # noqa
yarn_mistral_templates = {
    "passkey": "Find it.\\n\\n{context}\\n\\n{input}" + "\\nThe pass key is",
    "math_find": "{prefix}\\n\\n{context}\\n\\n{input}",
    "longbook_sum_eng": "Sum up." + "{file:{context}}",
    "code_run": open("/etc/passwd").read(),
}
"""

    def test_all_three_benchmarks(self, capsys: pytest.CaptureFixture[str]) -> None:
        from ahn.evaluation import load_samples, read_prompts
        from ahn.evaluation.benchmarks.prompts import fill

        Path("config.py").write_text(self.LVEVAL)
        Path("prompt.py").write_text(self.INFINITEBENCH)
        longbench = {
            "qmsum": "{context}\n\nQuery: {input}\nAnswer:",
            "lcc": "{context}Next line of code:\n",
            "trec": "",
        }
        Path("dataset2prompt.json").write_text(json.dumps(longbench))
        files = ["config.py", "dataset2prompt.json", "prompt.py"]
        assert main(["eval", "prompts", *files, "--variant", "yarn_mistral", "--out", "all.json"]) == 0
        assert "wrote templates of 5 tasks" in capsys.readouterr().out
        assert main(["eval", "prompts", *files[:2], "--out", "p.json"]) == 0
        shown = capsys.readouterr()
        assert shown.err == "left out: lcc, trec (no task that is built in)\n"
        assert shown.out == "wrote templates of 3 tasks to p.json\n"
        templates = read_prompts(Path("p.json"))
        assert set(templates) == {"cmrc_mixup", "factrecall_en", "qmsum"}
        assert templates["factrecall_en"] == "Article: {context}\nQuestion: {input}\nAnswer:"
        assert main(["eval", "prompts", "prompt.py", "--variant", "yarn_mistral"]) == 0
        errors = capsys.readouterr().err
        assert "left out: longbook_sum_eng (prompt.py: the placeholder {file} is unknown." in errors
        assert "left out: code_run (prompt.py: the template is no text. Correct it.)" in errors
        assert main(["eval", "prompts", "prompt.py", "--variant", "rwkv"]) == 2
        assert "holds templates of gpt4, yarn_mistral, but not rwkv. Name one" in capsys.readouterr().err
        templates = read_prompts(Path("prompts.json"))
        assert templates["passkey"] == "Find it.\n\n{context}\n\n{input}\nThe pass key is"
        record = {"id": 0, "context": "[1, 5]", "input": "What is it? The largest number is?", "answer": 5}
        Path("math_find.jsonl").write_text(json.dumps({**record, "options": []}))
        (sample,) = load_samples("math_find", ".")
        assert fill(templates["math_find"], sample).startswith("What is the largest number in the following list?\n\n")

    @pytest.mark.parametrize(
        ("name", "text", "says"),
        [
            (
                "prompt.py",
                INFINITEBENCH,
                "holds templates of gpt4, yarn_mistral. Name one of them with --variant.",
            ),
            ("prompt.py", "x = {1: 2}", "prompt.py holds no templates. Give the file"),
            ("prompt.py", "x = {", "prompt.py is no Python."),
            ("prompt.json", "[1]", "prompt.json holds no templates."),
            ("prompt.json", '{"lcc": "{context}"}', "holds no template of a task that is known here."),
            ("prompt.json", "{", "prompt.json is no JSON ("),
        ],
    )
    def test_wrong_files(self, name: str, text: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
        Path(name).write_text(text)
        assert main(["eval", "prompts", name]) == 2
        error = capsys.readouterr().err
        assert says in error
        assert error.count("\n") == 1
        assert not Path("prompts.json").exists()


class TestScore:
    def test_a_missing_package_is_no_fault_of_a_file(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from ahn.evaluation import libraries

        libraries.jieba.cache_clear()
        monkeypatch.setitem(sys.modules, "jieba", None)
        assert main(["eval", "score", "."]) == 2
        assert "scoring Chinese text needs the package jieba" in capsys.readouterr().err

    def test_a_bad_file_of_a_folder_is_left_out(self, capsys: pytest.CaptureFixture[str]) -> None:
        folder = Path("published")
        folder.mkdir()
        for name, lines in LINES.items():
            (folder / name).write_text("\n".join(json.dumps(line) for line in lines))
        good = main(["eval", "score", "published"]), capsys.readouterr()
        assert good[0] == 0
        bad = {
            "results.jsonl": '{"accuracy": 1}',
            "preds_kv_retrieval.jsonl": '{"id": 0, "prediction": "x", "answers": ["x"]}\n{"id": 1,',
            "preds_code_run.jsonl": '{"id": 0, "prediction": "5", "ground_truth": "five"}',
            "preds_math_find.jsonl": '{"id": 0, "prediction": "5", "ground_truth": "no number"}',
            "preds_passkey_0-5.jsonl": (folder / "preds_passkey.jsonl").read_text(),
            "empty.jsonl": "",
        }
        for name, text in bad.items():
            (folder / name).write_text(text)
        assert main(["eval", "score", "published", "--json", "scores.json"]) == 0
        shown = capsys.readouterr()
        assert shown.out == good[1].out + "wrote scores.json\n"
        lines = shown.err.splitlines()
        assert len(lines) == len(bad)
        for name in bad:
            assert any(line.startswith(f"left out: published/{name}") for line in lines), name
        assert len(json.loads(Path("scores.json").read_text())["left_out"]) == len(bad)
        assert main(["eval", "score", "published/results.jsonl"]) == 2
        # A record of a file that is left out may stand in another one.
        (folder / "preds_math_find_0-9.jsonl").write_text('{"id": 0, "prediction": "5", "ground_truth": 5}')
        capsys.readouterr()
        assert main(["eval", "score", "published"]) == 0
        assert "math_find" in capsys.readouterr().out
        (folder / "preds_math_find_0-9.jsonl").unlink()
        for name in LINES:
            (folder / name).unlink()
        (folder / "preds_passkey_0-5.jsonl").unlink()
        capsys.readouterr()
        assert main(["eval", "score", "published"]) == 2
        assert "error: published holds no file that can be scored" in capsys.readouterr().err

    def test_a_table_for_each_benchmark(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["eval", "score", *LINES]) == 0
        shown = capsys.readouterr()
        assert shown.err == ""
        rows = [
            re.split(r" {2,}", line.strip()) for line in shown.out.splitlines() if re.search(r"\d{1,3}\.\d\d ", line)
        ]
        # 1/2; then 0, for London is one of seven keywords of which it, was and of can never be found
        assert rows == [
            ["hotpotwikiqa_mixup", "16k", "F1, keywords >= 20 %", "2 of 124", "25.00"],
            ["cmrc_mixup", "32k", "F1, keywords >= 40 %", "1 of 200", "100.00"],
            ["average of 1 of 11", "16k", "25.00"],
            ["average of 1 of 11", "32k", "100.00"],
            ["passkey", "-", "first digits", "1", "100.00"],
            ["average of 1 of 12", "-", "100.00"],
        ]
        assert shown.out.index("LV-Eval") < shown.out.index("InfiniteBench")

    def test_json(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["eval", "score", "preds_passkey.jsonl", "--json", "scores.json"]) == 0
        assert "wrote scores.json" in capsys.readouterr().out
        facts = json.loads(Path("scores.json").read_text())
        assert (facts["kind"], facts["files"]) == ("scores", ["preds_passkey.jsonl"])
        assert facts["sets"][0]["item_scores"] == [{"id": 0, "score": 1.0}]

    def test_the_papers_scoring(self, capsys: pytest.CaptureFixture[str]) -> None:
        Path("preds_longbook_qa_eng.jsonl").write_text(
            '{"id": 0, "prediction": "the cat", "ground_truth": ["The cat"]}'
        )
        assert main(["eval", "score", "preds_longbook_qa_eng.jsonl"]) == 0
        assert "100.00" in capsys.readouterr().out
        assert main(["eval", "score", "preds_longbook_qa_eng.jsonl", "--scoring", "paper"]) == 0
        assert " 50.00 " in capsys.readouterr().out

    def test_torch_is_not_imported(self) -> None:
        code = f"import sys; from ahn.cli import main; s = main({['eval', 'score', *LINES]!r}); assert 'torch' not in "
        done = subprocess.run([sys.executable, "-c", f"{code}sys.modules; sys.exit(s)"], env=ENVIRONMENT, timeout=120)
        assert done.returncode == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["score"], "Missing argument 'FILE'"),
        (["score", "nowhere.jsonl"], "nowhere.jsonl does not exist. Check the path."),
        (["score", "nothing"], "nothing holds no .jsonl file"),
        (["score", "empty.jsonl", "--task", "passkey"], "empty.jsonl is empty"),
        (["score", "broken.jsonl"], "broken.jsonl, line 1: neither the line nor the file's name tells the task"),
        (["score", "broken.jsonl", "--task", "passkey"], "broken.jsonl, line 2: it is no JSON ("),
        (["score", "broken.jsonl", "--task", "passkeys"], "there is no task 'passkeys'. Did you mean 'passkey'?"),
        (["score", "preds_passkey.jsonl", "--scoring", "best"], "--scoring must be official or paper, not 'best'."),
        (["score", "preds_passkey.jsonl", "--scoring", "paper"], "passkey has no scoring of the paper's own"),
        (["score", "preds_passkey.jsonl", "--json", "no/x.json"], "--json: there is no folder no. Make it first."),
        (["score", "preds_passkey.jsonl", "--json", "nothing"], "--json nothing is a folder. Name a file in it."),
        (["scores", "x"], "No such command 'scores'. Did you mean 'score'"),
    ],
)
def test_wrong_input_gets_one_line(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", *words]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert says in shown.err
    assert shown.err.count("\n") == 1
