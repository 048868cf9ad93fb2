"""LV-Eval: eleven sets of question answering, each in five lengths, with keyword-gated metrics.

Source: arXiv 2402.05136.
"""

from __future__ import annotations

from ahn.evaluation.benchmarks.schema import Benchmark, Fields, Hub, Language, Rules, Task, by_name
from ahn.evaluation.benchmarks.templates import OFFICIAL


def _task(name: str, items: int, new_tokens: int, metric: str, language: Language) -> Task:
    return Task(name, language, Rules(f"lveval.{metric}", new_tokens, OFFICIAL[name], truncation="halves"), items=items)


LVEVAL = Benchmark(
    name="lveval",
    title="LV-Eval",
    lengths=("16k", "32k", "64k", "128k", "256k"),
    hub=Hub("Infinigence/LVEval", split="test", config="{set}"),
    fields=Fields(context="context", question="input", answers="answers", keywords="answer_keywords"),
    tasks=by_name(
        _task("hotpotwikiqa_mixup", 124, 64, "gated_f1_en", "en"),
        _task("loogle_SD_mixup", 160, 64, "gated_f1_en", "en"),
        _task("loogle_CR_mixup", 99, 64, "gated_f1_en", "en"),
        _task("loogle_MIR_mixup", 139, 64, "gated_f1_en", "en"),
        _task("multifieldqa_en_mixup", 101, 64, "gated_f1_en", "en"),
        _task("multifieldqa_zh_mixup", 133, 64, "gated_f1_zh", "zh"),
        _task("factrecall_en", 200, 16, "f1_en", "en"),
        _task("factrecall_zh", 200, 16, "f1_zh", "zh"),
        _task("cmrc_mixup", 200, 64, "gated_f1_zh", "zh"),
        _task("lic_mixup", 197, 64, "gated_f1_zh", "zh"),
        _task("dureader_mixup", 176, 64, "rouge_l_without_blacklist_zh", "zh"),
    ),
)
