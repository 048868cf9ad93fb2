"""InfiniteBench: twelve tasks over texts of 100,000 tokens and more, and the paper's own way with two of them.

Source: arXiv 2402.13718; for the paper's rules arXiv 2510.07318.
"""

from __future__ import annotations

import dataclasses

from ahn.evaluation.benchmarks.schema import Benchmark, Fields, Hub, Language, Rules, Task, by_name
from ahn.evaluation.benchmarks.templates import OFFICIAL, PAPER


def _task(name: str, new_tokens: int, metric: str | None = None, language: Language = "en") -> Task:
    rules = Rules(f"infinitebench.{metric or name}", new_tokens, OFFICIAL[name])
    return Task(name, language, rules, choice="{OPTION_A}" in rules.prompt)


def _also_in_the_paper(task: Task, metric: str) -> Task:
    rules = Rules(f"longbench.{metric}", 256, PAPER[task.name], truncation="left", max_tokens=128_000)
    return dataclasses.replace(task, paper=rules)


INFINITEBENCH = Benchmark(
    name="infinitebench",
    title="InfiniteBench",
    hub=Hub("xinrongzhang2022/InfiniteBench", split="{set}", file="{set}.jsonl", answers_as_text=True),
    fields=Fields(context="context", question="input", answers="answer", options="options"),
    tasks=by_name(
        _task("passkey", 6, "first_digits"),
        _task("number_string", 12, "first_digits"),
        _task("kv_retrieval", 50),
        _task("longbook_sum_eng", 1200),
        _also_in_the_paper(_task("longbook_qa_eng", 40), "rouge_l"),
        _also_in_the_paper(_task("longbook_qa_chn", 40, language="zh"), "rouge_l_zh"),
        _task("longbook_choice_eng", 40),
        _task("longdialogue_qa_eng", 40),
        _task("code_debug", 5),
        _task("code_run", 5),
        _task("math_calc", 30_000),
        _task("math_find", 3),
    ),
)
