"""Share of the gap to full attention against the bytes of the cache, as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ahn._home import new_figure, tidy
from ahn.evaluation.arm_names import Arm, find_arm

# The colours of Okabe and Ito, which people who do not tell red from green can tell apart; markers differ, too.
_STYLES = {
    "window": {"color": "#0072B2", "marker": "o"},
    "anchors": {"color": "#E69F00", "marker": "s"},
    "memory": {"color": "#009E73", "marker": "^"},
    "memory + anchors": {"color": "#D55E00", "marker": "D"},
    "Compressive Transformer": {"color": "#CC79A7", "marker": "v"},
}
_FURTHER = ("-", "--", ":", "-.")  # lines of one kind with other scores
_BEGINS = {"anchors": "window", "memory": "window", "memory + anchors": "ahn"}
"""The arm that each line begins with: the one that has less."""


def draw_gap(results: Mapping[str, Any], title: str) -> Any:
    """A line for each kind of arm, by what it keeps: a window, anchors, a memory, or both.

    Args:
        results: As `Averages.report` gives them; `full` and `window` are among the arms, and bytes were counted.
        title: What was read, by which model.

    Returns:
        A `matplotlib.figure.Figure`.
    """
    figure = new_figure(8.5, 5.4)
    panel = figure.subplots()
    arms = results["arms"]
    for order, ((kind, score), names) in enumerate(lines(results).items()):
        points = sorted((_point(arms[name]), name) for name in names)
        sizes, shares, lows, highs = zip(*(point for point, _ in points))
        number = sum(line.get_label().startswith(f"{kind} (") for line in panel.get_lines())
        label = f"{kind} ({score})" if score else kind
        style = {**_STYLES[kind], "linestyle": _FURTHER[number % len(_FURTHER)], "linewidth": 2, "markersize": 8}
        # Where two lines meet, the marker of the one that has less is on top.
        panel.plot(sizes, shares, label=label, zorder=4 - order / 10, **style)
        panel.vlines(sizes, lows, highs, color=_STYLES[kind]["color"], alpha=0.5)
        for (size, share, *_), name in points:
            if "+" in name:
                text, offset = f"+{name.split('+')[1].split(':')[0]}", (6, -14)
                panel.annotate(text, (size, share), offset, textcoords="offset points", color=_STYLES[kind]["color"])
    full = arms["full"]["counted_bytes"] / 1e6
    panel.axhline(100, color="black", linestyle="--", linewidth=1)
    panel.annotate(f"full attention: {full:,.0f} MB", (0.01, 100), (0, 4), ("axes fraction", "data"), "offset points")
    panel.set_title(title, fontsize=13)
    panel.set_xlabel("cache, MB", fontsize=13)
    panel.set_ylabel("share of the gap to full attention, %", fontsize=13)
    panel.tick_params(labelsize=12)
    panel.set_ylim(top=108)
    tidy(panel)
    panel.legend(fontsize=12, loc="lower right")
    return figure


def lines(results: Mapping[str, Any]) -> dict[tuple[str, str | None], list[str]]:
    """Names of the arms on each line, by their kind and the score that they name.

    Args:
        results: As for `draw_gap`.
    """
    arms: dict[tuple[str, str | None], list[str]] = {}
    for name in results["arms"]:
        arm = find_arm(name)
        if arm.method in ("full", "tail"):
            continue
        line = arms.setdefault((kind_of(arm), arm.anchor_score), [])
        begin = _BEGINS.get(kind_of(arm), "")
        line += [begin, name] if begin in results["arms"] and begin not in line else [name]
    return arms


def kind_of(arm: Arm) -> str:
    """What an arm reads beside sinks and window, in words."""
    if arm.method in ("ct_max", "ct_mean"):
        return "Compressive Transformer"
    parts = [name for name, has in (("memory", arm.method == "ahn"), ("anchors", arm.anchors)) if has]
    return " + ".join(parts) or "window"


def _point(arm: Mapping[str, Any]) -> tuple[float, ...]:
    """MB, and the share in percent with the ends of its interval; the window's own share is 0."""
    closed = arm["closed"] or {"share": 0.0, "low": 0.0, "high": 0.0}
    return arm["counted_bytes"] / 1e6, *(100 * closed[name] for name in ("share", "low", "high"))
