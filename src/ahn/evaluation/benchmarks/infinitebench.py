"""InfiniteBench: twelve tasks over texts of 100,000 tokens and more, and the paper's own way with two of them.

Source: arXiv 2402.13718; for the paper's rules arXiv 2510.07318. The prompts have the shape of the published ones and
words of their own.
"""

from __future__ import annotations

import dataclasses

from ahn.evaluation.benchmarks.schema import Benchmark, Fields, Hub, Language, Rules, Task, by_name

_PASSKEY = """\
Somewhere in the long text below stands a pass key; the rest does not matter. Look for it and keep it in mind.

{context}

{question} The pass key is"""
_NUMBER_STRING = """\
Somewhere in the long text below stands a sequence of digits; the rest does not matter. Look for it and keep it in mind.

{context}

{question} The sequence of digits is"""
_KV_RETRIEVAL = """\
Below is a JSON object that gives a value to each of many keys. Find the value of one key.

{context}

{question}"""
_SUM = """\
Read the book below and sum it up.

{context}

Summary of the book:"""
_QA_EN = """\
Read the book below and answer a question about it in as few words as you can.

{context}

Question: {question}
Answer:"""
_QA_ZH = """\
请阅读下面这本书，然后用尽量少的字回答一个问题。

{context}

问题：{question}
答案："""
_CHOICE = """\
Read the book below and choose the right one of four answers to a question about it.

{context}

Question: {question}
A. {OPTION_A}
B. {OPTION_B}
C. {OPTION_C}
D. {OPTION_D}

Give the letter of the right answer alone.
Answer:"""
_DIALOGUE = """\
In the script below the name of one character was replaced by $$MASK$$. Work out whose name it is.

{context}

{question} Give the name alone.
Name:"""
_DEBUG = """\
One function in the project below was broken on purpose. Find it among the four that are named at the end.

{context}

Which of these functions has the bug?
A. {OPTION_A}
B. {OPTION_B}
C. {OPTION_C}
D. {OPTION_D}

Give the letter of the function alone.
Answer:"""
_RUN = """\
Below are many Python functions that call one another and add or subtract small numbers.

{context}

Work out what {func_call} returns, and give that number alone.
Value:"""
_CALC = """\
Work through the sum below from left to right. After each of its numbers write down the result, with commas between.

{context}

Results:"""
_FIND = """\
Below is a long list of numbers.

{context}

{question}"""
_PAPER = """\
Below are a story and a question about it. Reply with a few words that answer the question, and nothing else.

Story: {context}

Question: {question}
Answer:"""


def _task(name: str, new_tokens: int, prompt: str, metric: str | None = None, language: Language = "en") -> Task:
    rules = Rules(f"infinitebench.{metric or name}", new_tokens, prompt)
    return Task(name, language, rules, choice="{OPTION_A}" in prompt)


def _also_in_the_paper(task: Task, metric: str) -> Task:
    rules = Rules(f"longbench.{metric}", 256, _PAPER, truncation="left", max_tokens=128_000)
    return dataclasses.replace(task, paper=rules)


INFINITEBENCH = Benchmark(
    name="infinitebench",
    title="InfiniteBench",
    hub=Hub("xinrongzhang2022/InfiniteBench", split="{set}", file="{set}.jsonl", answers_as_text=True),
    fields=Fields(context="context", question="input", answers="answer", options="options"),
    tasks=by_name(
        _task("passkey", 6, _PASSKEY, "first_digits"),
        _task("number_string", 12, _NUMBER_STRING, "first_digits"),
        _task("kv_retrieval", 50, _KV_RETRIEVAL),
        _task("longbook_sum_eng", 1200, _SUM),
        _also_in_the_paper(_task("longbook_qa_eng", 40, _QA_EN), "rouge_l"),
        _also_in_the_paper(_task("longbook_qa_chn", 40, _QA_ZH, language="zh"), "rouge_l_zh"),
        _task("longbook_choice_eng", 40, _CHOICE),
        _task("longdialogue_qa_eng", 40, _DIALOGUE),
        _task("code_debug", 5, _DEBUG),
        _task("code_run", 5, _RUN),
        _task("math_calc", 30_000, _CALC),
        _task("math_find", 3, _FIND),
    ),
)
