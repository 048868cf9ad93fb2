"""The state and the gates over a text, drawn.

Legend of shapes: E evicted tokens, L layers with a memory, P snapshots of the state, H query heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from ahn._home import new_figure, tidy
from ahn.evaluation.probing.state import StateTrace

_COLOURS = "cividis"  # looks the same to people who do not tell red from green
_LINE = "#1f5a93"
_COLUMNS = 6
_POINTS = 160  # of a small plot


def draw(trace: StateTrace, sinks: int) -> dict[str, tuple[Any, str]]:
    """Figures of matplotlib by name, each with what it shows: the rank, the write strength and, if any, the decay.

    Args:
        trace: What was measured.
        sinks: Number of sinks, which is the first evicted token's position.
    """
    plots = {
        "rank": (
            _rank(trace),
            "How full the state is: effective rank of each head's state, as a share of the most it can be. Left: at "
            "the end of the text. Right: while it is read, mean over the heads of a layer.",
        ),
        "write": (
            _small_plots(trace, trace.write, sinks, "Write strength"),
            "Write strength of each evicted token (beta, the step dt of Mamba2, or the weight of linearised "
            "attention) in each layer, mean over heads.",
        ),
    }
    if trace.decay is not None:
        caption = "Decay: share of the state that each evicted token lets live, in each layer, mean over heads."
        plots["decay"] = (_small_plots(trace, trace.decay, sinks, "Share of the state that is kept"), caption)
    return plots


def _rank(trace: StateTrace) -> Any:
    figure = new_figure(11, 4.4)
    left, right = figure.subplots(1, 2)
    fullness = trace.fullness
    image = left.imshow(fullness[-1].tolist(), cmap=_COLOURS, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    left.set(title="At the end", xlabel="head", ylabel="layer")
    left.set_yticks(*_layer_ticks(trace.layers))
    figure.colorbar(image, ax=left, label="effective rank / most it can be")
    colours = image.cmap(torch.linspace(0, 0.92, len(trace.layers)).tolist())
    for layer, values, colour in zip(trace.layers, fullness.mean(-1).T.tolist(), colours):
        ends = layer in (trace.layers[0], trace.layers[-1])
        right.plot(trace.tokens, values, color=colour, label=f"layer {layer}" if ends else None, marker=".")
    right.set(title="While reading", xlabel="tokens read", ylim=(0, 1.02))
    right.legend(loc="lower right")
    tidy(right)
    return figure


def _small_plots(trace: StateTrace, values_LE: torch.Tensor, sinks: int, title: str) -> Any:
    """A plot for each layer, all with the same axes."""
    layers, evicted = values_LE.shape
    columns = min(_COLUMNS, layers)
    rows = -(-layers // columns)
    figure = new_figure(11, 1.0 + 1.15 * rows)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    bins = min(_POINTS, evicted)
    binned = functional.adaptive_avg_pool1d(values_LE, bins)
    positions = [sinks + (bin + 0.5) * evicted / bins - 0.5 for bin in range(bins)]
    for panel, layer, line in zip(panels, trace.layers, binned.tolist()):
        panel.plot(positions, line, color=_LINE, linewidth=0.8)
        panel.set_title(f"layer {layer}", fontsize=8, pad=2)
        panel.tick_params(labelsize=7)
        tidy(panel)
    for panel in panels[layers:]:
        panel.set_visible(False)
    figure.suptitle(f"{title}, mean over heads", fontsize=10)
    figure.supxlabel("position of the evicted token", fontsize=9)
    return figure


def _layer_ticks(layers: tuple[int, ...]) -> tuple[list[int], list[str]]:
    """Places and names of as many layers as an axis has room for."""
    step = -(-len(layers) // 12)
    ticks = list(range(0, len(layers), step))
    return ticks, [str(layers[tick]) for tick in ticks]
