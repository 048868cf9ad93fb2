"""The benchmarks as data: names, numbers and prompts; how a name finds its task; truncation; prompts from a file."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import pytest

from ahn.errors import ConfigError
from ahn.evaluation.benchmarks import BENCHMARKS, find, find_in_file_name
from ahn.evaluation.benchmarks.prompts import PLACEHOLDERS, build_prompt, fill, read_prompts
from ahn.evaluation.benchmarks.schema import Sample
from ahn.evaluation.benchmarks.truncation import truncate
from ahn.evaluation.errors import EvaluationError
from ahn.evaluation.metrics import METRICS

TASKS = [task for benchmark in BENCHMARKS.values() for task in benchmark.tasks.values()]


class Words:
    """A tokenizer of words whose texts begin without a space, as those of many models do."""

    def __init__(self) -> None:
        self.known: list[str] = []

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        self.known = text.split(" ")
        return {"input_ids": list(range(len(self.known)))}

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return " ".join(self.known[index] for index in ids)

    def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool, add_generation_prompt: bool) -> str:
        assert (tokenize, add_generation_prompt) == (False, True)
        return "".join(f"<{each['role']}>{each['content']}" for each in messages) + "<assistant>"


def sample(name: str, **values: Any) -> Sample:
    given = {"context": "The long text.", "question": "What now?", "answers": ("this",), **values}
    return Sample("data, record 0", find(name), 0, **given)


class TestData:
    def test_lveval(self) -> None:
        benchmark = BENCHMARKS["lveval"]
        assert benchmark.lengths == ("16k", "32k", "64k", "128k", "256k")
        rows = {
            name: (task.items, task.official.new_tokens, task.official.metric.removeprefix("lveval."))
            for name, task in benchmark.tasks.items()
        }
        assert rows == {
            "hotpotwikiqa_mixup": (124, 64, "gated_f1_en"),
            "loogle_SD_mixup": (160, 64, "gated_f1_en"),
            "loogle_CR_mixup": (99, 64, "gated_f1_en"),
            "loogle_MIR_mixup": (139, 64, "gated_f1_en"),
            "multifieldqa_en_mixup": (101, 64, "gated_f1_en"),
            "multifieldqa_zh_mixup": (133, 64, "gated_f1_zh"),
            "factrecall_en": (200, 16, "f1_en"),
            "factrecall_zh": (200, 16, "f1_zh"),
            "cmrc_mixup": (200, 64, "gated_f1_zh"),
            "lic_mixup": (197, 64, "gated_f1_zh"),
            "dureader_mixup": (176, 64, "rouge_l_without_blacklist_zh"),
        }
        assert {task.official.truncation for task in benchmark.tasks.values()} == {"halves"}

    def test_infinitebench(self) -> None:
        benchmark = BENCHMARKS["infinitebench"]
        assert {name: task.official.new_tokens for name, task in benchmark.tasks.items()} == {
            "passkey": 6,
            "number_string": 12,
            "kv_retrieval": 50,
            "longbook_sum_eng": 1200,
            "longbook_qa_eng": 40,
            "longbook_qa_chn": 40,
            "longbook_choice_eng": 40,
            "longdialogue_qa_eng": 40,
            "code_debug": 5,
            "code_run": 5,
            "math_calc": 30_000,
            "math_find": 3,
        }
        assert {task.official.truncation for task in benchmark.tasks.values()} == {"middle"}
        assert [name for name, task in benchmark.tasks.items() if task.choice] == ["longbook_choice_eng", "code_debug"]

    def test_the_papers_rules(self) -> None:
        own = {task.name: task.paper for task in TASKS if task.paper is not None}
        assert list(own) == ["longbook_qa_eng", "longbook_qa_chn"]
        assert {(each.new_tokens, each.truncation, each.max_tokens) for each in own.values()} == {
            (256, "left", 128_000)
        }
        assert len({each.prompt for each in own.values()}) == 1
        with pytest.raises(EvaluationError, match="passkey has no scoring of the paper's own"):
            find("passkey").task.rules("paper")

    def test_longbench(self) -> None:
        tasks = BENCHMARKS["longbench"].tasks
        assert {name: task.official.new_tokens for name, task in tasks.items()} == {
            "dureader": 128,
            "hotpotqa": 32,
            "musique": 32,
            "narrativeqa": 128,
            "qmsum": 512,
            "triviaqa": 32,
        }

    def test_every_metric_is_known_and_used(self) -> None:
        rules = [each for task in TASKS for each in (task.official, task.paper) if each is not None]
        assert {each.metric for each in rules} == set(METRICS)

    @pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
    def test_prompts_have_their_shape(self, task: Any) -> None:
        for rules in filter(None, (task.official, task.paper)):
            names = [name for _, name, _, _ in string.Formatter().parse(rules.prompt) if name]
            assert names.count("context") == 1
            assert set(names) <= set(PLACEHOLDERS)
            assert rules.prompt == rules.prompt.strip()

    @pytest.mark.parametrize("task", BENCHMARKS["lveval"].tasks.values(), ids=lambda task: task.name)
    def test_lveval_prompts_say_what_to_do_twice(self, task: Any) -> None:
        first, article, second, question = task.official.prompt.split("\n\n")
        assert first == second
        assert article == {"en": "Article: {context}", "zh": "文章：{context}"}[task.language]
        assert question == {"en": "Question: {question}\nAnswer:", "zh": "问题：{question}\n回答："}[task.language]


class TestNames:
    @pytest.mark.parametrize(
        ("name", "found"),
        [
            ("passkey", ("infinitebench", "passkey", None)),
            ("cmrc_mixup_16k", ("lveval", "cmrc_mixup", "16k")),
            ("loogle_SD_mixup_256k", ("lveval", "loogle_SD_mixup", "256k")),
            ("factrecall_zh", ("lveval", "factrecall_zh", None)),
            ("dureader_mixup_32k", ("lveval", "dureader_mixup", "32k")),
            ("dureader", ("longbench", "dureader", None)),
        ],
    )
    def test_found(self, name: str, found: Any) -> None:
        target = find(name)
        assert (target.benchmark.name, target.task.name, target.length) == found
        assert target.name == name

    @pytest.mark.parametrize(
        ("name", "says"),
        [
            ("passkeys", "there is no task 'passkeys'. Did you mean 'passkey'?"),
            ("zebra", "there is no task 'zebra'. LV-Eval has hotpotwikiqa_mixup, "),
            ("cmrc_mixup_8k", "cmrc_mixup has no length 8k: its lengths are 16k, 32k, 64k, 128k, 256k."),
            ("passkey_16k", "passkey has no length 16k: it has no lengths."),
            ("", "there is no task ''."),
        ],
    )
    def test_unknown(self, name: str, says: str) -> None:
        with pytest.raises(EvaluationError) as raised:
            find(name)
        assert str(raised.value).startswith(says)

    @pytest.mark.parametrize(
        ("file", "name"),
        [
            ("passkey.jsonl", "passkey"),
            ("preds_passkey.jsonl", "passkey"),
            ("preds_longbook_qa_eng_0-20.jsonl", "longbook_qa_eng"),
            ("infinitebench_longbook_qa_chn.jsonl", "longbook_qa_chn"),
            ("cmrc_mixup_64k.jsonl", "cmrc_mixup_64k"),
            ("lveval_cmrc_mixup_64k.jsonl", "cmrc_mixup_64k"),
            ("hotpotqa.ahn.jsonl", "hotpotqa"),
            ("predictions.jsonl", None),
            ("cmrc_mixup_8k.jsonl", None),
            (".jsonl", None),
        ],
    )
    def test_in_file_names(self, file: str, name: str | None) -> None:
        found = find_in_file_name(file)
        assert (found and found.name) == name


class TestTruncation:
    TEXT = "one two three four five six seven"

    @pytest.mark.parametrize(
        ("how", "most", "left"),
        [
            ("halves", 7, TEXT),
            ("halves", 6, "one two threefive six seven"),  # two texts, joined as they are
            ("halves", 5, "one twosix seven"),  # int(5 / 2) of each
            ("halves", 2, "oneseven"),
            ("middle", 7, TEXT),
            ("middle", 6, "one two three five six seven"),  # one text
            ("middle", 5, "one two six seven"),
            ("left", 7, TEXT),
            ("left", 6, "four five six seven"),  # with room for two new tokens
            ("left", 3, "seven"),
        ],
    )
    def test_what_stays(self, how: Any, most: int, left: str) -> None:
        tokenizer: Any = Words()
        assert truncate(self.TEXT, tokenizer, most, how, new_tokens=2) == left

    @pytest.mark.parametrize(("how", "most"), [("halves", 1), ("middle", 0), ("left", 2), ("left", -5)])
    def test_no_room(self, how: Any, most: int) -> None:
        tokenizer: Any = Words()
        with pytest.raises(ConfigError, match=f"not {most}"):
            truncate(self.TEXT, tokenizer, most, how, new_tokens=2)


class TestPrompts:
    def test_the_template_comes_after_the_truncation(self) -> None:
        tokenizer: Any = Words()
        prompt = build_prompt(
            sample("cmrc_mixup_16k", context="a b c d e"),
            tokenizer,
            2,
            templates={"cmrc_mixup": "{context}"},
            chat=True,
        )
        assert prompt == "<user>ae<assistant>"

    def test_whole(self) -> None:
        tokenizer: Any = Words()
        prompt = build_prompt(sample("factrecall_en_16k"), tokenizer)
        how = "Use the article to answer the question."
        assert prompt == f"{how}\n\nArticle: The long text.\n\n{how}\n\nQuestion: What now?\nAnswer:"

    def test_the_papers(self) -> None:
        tokenizer: Any = Words()
        book = sample("longbook_qa_chn", context="很 " * 128_000)
        prompt = build_prompt(book, tokenizer, scoring="paper")
        assert len(prompt.split(" ")) == 128_000 - 256
        assert prompt.endswith("很 \n\nQuestion: What now?\nAnswer:")
        assert build_prompt(book, tokenizer).startswith("请")  # without a limit nothing is left out

    def test_braces_in_a_text_are_text(self) -> None:
        assert fill("{context} {input}", sample("kv_retrieval", context='{"a": "{b}"}')) == '{"a": "{b}"} What now?'

    def test_options(self) -> None:
        asked = sample("longbook_choice_eng", options=("w", "x", "y", "z"))
        assert fill("{OPTION_A}{OPTION_B}{OPTION_C}{OPTION_D}", asked) == "wxyz"

    def test_calls_and_targets(self) -> None:
        code = sample("code_run", question="Please give the return value of func_12(-3).")
        assert fill("{func} {func_call}", code) == "func_12 func_12(-3)"
        numbers = sample("math_find", question="Answer with a number. The largest number of the list is: ")
        assert fill("{target}?", numbers) == "the largest number?"

    @pytest.mark.parametrize(
        ("name", "values", "placeholder"),
        [
            ("code_debug", {"options": ("f", "g")}, "{OPTION_C}"),
            ("code_run", {"question": "What comes out?"}, "{func_call}"),
        ],
    )
    def test_a_record_that_lacks_something(self, name: str, values: Any, placeholder: str) -> None:
        tokenizer: Any = Words()
        with pytest.raises(EvaluationError) as raised:
            build_prompt(sample(name, **values), tokenizer)
        assert (
            str(raised.value) == f"data, record 0: nothing in the record fills {placeholder} of the prompt. Correct it."
        )


class TestPromptFiles:
    @pytest.mark.parametrize("name", ["p.json", "p.yaml"])
    def test_they_replace_the_built_in_ones(self, tmp_path: Path, name: str) -> None:
        file = tmp_path / name
        file.write_text(json.dumps({"passkey": "Read {context}. {input}", "cmrc_mixup_16k": "{context}"}))
        templates = read_prompts(file)
        assert templates == {"passkey": "Read {context}. {input}", "cmrc_mixup": "{context}"}
        tokenizer: Any = Words()
        assert build_prompt(sample("passkey"), tokenizer, templates=templates) == "Read The long text.. What now?"
        assert "JSON object" in build_prompt(sample("kv_retrieval"), tokenizer, templates=templates)

    @pytest.mark.parametrize(
        ("name", "text", "says"),
        [
            ("p.json", "{", "p.json is no JSON (Expecting property name enclosed in double quotes, line 1)"),
            ("p.yaml", "a: [", "p.yaml is no YAML ("),
            ("p.json", "[]", "p.json is no object of templates"),
            ("p.json", '{"zebra": "{context}"}', "p.json: there is no task 'zebra'"),
            ("p.json", '{"passkey": 3}', "p.json, passkey: the template is no text"),
            ("p.json", '{"passkey": "{context} {"}', "p.json, passkey: the braces are wrong ("),
            (
                "p.json",
                '{"passkey": "{context} {prefix}"}',
                "passkey: the placeholder {prefix} is unknown. Known are {con",
            ),
            ("p.json", '{"passkey": "{context} {}"}', "p.json, passkey: the placeholder {} is unknown"),
            ("p.json", '{"passkey": "{input}"}', "p.json, passkey: the template has no {context}"),
        ],
    )
    def test_bad_ones(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str, says: str) -> None:
        monkeypatch.chdir(tmp_path)
        Path(name).write_text(text)
        with pytest.raises(EvaluationError) as raised:
            read_prompts(Path(name))
        assert says in str(raised.value)

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(EvaluationError, match=r"none\.json cannot be read \(No such file"):
            read_prompts(tmp_path / "none.json")
        (tmp_path / "latin.json").write_bytes("é".encode("latin-1"))
        with pytest.raises(EvaluationError, match=r"latin\.json is not UTF-8"):
            read_prompts(tmp_path / "latin.json")
