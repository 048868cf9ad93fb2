"""How much of what a window loses do memory and anchors bring back, byte for byte? Held-out text, SmolLM2.

    python benchmarks/gap.py --texts FOLDER                       # 24 pieces of 2,048 tokens, window 256; goes on
    python benchmarks/gap.py --texts FOLDER --adapter RUN/distill/checkpoint-20/averaged --label joint
    python benchmarks/gap.py --texts FOLDER --lengths 8192 --windows 256 1024 --pieces 24
    python benchmarks/gap.py --texts FOLDER --lengths 32768 --sink-positions bounded --pieces 3
    python benchmarks/gap.py --draw                               # tables and picture of what was measured before

Every piece is read once in each arm: full attention, sinks and window alone, windows that are larger by some tokens,
anchors beside the window without a memory, the memory, both. Scored are the tokens beyond sinks and window, the same in
all arms (nats per token). Every arm's cache is weighed (`HippocampalCache.nbytes`). "At equal bytes" compares an arm
with a window of as many bytes, between two measured windows on a straight line. Intervals are those of a bootstrap over
pieces (10,000 draws, 95 %). Each piece is noted when it is done, so that the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import ahn
from ahn.evaluation.report import environment
from ahn.generation import cache_bytes, read
from ahn.models import load_model, load_tokenizer
from ahn.models.text import evenly
from ahn.training import Cut, load_pieces

HERE = Path(__file__).parent
RESULTS, PICTURE = HERE / "results" / "gap.json", HERE.parent / "docs" / "images" / "gap.png"
ANCHORS, LARGER = (64, 128, 256), (64, 128, 256, 384)
DRAWS = 10_000


class Arm(NamedTuple):
    """One way of reading."""

    mode: str
    larger: int = 0
    anchors: int = 0

    @property
    def name(self) -> str:
        """Its name in the tables."""
        kinds = {"window": "anchors" if self.anchors else "window", "ahn": "memory", "full": "full"}
        return kinds[self.mode] + (f"+{self.larger or self.anchors}" if self.larger or self.anchors else "")


ARMS = (
    Arm("full"),
    *(Arm("window", larger) for larger in (0, *LARGER)),
    *(Arm("window", 0, anchors) for anchors in ANCHORS),
    *(Arm("ahn", 0, anchors) for anchors in (0, *ANCHORS)),
)


class Place(NamedTuple):
    """What a table is about."""

    length: int
    window: int
    sinks: int
    sink_positions: str
    precision: str


def score(model: Any, ids: torch.Tensor, arm: Arm, place: Place) -> tuple[float, int]:
    """Mean negative log-likelihood beyond sinks and window, and the bytes of the cache.

    In half precision products alone are rounded, as in a training; what is kept has other sizes then, so that caches
    are weighed in float32.
    """
    half = torch.autocast("cpu", torch.bfloat16) if place.precision == "bfloat16" else nullcontext()
    settings = {"window": place.window + arm.larger, "sinks": place.sinks, "anchors": arm.anchors}
    with ahn.mode(model, arm.mode, sink_positions=place.sink_positions, **settings), half:
        reading = read(model, ids)
    return float(reading.nll[place.sinks + place.window :].double().mean()), cache_bytes(reading.cache)


def weights_of(arm: Arm, label: str, anchor_label: str) -> str:
    """Which trained weights an arm depends on."""
    parts = [label] if arm.mode == "ahn" else []
    return "/".join(parts + ([f"by {anchor_label}"] if arm.anchors else []))


def measure(options: argparse.Namespace, kept: dict[str, Any]) -> None:
    """Reads what was not read before."""
    model = load_model(options.base, "float32")
    ahn.load(model, options.adapter or f"{options.base}/{options.memory}")
    ahn.load_anchors(model, options.anchors or f"{options.base}/anchors")
    kept["environment"] = environment(model)
    tokenizer = load_tokenizer(options.base)
    for length in options.lengths:
        found, _ = load_pieces([options.texts], tokenizer, Cut(length, length))
        numbers = evenly(range(len(found)), min(options.pieces, len(found)))
        for count, number in enumerate(numbers):
            ids = found[number]["input_ids"]
            piece = f"{number} {hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:8]}"
            for window in options.windows:
                place = Place(length, window, options.sinks, options.sink_positions, options.precision)
                _measure_piece(model, ids, piece, place, options, kept)
                write(kept)
            print(f"length {length}: piece {count + 1} of {len(numbers)}", flush=True)


def _measure_piece(
    model: Any, ids: torch.Tensor, piece: str, place: Place, options: argparse.Namespace, kept: dict[str, Any]
) -> None:
    table = kept["places"].setdefault(" ".join(map(str, place)), {})
    for arm in ARMS:
        if options.arms and arm.name not in options.arms:
            continue
        name = f"{arm.name} {weights_of(arm, options.label, options.anchor_label)}".strip()
        known = table.setdefault(name, {"nll": {}})
        if "bytes" not in known:
            known["bytes"] = score(model, ids, arm, place._replace(precision="float32"))[1]
        if piece not in known["nll"]:
            known["nll"][piece], _ = score(model, ids, arm, place)


def write(kept: dict[str, Any]) -> None:
    """Writes everything that was measured, whole."""
    part = RESULTS.with_suffix(".part")
    part.write_text(json.dumps(kept, indent=1) + "\n")
    os.replace(part, RESULTS)


class Row(NamedTuple):
    """What an arm achieves: nats per token, share of the gap, and nats less than a window of the same bytes has."""

    name: str
    pieces: int
    extra_bytes: int
    nll: float
    share: tuple[float, float, float]
    better: tuple[float, float, float]


def rows_of(table: dict[str, Any]) -> list[Row]:
    """All arms of a table, on the pieces that they and the windows have in common."""
    windows = sorted((each["bytes"], name) for name, each in table.items() if name.split("+")[0] == "window")
    rows = []
    for name, each in table.items():
        pieces = [piece for piece in each["nll"] if all(piece in table[other]["nll"] for _, other in windows)]
        pieces = [piece for piece in pieces if piece in table["full"]["nll"]]
        if not pieces:
            continue
        full, arm = (np.array([table[other]["nll"][piece] for piece in pieces]) for other in ("full", name))
        grid = np.array([[table[other]["nll"][piece] for _, other in windows] for piece in pieces])
        weights = _between([size for size, _ in windows], each["bytes"])
        equal = grid @ weights
        drawn = np.random.default_rng(0).integers(0, len(pieces), (DRAWS, len(pieces)))
        share = _interval((grid[:, 0] - arm), (grid[:, 0] - full), drawn)
        better = _interval(equal - arm, np.ones_like(arm), drawn)
        rows.append(Row(name, len(pieces), each["bytes"] - windows[0][0], float(arm.mean()), share, better))
    return rows


def _between(sizes: list[int], size: int) -> np.ndarray:
    """Weights of the measured windows in one of a size; beyond them, those of the last."""
    weights = np.zeros(len(sizes))
    place = np.interp(size, sizes, np.arange(len(sizes)))
    low = min(int(place), len(sizes) - 2)
    weights[low], weights[low + 1] = 1 - (place - low), place - low
    return weights


def _interval(over: np.ndarray, under: np.ndarray, drawn: np.ndarray) -> tuple[float, float, float]:
    values = over[drawn].mean(-1) / under[drawn].mean(-1)
    low, high = np.quantile(values, (0.025, 0.975))
    return float(over.mean() / under.mean()), float(low), float(high)


def show(kept: dict[str, Any]) -> None:
    """All tables as Markdown."""
    for key, table in kept["places"].items():
        length, window, sinks, positions, precision = key.split()
        rows = rows_of(table)
        print(f"\n{length} tokens, window {window}, sinks {sinks} ({positions}), {precision}:\n")
        print("| arm | pieces | MB beside it | nats per token | share of the gap | nats better at equal bytes |")
        print("|---|---|---|---|---|---|")
        for row in rows:
            share, low, high = row.share
            better = f"{row.better[0]:+.4f} ({row.better[1]:+.4f} to {row.better[2]:+.4f})"
            print(
                f"| {row.name} | {row.pieces} | {row.extra_bytes / 1e6:.2f} | {row.nll:.4f} | "
                f"{share:.0%} ({low:.0%} to {high:.0%}) | {better} |"
            )


def draw(kept: dict[str, Any]) -> None:
    """One picture: share of the gap against bytes, for window, anchors, memory, both."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tables = {key: rows_of(table) for key, table in kept["places"].items()}
    figure, axes = pyplot.subplots(1, len(tables), figsize=(6 * len(tables), 4.5), squeeze=False)
    for axis, (key, rows) in zip(axes[0], tables.items()):
        lines: dict[str, list[Row]] = {}
        for row in rows:
            kind, _, weights = row.name.partition(" ")
            kind = kind.split("+")[0]
            if kind != "full":
                lines.setdefault(f"{kind} {weights.split('/')[0]}".strip(), []).append(row)
        for name, line in lines.items():
            line.sort(key=lambda row: row.extra_bytes)
            shares = np.array([row.share for row in line]) * 100
            errors = np.abs(shares[:, 1:] - shares[:, :1]).T
            axis.errorbar(
                [row.extra_bytes / 1e6 for row in line], shares[:, 0], errors, marker="o", capsize=2, label=name
            )
        length, window, sinks, *_ = key.split()
        axis.set_title(f"{int(length):,} tokens, window {window}, sinks {sinks}")
        axis.set_xlabel("MB of cache beside window and sinks")
        axis.set_ylabel("share of the gap to full attention, %")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=110)


def main() -> None:
    """Measures, prints, draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", help="folder of held-out texts")
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--memory", default="gated_delta_net")
    parser.add_argument("--adapter", help="weights of the memory; those that ship if left out")
    parser.add_argument("--anchors", help="weights of the anchor scores; those that ship if left out")
    parser.add_argument("--label", default="gated_delta_net", help="name of the memory's weights in the table")
    parser.add_argument("--anchor-label", default="learned", help="name of the weights of the anchors in the table")
    parser.add_argument("--arms", nargs="*", help="some arms alone")
    parser.add_argument("--windows", nargs="*", type=int, default=[256])
    parser.add_argument("--lengths", nargs="*", type=int, default=[2048])
    parser.add_argument("--sinks", type=int, default=32)
    parser.add_argument("--sink-positions", choices=("absolute", "bounded"), default="absolute")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--pieces", type=int, default=24)
    options = parser.parse_args()
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"places": {}}
    if not options.draw:
        if not options.texts:
            parser.error("name held-out texts with --texts, or draw what was measured before with --draw")
        measure(options, kept)
    show(kept)
    draw(kept)


if __name__ == "__main__":
    main()
