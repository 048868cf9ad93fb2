"""Records from folders and through the `datasets` library; a bad one is named by its file and line."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest

from ahn.evaluation.benchmarks import samples
from ahn.evaluation.benchmarks.samples import load_samples
from ahn.evaluation.errors import EvaluationError

LVEVAL = {
    "input": "谁？",
    "context": "很长的文章",
    "answers": ["曹雪芹", "曹"],
    "length": 13_000,
    "dataset": "cmrc_mixup_16k",
    "language": "zh",
    "answer_keywords": "曹雪芹",
    "confusing_facts": ["《红楼梦》不是他写的"],
}
CHOICE = {"id": 7, "context": "book", "input": "Who?", "answer": ["x"], "options": ["w", "x", "y", "z"]}


def write(folder: Path, name: str, *records: Any) -> str:
    lines = [each if isinstance(each, str) else json.dumps(each, ensure_ascii=False) for each in records]
    (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return str(folder)


class TestFolders:
    def test_lveval(self, tmp_path: Path) -> None:
        without = {key: LVEVAL[key] for key in ("input", "context", "answers")}
        first, second = load_samples("cmrc_mixup_16k", write(tmp_path, "cmrc_mixup_16k", LVEVAL, "", without))
        assert (first.id, first.context, first.question) == (0, "很长的文章", "谁？")
        assert (first.answers, first.keywords, first.options) == (("曹雪芹", "曹"), "曹雪芹", ())
        assert first.target.name == "cmrc_mixup_16k"
        assert (second.id, second.keywords) == (1, None)
        assert second.where == f"{tmp_path}/cmrc_mixup_16k.jsonl, line 3"

    def test_options_get_their_letter(self, tmp_path: Path) -> None:
        both = {**CHOICE, "id": 8, "answer": ["x", "B"]}
        samples = list(load_samples("longbook_choice_eng", write(tmp_path, "longbook_choice_eng", CHOICE, both)))
        assert [each.answers for each in samples] == [("x", "B"), ("x", "B")]
        assert [each.id for each in samples] == [7, 8]
        assert samples[0].options == ("w", "x", "y", "z")

    def test_an_answer_alone(self, tmp_path: Path) -> None:
        record = {"id": 0, "context": "code", "input": "func_1(2)", "answer": 4, "options": None}
        (sample,) = load_samples("code_run", write(tmp_path, "code_run", record))
        assert (sample.answers, sample.options) == ((4,), ())

    @pytest.mark.parametrize(
        ("record", "says"),
        [
            ("{", "it is no JSON (Expecting property name enclosed in double quotes, column 2). Correct it."),
            ("[1]", "it is no JSON object, but list. Correct it."),
            ({"input": "x", "answers": []}, 'the record has no "context". Correct it or leave it out.'),
            ({"input": "x"}, 'the record has no "context" and no "answers". Correct it or leave it out.'),
            ({**LVEVAL, "context": None}, '"context" is no text, but NoneType. Correct it.'),
            ({**LVEVAL, "input": 3}, '"input" is no text, but int. Correct it.'),
            ({**LVEVAL, "answer_keywords": ["a"]}, '"answer_keywords" is no text, but list. Correct it.'),
        ],
    )
    def test_bad_records(self, tmp_path: Path, record: Any, says: str) -> None:
        folder = write(tmp_path, "cmrc_mixup_16k", LVEVAL, record)
        with pytest.raises(EvaluationError) as raised:
            list(load_samples("cmrc_mixup_16k", folder))
        assert str(raised.value) == f"{tmp_path}/cmrc_mixup_16k.jsonl, line 2: {says}"

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"answer": ["v"]}, "the answer is none of the four options. Correct it."),
            ({"options": "wxyz"}, '"options" is no list of texts. Correct it.'),
            ({"options": [1, 2, 3, 4]}, '"options" is no list of texts. Correct it.'),
        ],
    )
    def test_bad_options(self, tmp_path: Path, change: Any, says: str) -> None:
        with pytest.raises(EvaluationError) as raised:
            list(load_samples("longbook_choice_eng", write(tmp_path, "longbook_choice_eng", {**CHOICE, **change})))
        assert str(raised.value).endswith(f"line 1: {says}")

    def test_bytes_that_are_no_text(self, tmp_path: Path) -> None:
        (tmp_path / "passkey.jsonl").write_bytes(b'{"a": "\xe9"}')
        with pytest.raises(EvaluationError, match=r"passkey\.jsonl, line 1: it is not UTF-8"):
            list(load_samples("passkey", str(tmp_path)))

    @pytest.mark.parametrize(
        ("name", "source", "says"),
        [
            ("passkey", ".", ". holds no passkey.jsonl. Give the folder"),
            ("passkey", "empty", "empty/passkey.jsonl is empty"),
            ("passkey", "./nowhere", "there is no folder ./nowhere. Give one with passkey.jsonl or a hub id."),
            ("passkey", "nowhere", "there is no folder nowhere"),
            ("passkey", "notes.txt", "notes.txt is a file. Give the folder with passkey.jsonl."),
            ("cmrc_mixup", ".", "cmrc_mixup has several lengths. Name one: cmrc_mixup_16k, cmrc_mixup_32k"),
            ("zebra", ".", "there is no task 'zebra'"),
        ],
    )
    def test_wrong_places(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, source: str, says: str
    ) -> None:
        monkeypatch.chdir(tmp_path)
        Path("notes.txt").write_text("x")
        Path("empty").mkdir()
        Path("empty/passkey.jsonl").write_text("\n \n")
        with pytest.raises(EvaluationError) as raised:
            list(load_samples(name, source))
        assert says in str(raised.value)


class TestHub:
    def test_what_is_asked_of_the_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[Any] = []

        class Datasets:
            def load_dataset(self, path: str, **options: Any) -> list[Any]:
                calls.append((path, options))
                return [LVEVAL]

        monkeypatch.setattr(samples, "library", lambda *_: Datasets())
        (sample,) = load_samples("cmrc_mixup_16k")
        assert sample.where == "Infinigence/LVEval, cmrc_mixup_16k, record 0"
        list(load_samples("lic_mixup_32k", "somebody/else"))
        assert calls == [
            ("Infinigence/LVEval", {"name": "cmrc_mixup_16k", "split": "test"}),
            ("somebody/else", {"name": "lic_mixup_32k", "split": "test"}),
        ]

    def test_records_through_the_library(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The same call that reads from the hub reads from a folder of the form owner/name."""
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
        Path("owner/name").mkdir(parents=True)
        record = {"context": "1 2", "input": "The largest number?", "options": []}
        write(Path("owner/name"), "math_find", *({**record, "id": n, "answer": [a]} for n, a in enumerate([3, 4])))
        write(Path("owner/name"), "code_debug", {**CHOICE, "answer": ["x", "B"]})
        (target, hub), fields = _of("math_find"), samples.find("math_find").benchmark.fields
        records = list(samples._hub_records(hub, "owner/name", target, fields))
        assert [record["answer"] for _, record in records] == [["3"], ["4"]]
        assert [where for where, _ in records] == [f"owner/name, math_find, record {n}" for n in (0, 1)]

    def test_a_dataset_that_cannot_be_loaded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Datasets:
            def load_dataset(self, path: str, **_: Any) -> None:
                raise RuntimeError("Dataset scripts are no longer\nsupported")

        monkeypatch.setattr(samples, "library", lambda *_: Datasets())
        with pytest.raises(EvaluationError) as raised:
            load_samples("cmrc_mixup_16k")
        assert str(raised.value) == (
            "Infinigence/LVEval: cmrc_mixup_16k cannot be loaded (RuntimeError: Dataset scripts are no longer "
            "supported). Download it and give the folder of its JSONL files."
        )

    def test_without_the_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = builtins.__import__
        monkeypatch.setattr("importlib.import_module", lambda name: real(f"{name}_is_not_there"))
        with pytest.raises(
            EvaluationError, match=r"loading Infinigence/LVEval needs the package datasets.*pip install"
        ):
            load_samples("cmrc_mixup_16k")


def _of(name: str) -> Any:
    target = samples.find(name)
    return target, target.benchmark.hub
