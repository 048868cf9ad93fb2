"""LongBench's six tasks of the paper.

Source: arXiv 2308.14508.
"""

from __future__ import annotations

from ahn.evaluation.benchmarks.schema import Benchmark, Fields, Hub, Language, Rules, Task, by_name
from ahn.evaluation.benchmarks.templates import OFFICIAL


def _task(name: str, new_tokens: int, metric: str, language: Language = "en", chat: bool = True) -> Task:
    rules = Rules(f"longbench.{metric}", new_tokens, OFFICIAL[name], truncation="halves", chat=chat)
    return Task(name, language, rules, items=200)


LONGBENCH = Benchmark(
    name="longbench",
    title="LongBench",
    hub=Hub("Xnhyacinth/LongBench", split="test", config="{set}"),
    fields=Fields(context="context", question="input", answers="answers", question_in_copies="question"),
    tasks=by_name(
        _task("dureader", 128, "rouge_l_zh", "zh"),
        _task("hotpotqa", 32, "f1_en"),
        _task("musique", 32, "f1_en"),
        _task("narrativeqa", 128, "f1_en"),
        _task("qmsum", 512, "rouge_l"),
        _task("triviaqa", 32, "first_line_f1_en", chat=False),
    ),
)
