"""Scores, cache and resident memory against the position in the text, as the paper's figure 3 (c) and (d) show them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ahn._home import new_figure, tidy
from ahn.evaluation.drawing import arm_colours

_HEADROOM = 2.5  # times what the arms hold, up to which the line of full attention is drawn


def plot(results: Mapping[str, Any], title: str, exact: int) -> Any:
    """Three panels over one axis of tokens.

    Args:
        results: As `Averages.report` gives them.
        title: What was read, by which model.
        exact: Sinks and window, where a dotted line stands.

    Returns:
        A `matplotlib.figure.Figure`.
    """
    figure = new_figure(12.5, 4.2)
    scores, cache, process = figure.subplots(1, 3)
    points, colours = results["points"], arm_colours(list(results["points"]["arms"]))
    width = results["positions"]["bin_tokens"]
    for arm, means in results["positions"]["nll"].items():
        middles = [(number + 0.5) * width for number in range(len(means))]
        scores.plot(middles, means, color=colours[arm], label=arm, linewidth=1.3)
    for arm, each in points["arms"].items():
        for panel, name in ((cache, "cache_bytes"), (process, "resident_bytes")):
            megabytes = [value / 1e6 for value in each[name]]
            panel.plot(each["tokens"], megabytes, color=colours[arm], label=f"{arm}: {megabytes[-1]:,.1f}")
    _full_cache(cache, points)
    _finish(cache, "Cache", "MB", exact)
    _finish(process, "Memory of the process", "MB", exact)
    _finish(scores, "Score of a token", "nats", exact)
    figure.suptitle(title, fontsize=12)
    return figure


def _full_cache(panel: Any, points: Mapping[str, Any]) -> None:
    """What full attention would hold, as far as that is not far above all that was measured."""
    if "full" in points["arms"]:
        return
    most = _HEADROOM * max(max(each["cache_bytes"]) for each in points["arms"].values())
    tokens, sizes = points["full_cache"]["tokens"], points["full_cache"]["bytes"]
    label = f"full, computed: {sizes[-1] / 1e6:,.1f}"
    panel.plot(tokens, [value / 1e6 for value in sizes], color="black", linestyle="--", linewidth=1, label=label)
    panel.set_ylim(top=min(most, 1.05 * max(sizes[-1], most / _HEADROOM)) / 1e6)


def _finish(panel: Any, title: str, unit: str, exact: int) -> None:
    panel.axvline(exact, color="grey", linewidth=1, linestyle=":")
    panel.set(title=title, xlabel="tokens read", ylabel=unit)
    panel.set_xlim(left=0)
    if unit == "MB":
        panel.set_ylim(bottom=0)
    panel.locator_params(axis="x", nbins=4)
    panel.xaxis.set_major_formatter(lambda tokens, _: f"{tokens:,.0f}")
    tidy(panel)
    panel.legend(fontsize=9, title=f"{unit} at the end" if unit == "MB" else None, alignment="left")
