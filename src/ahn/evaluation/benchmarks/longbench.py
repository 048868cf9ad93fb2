"""LongBench's six tasks of the paper.

Source: arXiv 2308.14508. The prompts have the shape of the published ones and words of their own.
"""

from __future__ import annotations

import dataclasses

from ahn.evaluation.benchmarks.schema import Benchmark, Fields, Hub, Language, Rules, Task, by_name

_PASSAGES = """\
Below are several passages. Use them to answer the question that follows, and write the answer alone.

{context}

Use the passages above to answer the question, and write the answer alone.

Question: {question}
Answer:"""
_STORY = """\
Below is a story, a book or the script of a film. Answer the question that follows it with a single phrase if you can, \
and explain nothing.

Story: {context}

Answer the question about the story with a single phrase if you can, and explain nothing.

Question: {question}

Answer:"""
_MEETING = """\
Below is the transcript of a meeting. Answer the question that follows it in one or more sentences.

Transcript:
{context}

Answer the question about the meeting in one or more sentences.

Question: {question}
Answer:"""
_EXAMPLES = """\
Use the passage to answer the question, and write the answer alone. Some examples come first.

{context}

{question}"""
_PASSAGES_ZH = """\
请阅读下面的文章，然后回答问题。

文章：{context}

请依据上面的文章回答问题。

问题：{question}
回答："""


def _task(name: str, new_tokens: int, metric: str, prompt: str, language: Language = "en") -> Task:
    return Task(name, language, Rules(f"longbench.{metric}", new_tokens, prompt, truncation="halves"), items=200)


def _of_examples(task: Task) -> Task:
    return dataclasses.replace(task, official=dataclasses.replace(task.official, chat=False))


LONGBENCH = Benchmark(
    name="longbench",
    title="LongBench",
    hub=Hub("Xnhyacinth/LongBench", split="test", config="{set}"),
    fields=Fields(context="context", question="input", answers="answers", question_in_copies="question"),
    tasks=by_name(
        _task("dureader", 128, "rouge_l_zh", _PASSAGES_ZH, "zh"),
        _task("hotpotqa", 32, "f1_en", _PASSAGES),
        _task("musique", 32, "f1_en", _PASSAGES),
        _task("narrativeqa", 128, "f1_en", _STORY),
        _task("qmsum", 512, "rouge_l", _MEETING),
        _of_examples(_task("triviaqa", 32, "first_line_f1_en", _EXAMPLES)),
    ),
)
