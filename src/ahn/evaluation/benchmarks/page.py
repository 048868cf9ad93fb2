"""The results of a run over benchmarks as a page and a figure."""

from __future__ import annotations

import math
from typing import Any

from ahn.evaluation.benchmarks import BENCHMARKS
from ahn.evaluation.benchmarks.summary import BASELINE, Results
from ahn.evaluation.metrics import METRICS
from ahn.evaluation.page import Page
from ahn.evaluation.report import EvaluationReport


def page(report: EvaluationReport, figure: Any | None) -> Page:
    """The page of a run.

    Args:
        report: The report, whose results hold what `results` gave as `benchmarks` and, of tasks of
            lm-evaluation-harness, what `ahn.evaluation.harness` gave as `harness`; either may be missing.
        figure: As `figure` draws it, or `None`.
    """
    made, arms = Page("Benchmarks: the arms side by side"), report.settings["arms"]
    if (found := report.results.get("benchmarks")) is not None:
        _add_scores(made, found, arms)
        if figure is not None:
            made.figure(figure, "Score of every set by arm, with 95 % intervals over its records.")
        _add_costs(made, found)
    if (rows := report.results.get("harness")) is not None:
        made.heading("lm-evaluation-harness")
        columns = ["task", "metric", "items", *arms]
        cells = [[row["task"], row["metric"], row["items"], *(row["scores"].get(arm) for arm in arms)] for row in rows]
        made.table(columns, cells, "As the harness gives them, without an interval of ours.")
    made.heading("Settings")
    made.facts(report.settings)
    made.heading("Measured with")
    made.facts(report.environment)
    return made


def figure(found: Results) -> Any:
    """Bars of every set's scores, one for each arm.

    Args:
        found: As `ahn.evaluation.benchmarks.summary.results` gives it.

    Returns:
        A figure of matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sets, arms = found["sets"], list(found["arms"])
    drawn = Figure(figsize=(8, 1.2 + 0.22 * len(sets) * (len(arms) + 1)), layout="constrained")
    FigureCanvasAgg(drawn)
    panel = drawn.subplots()
    height = 0.8 / len(arms)
    for place, arm in enumerate(arms):
        scores = [each["scores"][arm]["score"] for each in sets]
        ends = [each["scores"][arm]["interval"] for each in sets]
        reach = [
            [_reach(s - low) for s, (low, _) in zip(scores, ends)],
            [_reach(h - s) for s, (_, h) in zip(scores, ends)],
        ]
        rows = [row + (place - (len(arms) - 1) / 2) * height for row in range(len(sets))]
        panel.barh(rows, scores, height, xerr=reach, label=arm, error_kw={"elinewidth": 0.8, "capsize": 2})
    panel.set(xlabel="score", xlim=(0, 100), yticks=range(len(sets)), yticklabels=[set_name(each) for each in sets])
    panel.invert_yaxis()
    panel.grid(axis="x", alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(loc="lower right")
    return drawn


def set_name(found: dict[str, Any]) -> str:
    """The name of a set, with its length where it has one."""
    return found["task"] if found["length"] is None else f"{found['task']}_{found['length']}"


def _reach(distance: float) -> float:
    """A distance from a bar's end; the rounded score may lie beyond the interval's end by a hundredth."""
    return max(0.0, distance) if math.isfinite(distance) else 0.0


def _add_scores(made: Page, found: Results, arms: list[str]) -> None:
    made.heading("Scores")
    rows = [
        [
            BENCHMARKS[each["benchmark"]].title,
            set_name(each),
            METRICS[each["metric"]].title,
            each["items"] if each["of"] in (None, each["items"]) else f"{each['items']:,} of {each['of']:,}",
            *(_with_interval(each["scores"][arm]) for arm in arms),
        ]
        for each in found["sets"]
    ]
    for each in found["averages"]:
        length = "" if each["length"] is None else f" at {each['length']}"
        name = f"average of {each['sets']} of {each['of']} sets{length}"
        rows.append([BENCHMARKS[each["benchmark"]].title, name, "", "", *(f"{each['scores'][a]:.2f}" for a in arms)])
    made.table(["benchmark", "set", "metric", "items", *arms], rows, "0 to 100, with 95 % intervals over records.")
    others = [arm for arm in arms if arm != BASELINE]
    if BASELINE in arms and others:
        differences = [
            [set_name(each), *(_with_interval(each["differences"][a]) for a in others)] for each in found["sets"]
        ]
        titles = [f"{arm} - {BASELINE}" for arm in others]
        made.table(["set", *titles], differences, "Differences over the same records, with 95 % intervals.")


def _add_costs(made: Page, found: Results) -> None:
    rows = [[arm, of["tokens"], of["seconds"], of["cache_bytes"]] for arm, of in found["arms"].items()]
    made.table(["arm", "tokens read", "seconds", "largest cache (bytes)"], rows, "What it cost, answers included.")


def _with_interval(score: dict[str, Any]) -> str:
    low, high = score["interval"]
    text = f"{score['score']:.2f}"
    return text if low is None or math.isnan(low) else f"{text} ({low:.1f} to {high:.1f})"
