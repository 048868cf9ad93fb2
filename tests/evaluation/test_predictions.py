"""Predictions from files, ours and the official ones, and the scores and averages made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ahn.evaluation import averages, load_samples, read_predictions, score_predictions
from ahn.evaluation.errors import EvaluationError
from ahn.evaluation.predictions import to_record
from ahn.evaluation.set_scores import to_json

OURS = {"benchmark": "infinitebench", "task": "passkey", "id": 4, "prediction": "It is 71432.", "answers": ["71432"]}
LVEVAL = {"pred": "Paris", "answers": ["in Paris", "x"], "gold_ans": "Paris", "input": "Where?", "length": 13_211}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name: str, *records: Any) -> str:
    lines = [each if isinstance(each, str) else json.dumps(each, ensure_ascii=False) for each in records]
    Path(name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return name


def scores_of(*files: str, task: str | None = None, scoring: Any = "official") -> dict[str, tuple[int, float]]:
    scores = score_predictions(read_predictions(files, task), scoring)
    return {each.target.name: (len(each.items), each.score) for each in scores}


class TestForms:
    def test_ours(self) -> None:
        (found,) = read_predictions([write("mine.jsonl", OURS)])
        assert (found.target.name, found.id, found.text) == ("passkey", 4, "It is 71432.")
        assert (found.answers, found.keywords, found.where) == (("71432",), None, "mine.jsonl, line 1")

    def test_ours_is_what_is_written(self) -> None:
        record = {"input": "谁？", "context": "文章", "answers": ["曹雪芹"], "answer_keywords": "曹雪芹"}
        write("cmrc_mixup_16k.jsonl", record)
        (sample,) = load_samples("cmrc_mixup_16k", ".")
        line = to_record(sample, "是曹雪芹")
        assert line == {
            "benchmark": "lveval",
            "task": "cmrc_mixup_16k",
            "id": 0,
            "prediction": "是曹雪芹",
            "answers": ["曹雪芹"],
            "answer_keywords": "曹雪芹",
        }
        (found,) = read_predictions([write("out.jsonl", line)])
        assert found.target == sample.target
        assert (found.id, found.text, found.answers, found.keywords) == (0, "是曹雪芹", ("曹雪芹",), "曹雪芹")
        assert scores_of("out.jsonl") == {"cmrc_mixup_16k": (1, 66.67)}  # 1 of 2, 1 of 1

    def test_lveval(self) -> None:
        """By its scripts (pred, gold_ans), and with the names of its data set."""
        named = {"prediction": "Rome", "ground_truth": ["Rome"], "answer_keywords": None, "confusing_facts": ["x"]}
        write("hotpotwikiqa_mixup_16k.jsonl", LVEVAL, named, {**named, "answer_keywords": "a b c d e f"})
        first, second, third = read_predictions(["hotpotwikiqa_mixup_16k.jsonl"])
        assert (first.target.length, first.id, first.answers, first.keywords) == ("16k", 1, ("in Paris", "x"), "Paris")
        assert (second.keywords, third.keywords) == (None, "a b c d e f")
        # 2/3, 1 and, behind the gate, 0
        assert scores_of("hotpotwikiqa_mixup_16k.jsonl") == {"hotpotwikiqa_mixup_16k": (3, 55.56)}

    def test_infinitebench(self) -> None:
        write("preds_code_run.jsonl", {"id": 0, "prediction": " -477.", "ground_truth": [-477]})
        write(
            "preds_passkey_0-2.jsonl", {"id": 0, "pred": "71432", "label": "71432"}, {"id": 1, "pred": "", "label": "1"}
        )
        write("preds_longbook_choice_eng.jsonl", {"id": 0, "prediction": "B. x", "ground_truth": ["x", "B"]})
        assert scores_of(".") == {"passkey": (2, 50.0), "longbook_choice_eng": (1, 100.0), "code_run": (1, 100.0)}

    def test_parts_of_a_task(self) -> None:
        write("preds_passkey_0-1.jsonl", {"id": 0, "prediction": "71432", "ground_truth": "71432"})
        write("preds_passkey_1-2.jsonl", {"id": 1, "prediction": "x", "ground_truth": "71432"})
        assert scores_of(".") == {"passkey": (2, 50.0)}

    def test_longbench(self) -> None:
        write(
            "triviaqa.jsonl", {"pred": "\nMiller\nx", "answers": ["Gates", "Miller"], "all_classes": None, "length": 9}
        )
        assert scores_of("triviaqa.jsonl") == {"triviaqa": (1, 100.0)}

    def test_the_papers(self) -> None:
        line = {"pred": "北京是中国的首都", "answers": ["中国的首都是北京"]}
        write("infinitebench_longbook_qa_chn.jsonl", line)
        assert scores_of(".") == {"longbook_qa_chn": (1, 100.0)}
        assert scores_of(".", scoring="paper") == {"longbook_qa_chn": (1, 60.0)}
        write("preds_passkey.jsonl", OURS)
        with pytest.raises(EvaluationError, match="passkey has no scoring of the paper's own"):
            scores_of(".", scoring="paper")

    def test_the_task_is_told(self) -> None:
        line = {key: value for key, value in OURS.items() if key not in ("benchmark", "task")}
        assert scores_of(write("out.jsonl", line), task="passkey") == {"passkey": (1, 100.0)}
        assert scores_of(write("preds_number_string.jsonl", line), task="passkey") == {"passkey": (1, 100.0)}
        assert scores_of(write("preds_passkey.jsonl", {**OURS, "task": "number_string"})) == {
            "number_string": (1, 100.0)
        }
        assert scores_of(write("out.jsonl", OURS), task="passkey") == {"passkey": (1, 100.0)}

    def test_options_give_the_letter(self) -> None:
        line = {"prediction": "B", "answers": ["x"], "options": ["w", "x", "y", "z"]}
        assert scores_of(write("longbook_choice_eng.jsonl", line)) == {"longbook_choice_eng": (1, 100.0)}

    def test_empty_answers_score_nothing(self) -> None:
        empty = {"prediction": "x", "answers": []}
        for name in ("passkey", "longbook_sum_eng", "code_debug", "dureader_mixup_16k", "qmsum"):
            assert scores_of(write(f"{name}.jsonl", empty)) == {name: (1, 0.0)}

    def test_line_breaks_and_byte_order_marks(self) -> None:
        Path("preds_passkey.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(OURS).encode() + b"\r\n\r\n")
        assert scores_of("preds_passkey.jsonl") == {"passkey": (1, 100.0)}


class TestWrongInput:
    @pytest.mark.parametrize(
        ("line", "says"),
        [
            ("{", "it is no JSON (Expecting property name enclosed in double quotes, column 2). Correct it."),
            ('"text"', "it is no JSON object, but str. Correct it."),
            ("[" * 100_000, "it is nested too deeply. Correct it."),
            ({"id": 1, "answers": []}, 'the line has neither "prediction" nor "pred". Correct it or leave it out.'),
            (
                {"id": 1, "prediction": "x"},
                'the line has neither "answers" nor "answer" nor "ground_truth" nor "label". Correct it or leave',
            ),
            ({**OURS, "prediction": None}, "the prediction is no text, but NoneType. Correct it."),
            ({**OURS, "answers": [["71432"]]}, "an answer must be a text or a number, not ['71432']. Correct it."),
            ({**OURS, "answer_keywords": ["x"]}, "the keywords are no text, but list. Correct them."),
            ({**OURS, "task": "passkeys"}, "there is no task 'passkeys'. Did you mean 'passkey'?"),
            ({**OURS, "task": 3}, "there is no task '3'. LV-Eval has "),
            ({**OURS, "benchmark": "lveval"}, "passkey belongs to infinitebench. Correct the benchmark."),
            (
                {"task": "longbook_choice_eng", "prediction": "C", "answers": ["v"], "options": ["w", "x", "y", "z"]},
                "the answer is none of the four options. Correct it.",
            ),
            (
                {"task": "code_debug", "prediction": "C", "answers": ["v"]},
                "the answers must be the function's name and its letter. Correct them.",
            ),
        ],
    )
    def test_a_line_is_named(self, line: Any, says: str) -> None:
        with pytest.raises(EvaluationError) as raised:
            scores_of(write("preds_passkey.jsonl", OURS, line))
        assert str(raised.value).startswith(f"preds_passkey.jsonl, line 2: {says}")

    def test_files(self) -> None:
        Path("nothing").mkdir()
        write("out.jsonl", {"prediction": "x", "answers": ["x"]})
        write("preds_passkey.jsonl")
        for files, task, says in (
            (["nowhere.jsonl"], None, "nowhere.jsonl does not exist. Check the path."),
            (["nothing"], None, "nothing holds no .jsonl file. Give files of predictions or a folder of them."),
            (
                ["preds_passkey.jsonl"],
                None,
                "preds_passkey.jsonl is empty. Give a file with a JSON object in every line.",
            ),
            (["out.jsonl"], None, "out.jsonl, line 1: neither the line nor the file's name tells the task. Name it, "),
            (["out.jsonl"], "passkeys", "there is no task 'passkeys'. Did you mean 'passkey'?"),
        ):
            with pytest.raises(EvaluationError) as raised:
                scores_of(*files, task=task)
            assert str(raised.value).startswith(says)

    def test_another_task_than_the_lines(self) -> None:
        with pytest.raises(
            EvaluationError, match=r"line 1: the line is of passkey, not of number_string. Leave --task out"
        ):
            scores_of(write("out.jsonl", OURS), task="number_string")

    def test_a_record_in_two_files(self) -> None:
        write("a.jsonl", OURS)
        with pytest.raises(EvaluationError) as raised:
            scores_of("a.jsonl", write("b.jsonl", {**OURS, "id": 3}, OURS))
        assert str(raised.value) == (
            "b.jsonl, line 2: passkey 4 is in a.jsonl, line 1 too. Score the files of one model at a time."
        )
        with pytest.raises(EvaluationError, match=r"a.jsonl, line 1: passkey 4 is in a.jsonl, line 1 too"):
            scores_of("a.jsonl", "a.jsonl")


class TestScores:
    def test_rounding_and_averages_by_length(self) -> None:
        third, right, wrong = ({"pred": text, "answers": ["Paris"]} for text in ("Paris in x y z", "Paris", "Rome"))
        write("factrecall_en_16k.jsonl", third)  # 1 of 5, 1 of 1: 1/3
        write("hotpotwikiqa_mixup_16k.jsonl", right, right, wrong)  # 2/3
        write("factrecall_en_128k.jsonl", wrong)
        write("preds_longbook_qa_eng.jsonl", {"id": 0, "prediction": "x", "ground_truth": ["x"]})
        write("hotpotqa.jsonl", right)
        scores = score_predictions(read_predictions(["."]))
        assert [(each.target.name, each.score) for each in scores] == [
            ("hotpotwikiqa_mixup_16k", 66.67),
            ("factrecall_en_16k", 33.33),
            ("factrecall_en_128k", 0.0),
            ("longbook_qa_eng", 100.0),
            ("hotpotqa", 100.0),
        ]
        assert [(each.benchmark.name, each.length, each.sets, each.of, each.score) for each in averages(scores)] == [
            ("lveval", "16k", 2, 11, 50.0),
            ("lveval", "128k", 1, 11, 0.0),
            ("infinitebench", None, 1, 12, 100.0),
            ("longbench", None, 1, 6, 100.0),
        ]

    def test_the_papers_average_is_over_two(self) -> None:
        for name, text in (("eng", "x"), ("chn", "y")):
            write(f"preds_longbook_qa_{name}.jsonl", {"id": 0, "prediction": text, "ground_truth": ["x"]})
        (mean,) = averages(score_predictions(read_predictions(["."]), "paper"))
        assert (mean.sets, mean.of, mean.score) == (2, 2, 50.0)

    def test_json(self) -> None:
        scores = score_predictions(read_predictions([write("out.jsonl", OURS)]))
        facts = json.loads(json.dumps(to_json(scores, ["out.jsonl"])))
        assert facts.pop("versions").keys() >= {"ahn"}
        assert facts == {
            "kind": "scores",
            "files": ["out.jsonl"],
            "sets": [
                {
                    "benchmark": "infinitebench",
                    "task": "passkey",
                    "length": None,
                    "scoring": "official",
                    "metric": "infinitebench.first_digits",
                    "items": 1,
                    "score": 100.0,
                    "item_scores": [{"id": 4, "score": 1.0}],
                }
            ],
            "averages": [{"benchmark": "infinitebench", "length": None, "sets": 1, "of": 12, "score": 100.0}],
        }
