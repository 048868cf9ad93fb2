"""LV-Eval: eleven sets of question answering, each in five lengths, with keyword-gated metrics.

Source: arXiv 2402.05136. The prompts have the shape of the published ones and words of their own.
"""

from __future__ import annotations

from ahn.evaluation.benchmarks.schema import Benchmark, Fields, Hub, Language, Rules, Task, by_name

_FRAMES: dict[Language, str] = {
    "en": "{how}\n\nArticle: {{context}}\n\n{how}\n\nQuestion: {{question}}\nAnswer:",
    "zh": "{how}\n\n文章：{{context}}\n\n{how}\n\n问题：{{question}}\n回答：",
}
_SOME_EN = (
    "Read the article and answer the question that follows it. What you need stands in several of its passages. "
    "Write the answer alone, without any other words."
)
_ONE_EN = (
    "Read the article and answer the question that follows it. What you need stands in a single one of its passages. "
    "Write the answer alone, without any other words."
)
_BARE_EN = "Use the article to answer the question."
_ONE_ZH = "请阅读文章后回答问题，所需的内容只在其中某一段里。请直接用中文写出答案，不要写别的话。"
_BARE_ZH = "请依据文章回答问题。"
_PASSAGE_ZH = "下面的文章由许多段落组成，其中一段与问题有关。请找到这一段，再依据它回答问题。"


def _task(name: str, items: int, new_tokens: int, metric: str, language: Language, how: str) -> Task:
    prompt = _FRAMES[language].format(how=how)
    return Task(name, language, Rules(f"lveval.{metric}", new_tokens, prompt, truncation="halves"), items=items)


LVEVAL = Benchmark(
    name="lveval",
    title="LV-Eval",
    lengths=("16k", "32k", "64k", "128k", "256k"),
    hub=Hub("Infinigence/LVEval", split="test", config="{set}"),
    fields=Fields(context="context", question="input", answers="answers", keywords="answer_keywords"),
    tasks=by_name(
        _task("hotpotwikiqa_mixup", 124, 64, "gated_f1_en", "en", _SOME_EN),
        _task("loogle_SD_mixup", 160, 64, "gated_f1_en", "en", _ONE_EN),
        _task("loogle_CR_mixup", 99, 64, "gated_f1_en", "en", _ONE_EN),
        _task("loogle_MIR_mixup", 139, 64, "gated_f1_en", "en", _ONE_EN),
        _task("multifieldqa_en_mixup", 101, 64, "gated_f1_en", "en", _ONE_EN),
        _task("multifieldqa_zh_mixup", 133, 64, "gated_f1_zh", "zh", _ONE_ZH),
        _task("factrecall_en", 200, 16, "f1_en", "en", _BARE_EN),
        _task("factrecall_zh", 200, 16, "f1_zh", "zh", _BARE_ZH),
        _task("cmrc_mixup", 200, 64, "gated_f1_zh", "zh", _PASSAGE_ZH),
        _task("lic_mixup", 197, 64, "gated_f1_zh", "zh", _PASSAGE_ZH),
        _task("dureader_mixup", 176, 64, "rouge_l_without_blacklist_zh", "zh", _PASSAGE_ZH),
    ),
)
