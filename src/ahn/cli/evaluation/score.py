"""`ahn eval score`: scores of predictions that were made before, without a model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ahn._home import write_text
from ahn.cli import checks
from ahn.cli.options import from_fields
from ahn.cli.terminal import log, output
from ahn.config import setting
from ahn.evaluation.benchmarks.schema import Scoring
from ahn.evaluation.tables import ResultTable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ahn.evaluation import Average, SetScore

EXAMPLES = """Examples:

ahn eval score predictions.jsonl

ahn eval score preds_longbook_qa_eng.jsonl --scoring paper

ahn eval score lveval-outputs --json scores.json  [dim]# all files of a folder[/dim]
"""
SCORINGS = ("official", "paper")
SCORING_HELP = "The benchmark's rules or, for En.QA and Zh.QA, the paper's."


@dataclasses.dataclass(frozen=True)
class ScoreSettings:
    """What is scored, and by whose rules."""

    files: tuple[str, ...] = setting(
        help="Predictions in JSONL, ours or the official scripts', or a folder.", argument=True, metavar="FILE"
    )
    task: str | None = setting(None, "Task of lines that name none.", unset="as the file is named")
    scoring: Scoring = setting("official", SCORING_HELP, choices=SCORINGS)
    json: Path | None = setting(None, "Also write everything to this file.")


@from_fields
def command(settings: ScoreSettings) -> None:
    """Score predictions of LV-Eval, InfiniteBench and LongBench again, without a model."""
    target = None if settings.json is None else settings.json.expanduser()
    checks.file_to_write("--json", target, settings.files)
    from ahn.evaluation import averages, read_predictions, score_predictions
    from ahn.evaluation.set_scores import to_json

    left_out: list[str] = []
    scores = score_predictions(read_predictions(settings.files, settings.task, left_out.append), settings.scoring)
    for reason in left_out:
        log(f"left out: {reason}", "yellow")
    for title in dict.fromkeys(each.target.benchmark.title for each in scores):
        mine = [each for each in scores if each.target.benchmark.title == title]
        _table(title, mine, averages(mine)).print(output())
    if target is not None:
        facts = to_json(scores, settings.files, left_out)
        write_text(target, json.dumps(facts, indent=2, ensure_ascii=False) + "\n", settings.files)
        log(f"wrote {target}", console=output())


def _table(title: str, scores: Sequence[SetScore], means: Sequence[Average]) -> ResultTable:
    """A row for every set of one benchmark, and below them the averages."""
    rows = []
    for each in scores:
        whole = each.target.task.items
        items = f"{len(each.items):,}" if whole in (None, len(each.items)) else f"{len(each.items):,} of {whole:,}"
        rows.append([each.target.task.name, each.target.length, each.metric.title, items, f"{each.score:.2f}"])
    rows += [[f"average of {mean.sets} of {mean.of}", mean.length, "", "", f"{mean.score:.2f}"] for mean in means]
    columns = ["task", "length", "metric", "items", "score"]
    styles: dict[Any, str] = dict.fromkeys(range(len(scores), len(rows)), "bold")
    return ResultTable(columns, rows, title, styles=styles, sections=[len(scores)])
