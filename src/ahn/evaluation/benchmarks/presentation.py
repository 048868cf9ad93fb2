"""The results of a run over benchmarks as tables, a page and a figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ahn._home import new_figure, tidy
from ahn.evaluation.benchmarks import BENCHMARKS
from ahn.evaluation.benchmarks.side_by_side import BASELINE, Results
from ahn.evaluation.metrics import METRICS
from ahn.evaluation.page import Page
from ahn.evaluation.tables import ResultTable, with_interval


def score_table(results: Results, arms: Sequence[str]) -> ResultTable:
    """A row for every set, and below them the averages; a column for every arm.

    Args:
        results: As `summarise` gives them.
        arms: Names of the arms.
    """
    rows = [
        [set_name(each), each["items"], *(f"{each['scores'][arm]['score']:.2f}" for arm in arms)]
        for each in results["sets"]
    ]
    first = len(rows)
    rows += [[_average_name(mean), "", *_average_scores(mean, arms)] for mean in results["averages"]]
    styles: dict[Any, str] = dict.fromkeys(range(first, len(rows)), "bold")
    return ResultTable(["set", "items", *arms], rows, "", arms, styles, [first])


def harness_table(rows: Sequence[dict[str, Any]], arms: Sequence[str]) -> ResultTable:
    """A row for every metric of every task of lm-evaluation-harness, as the harness gives it.

    Args:
        rows: As `ahn.evaluation.harness.tasks.evaluate` gives them.
        arms: Names of the arms.
    """
    cells = [[row["task"], row["metric"], row["items"], *(row["scores"].get(arm) for arm in arms)] for row in rows]
    return ResultTable(["task", "metric", "items", *arms], cells, "", arms)


def make_page(report: dict[str, Any], arms: Sequence[str]) -> Page:
    """The page of a run.

    Args:
        report: What `summarise` gave as `benchmarks` and what `ahn.evaluation.harness` gave as `harness`; either may be
            missing.
        arms: Names of the arms.
    """
    page = Page("Benchmarks: the arms side by side")
    if (results := report.get("benchmarks")) is not None:
        page.heading("Scores")
        page.table(_detailed(results, arms))
        others = [arm for arm in arms if arm != BASELINE]
        if BASELINE in arms and others:
            rows = [[set_name(each), *(_interval(each["differences"][a]) for a in others)] for each in results["sets"]]
            titles = [f"{arm} - {BASELINE}" for arm in others]
            page.table(ResultTable(["set", *titles], rows, "Differences over the same records, with 95 % intervals."))
        page.figure("scores", figure(results), "Score of every set by arm, with 95 % intervals over its records.")
        names = ("tokens", "seconds", "cache_bytes")
        costs = [[arm, *(row[name] for name in names)] for arm, row in results["arms"].items()]
        columns = ["arm", "tokens read", "seconds", "largest cache (bytes)"]
        page.table(ResultTable(columns, costs, "What it cost, answers included."))
    if (harness := report.get("harness")) is not None:
        page.heading("lm-evaluation-harness")
        page.text("As the harness gives them, without an interval of ours.")
        page.table(harness_table(harness, arms))
    return page


def figure(results: Results) -> Any:
    """Bars of every set's scores, one for each arm.

    Args:
        results: As `summarise` gives them.

    Returns:
        A figure of matplotlib.
    """
    sets, arms = results["sets"], list(results["arms"])
    drawn = new_figure(8, 1.2 + 0.22 * len(sets) * (len(arms) + 1))
    panel, height = drawn.subplots(), 0.8 / len(arms)
    for number, arm in enumerate(arms):
        scores = [each["scores"][arm]["score"] for each in sets]
        ends = [each["scores"][arm]["interval"] for each in sets]
        reach = [
            [_reach(score - low) for score, (low, _) in zip(scores, ends)],
            [_reach(high - score) for score, (_, high) in zip(scores, ends)],
        ]
        rows = [row + (number - (len(arms) - 1) / 2) * height for row in range(len(sets))]
        panel.barh(rows, scores, height, xerr=reach, label=arm, error_kw={"elinewidth": 0.8, "capsize": 2})
    panel.set(xlabel="score", xlim=(0, 100), yticks=range(len(sets)), yticklabels=[set_name(each) for each in sets])
    panel.invert_yaxis()
    tidy(panel)
    panel.grid(axis="y", visible=False)
    panel.legend(loc="lower right")
    return drawn


def set_name(result: dict[str, Any]) -> str:
    """The name of a set, with its length where it has one."""
    return result["task"] if result["length"] is None else f"{result['task']}_{result['length']}"


def _average_name(mean: dict[str, Any]) -> str:
    length = "" if mean["length"] is None else f", {mean['length']}"
    return f"average of {mean['sets']} of {mean['of']}{length}"


def _average_scores(mean: dict[str, Any], arms: Sequence[str]) -> list[str]:
    return [f"{mean['scores'][arm]:.2f}" for arm in arms]


def _detailed(results: Results, arms: Sequence[str]) -> ResultTable:
    rows = [
        [
            BENCHMARKS[each["benchmark"]].title,
            set_name(each),
            METRICS[each["metric"]].title,
            each["items"] if each["of"] in (None, each["items"]) else f"{each['items']:,} of {each['of']:,}",
            *(_interval(each["scores"][arm]) for arm in arms),
        ]
        for each in results["sets"]
    ]
    rows += [
        [BENCHMARKS[mean["benchmark"]].title, _average_name(mean), "", "", *_average_scores(mean, arms)]
        for mean in results["averages"]
    ]
    columns = ["benchmark", "set", "metric", "items", *arms]
    return ResultTable(columns, rows, "0 to 100, with 95 % intervals over records.")


def _reach(distance: float) -> float:
    """A distance from a bar's end; the rounded score may lie beyond the interval's end by a hundredth."""
    return max(0.0, distance) if math.isfinite(distance) else 0.0


def _interval(score: dict[str, Any]) -> str:
    low, high = score["interval"]
    return with_interval(score["score"], low, high, ends=1)
