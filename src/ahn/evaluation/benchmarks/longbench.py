"""LongBench's six tasks of the paper, to score their predictions; lm-evaluation-harness asks them.

Source: arXiv 2308.14508.
"""

from __future__ import annotations

from ahn.evaluation.benchmarks.base import Benchmark, Language, Rules, Task, by_name


def _task(name: str, new_tokens: int, metric: str, language: Language = "en") -> Task:
    return Task(name, language, Rules(f"longbench.{metric}", new_tokens))


LONGBENCH = Benchmark(
    name="longbench",
    title="LongBench",
    tasks=by_name(
        _task("dureader", 128, "rouge_l_zh", "zh"),
        _task("hotpotqa", 32, "f1_en"),
        _task("musique", 32, "f1_en"),
        _task("narrativeqa", 128, "f1_en"),
        _task("qmsum", 512, "rouge_l"),
        _task("triviaqa", 32, "first_line_f1_en"),
    ),
)
