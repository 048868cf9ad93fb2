"""The results on QMSum as a page and a figure."""

from __future__ import annotations

import math
from typing import Any

from ahn.evaluation.page import Page
from ahn.evaluation.qmsum.results import BASELINE, Results
from ahn.evaluation.qmsum.run import GROUPS
from ahn.evaluation.report import Report

_EXPLANATION = (
    "Every arm reads a meeting once, then each question about it. The numbers are nats per token of the gold answer; "
    "less is better. The groups say where the annotated evidence is for the last token before the answer; evidence "
    "among the sinks counts as in the window. A layer with a sliding window also reads what the layer below read "
    "further back, so that evicted is not unreachable for window; it is for tail, which is given nothing but the "
    "tokens of sinks and window."
)


def page(report: Report, figure: Any | None) -> Page:
    """The page of a run.

    Args:
        report: The report, its results as `ahn.evaluation.qmsum.results.results` gives them.
        figure: As `figure` draws it, or `None`.
    """
    made, found, arms = Page("QMSum: what is known of a meeting"), report.results, report.settings["arms"]
    made.text(_EXPLANATION)
    columns = ["evidence", "questions", "meetings", *arms]
    made.table(columns, _rows(found, "nats", arms, 3), "Nats per token, with 95 % intervals over meetings.")
    others = [arm for arm in arms if arm != BASELINE]
    if BASELINE in arms and others:
        titles = ["evidence", "questions", "meetings", *(f"{arm} - {BASELINE}" for arm in others)]
        made.table(titles, _rows(found, "difference", others, 3), "Differences over the same meetings, likewise.")
        if figure is not None:
            made.figure(figure, f"Difference to {BASELINE} in nats per token, with 95 % intervals over meetings.")
    if "rouge_l" in found["groups"]["all"]:
        made.table(columns, _rows(found, "rouge_l", arms, 1), "ROUGE-L of greedy answers, 0 to 100, likewise.")
    costs = [[arm, of["tokens"], of["seconds"], of["cache_bytes"]] for arm, of in found["arms"].items()]
    made.table(["arm", "tokens read", "seconds", "largest cache (bytes)"], costs, "What reading the meetings cost.")
    made.heading("Settings")
    made.facts(report.settings)
    made.heading("Measured with")
    made.facts(report.environment)
    return made


def figure(found: Results) -> Any | None:
    """Differences to the baseline by group and arm; `None` where there are none.

    Args:
        found: As `ahn.evaluation.qmsum.results.results` gives it.

    Returns:
        A figure of matplotlib.
    """
    groups = {name: each for name, each in found["groups"].items() if each["queries"]}
    others = list(groups["all"]["difference"])
    if not others:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(8, 1.4 + 0.25 * len(groups) * (len(others) + 1)), layout="constrained")
    FigureCanvasAgg(drawn)
    panel = drawn.subplots()
    for place, arm in enumerate(others):
        rows = [row + 0.15 * (place - (len(others) - 1) / 2) for row in range(len(groups))]
        values = [each["difference"][arm]["value"] for each in groups.values()]
        ends = [each["difference"][arm]["interval"] for each in groups.values()]
        reach = [
            [_reach(value - low) for value, (low, _) in zip(values, ends)],
            [_reach(high - value) for value, (_, high) in zip(values, ends)],
        ]
        panel.errorbar(values, rows, xerr=reach, fmt="o", markersize=4, capsize=2, label=arm)
    panel.axvline(0, color="grey", linewidth=1)
    panel.set(xlabel=f"nats per token, difference to {BASELINE}", yticks=range(len(groups)), yticklabels=list(groups))
    panel.invert_yaxis()
    panel.grid(axis="x", alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend()
    return drawn


def _rows(found: Results, name: str, arms: list[str], digits: int) -> list[list[Any]]:
    return [
        [
            f"{group}: {GROUPS[group]}" if group in GROUPS else group,
            each["queries"],
            each["meetings"],
            *(_with_interval(each[name][arm], digits) for arm in arms),
        ]
        for group, each in found["groups"].items()
        if each["queries"]
    ]


def _with_interval(number: dict[str, Any], digits: int) -> str:
    low, high = number["interval"]
    text = f"{number['value']:.{digits}f}"
    return text if low is None or math.isnan(low) else f"{text} ({low:.{digits}f} to {high:.{digits}f})"


def _reach(distance: float) -> float:
    return max(0.0, distance) if math.isfinite(distance) else 0.0
