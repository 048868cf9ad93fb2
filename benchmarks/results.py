"""Every number and picture of docs/results.md, from one command.

    make results TEXTS=FOLDER          # the same command again goes on
    make results TEXTS=FOLDER ARGS="--only gap page --lengths 2048 --windows 256"     # one of the gaps
    make results TEXTS=FOLDER ARGS="--only page"     # draws the page anew from what was measured before

All but the gaps take about an hour and a half on two cores; the gaps take much longer.

FOLDER holds books that no memory was trained on. Measured are, with the memories that ship:

- the share of the gap to full attention that windows, anchors and the memory close, byte for byte (`ahn eval
  perplexity --equal-bytes`), and what of that is owed to the state of the text itself (`--other-text`)
- what the memories win back, by window and length too (`shipped_memories.py`)
- a whole book (`ahn eval perplexity`), and hidden facts (`ahn eval recall`)
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ahn._home import write_text

HERE = Path(__file__).parent
KEPT, IMAGES, PAGE = HERE / "results", HERE.parent / "docs" / "images", HERE.parent / "docs" / "results.md"
WORK = HERE.parent / ".results"
STEPS = ("gap", "other-text", "memories", "book", "recall", "page")
GAP_ARMS = "full,window,window+64,anchors+64,anchors+128,anchors+256,ahn,ahn+64,ahn+128,ahn+256"
GAP_ARMS_OF_LONG_TEXTS = "full,window,ahn,ahn+128"
ARMS = "full,window,ahn,ahn+64:learned,ct_max,ct_mean,tail"
LENGTHS = "2048,8192"
TASK = "number"
MEMORIES, GRID, BOOK, RECALL = "shipped_memories.json", "shipped_memories_grid.json", "book.json", "recall.json"
BOOK_BYTES = 500_000  # more than 100,000 tokens
_AHN, _FIRST = (sys.executable, "-m", "ahn", "eval"), ("--adapter", "smollm2-135m/gated_delta_net")


class Gap(NamedTuple):
    """Texts of one length, read with one window."""

    length: int
    window: int
    pieces: int = 24
    sink_positions: str = "absolute"
    arms: str = GAP_ARMS_OF_LONG_TEXTS
    memory: str = "hybrid"

    @property
    def file(self) -> str:
        """Where its report is kept."""
        return f"gap_{self.length}_{self.window}.json"

    @property
    def picture(self) -> str:
        """The picture that shows it; the README shows that of the first."""
        return "gap.png" if self == GAPS[0] else f"gap_{self.length}_{self.window}.png"

    @property
    def other_text_file(self) -> str:
        """Where the report of the reading with the memory of another text is kept."""
        other = "" if self.memory == "hybrid" else f"_{self.memory}"
        return f"other_text_{self.length}_{self.window}{other}.json"

    @property
    def cut(self) -> tuple[str, ...]:
        """The options that say what is read, with what memory and window."""
        cut = ("--adapter", f"smollm2-135m/{self.memory}", "--length", str(self.length), "--pieces", str(self.pieces))
        return (*cut, "--window", str(self.window), "--sinks", "32", "--sink-positions", self.sink_positions)


GAPS = (
    Gap(2048, 256, arms=GAP_ARMS),
    Gap(2048, 1024, arms=GAP_ARMS),
    Gap(8192, 256),
    Gap(8192, 1024),
    Gap(32768, 256, 4, "bounded"),
    Gap(32768, 1024, 4, "bounded"),
)
OTHER_TEXTS = (Gap(2048, 256), Gap(2048, 256, memory="gated_delta_net"), Gap(8192, 256))
_OPENING = """# Results

What has been measured for SmolLM2-135M-Instruct with the memories that ship. `make results TEXTS=FOLDER` measures and
draws all of it, on texts that no memory was trained on.

| arm | reads with |
|---|---|
| `full` | the base model's full attention |
| `window` | sinks and sliding window |
| `ahn` | sinks, window and memory |
| `ahn+64` | the same with 64 anchors; `ahn+64:learned` are chosen by the learned score |
| `anchors+64` | sinks, window and 64 anchors, without a memory |
| `window+64` | sinks and a window that is larger by 64 tokens |
| `ct_max`, `ct_mean` | sinks, window and a Compressive Transformer of the memory's bytes |
| `tail` | the base model, given only the tokens of sinks and last window |

The shares of the gap say which memory they were measured with. `hybrid` is Gated DeltaNet in the lower half of the
layers and linearised attention in the upper half. The whole book and the hidden facts were read with `gated_delta_net`.

A share of the gap is no proof of memory by itself: weights can also learn how texts of this kind are written.
[What of it is memory](#what-of-it-is-memory-2048-tokens-window-256) tells both apart.
"""


def measure_gaps(texts: Path, gaps: Sequence[Gap] = GAPS, precision: str = "float32") -> None:
    """The share of the gap that each arm closes, beside windows of the same bytes."""
    for gap in gaps:
        out = WORK / gap.file.removesuffix(".json")
        arms = ("--arms", gap.arms, "--equal-bytes", "--precision", precision)
        _run(*_AHN, "perplexity", str(texts), *gap.cut, *arms, "--out", str(out))
        _keep(out / "report.json", KEPT / gap.file, texts)
        _take_picture(out / "gap.png", gap.picture)


def measure_other_texts(texts: Path, gaps: Sequence[Gap] = OTHER_TEXTS) -> None:
    """The same with the memory of another text."""
    for gap in gaps:
        out = WORK / gap.other_text_file.removesuffix(".json")
        _run(*_AHN, "perplexity", str(texts), *gap.cut, "--arms", gap.arms, "--other-text", "--out", str(out))
        _keep(out / "report.json", KEPT / gap.other_text_file, texts)


def measure_memories(texts: Path) -> None:
    """What the memories win back where they were trained, and by window and length."""
    script = (sys.executable, str(HERE / "shipped_memories.py"), "--texts", str(texts))
    _run(*script, "--windows", "256", "--lengths", "2048", "--pieces", "12", "--json", str(KEPT / MEMORIES))
    _run(*script, "--pieces", "2", "--json", str(KEPT / GRID))


def measure_book(texts: Path) -> None:
    """A text from beginning to end."""
    out = WORK / "book"
    _run(*_AHN, "perplexity", str(find_book(texts)), *_FIRST, "--arms=window,ahn", "--window=256", f"--out={out}")
    _keep(out / "report.json", KEPT / BOOK, texts)
    _take_picture(out / "perplexity.png", "results_book.png")


def measure_recall(texts: Path) -> None:
    """Facts hidden in the same text."""
    out = WORK / "recall"
    where = (f"--haystack={find_book(texts)}", f"--lengths={LENGTHS}", "--depths=3", "--items=1", "--window=256")
    _run(*_AHN, "recall", *_FIRST, *where, f"--tasks={TASK}", f"--arms={ARMS}", f"--out={out}")
    _keep(out / "report.json", KEPT / RECALL, texts)
    _take_picture(out / f"recall_{TASK}.png", f"results_recall_{TASK}.png")


def find_book(texts: Path) -> Path:
    """The shortest text of 500,000 bytes at least, or the longest if there is none."""
    sizes = sorted((file.stat().st_size, file) for file in texts.rglob("*.txt"))
    return next((file for size, file in sizes if size >= BOOK_BYTES), sizes[-1][1])


def write_page(texts: Path) -> None:
    """The page and the picture that is drawn of numbers alone, from what was measured."""
    reports = measured()
    if GRID in reports:
        IMAGES.mkdir(exist_ok=True)
        _draw(reports[GRID]).savefig(IMAGES / "results_memories.png", dpi=150)
    write_text(PAGE, page(reports))


def measured() -> dict[str, dict]:
    """What was measured before, by file."""
    return {file: json.loads((KEPT / file).read_text(encoding="utf-8")) for file in PARTS if (KEPT / file).is_file()}


def page(reports: dict[str, dict]) -> str:
    """The text of the page."""
    return "\n".join([_OPENING, *(part(reports[file]) for file, part in PARTS.items() if file in reports)])


def _gap_part(report: dict) -> str:
    settings, results = report["settings"], report["results"]
    (gap,) = [each for each in GAPS if (each.length, each.window) == (settings["length"], settings["window"])]
    windows = "The equal window is enlarged to the bytes of the arm, states and anchors counted."
    if not results["equal_bytes"]:
        windows = "Windows of the same bytes have not been read at this length."
    lines = [
        f"## Share of the gap, byte for byte: {gap.length:,} tokens, window {gap.window:,}\n",
        f"Nats per token beyond {settings['sinks']} sinks ({gap.sink_positions}) and the window, over "
        f"{len(results['documents'])} excerpts at even distances.\n"
        f"The memory is `{_memory(report)}`. The share of the gap is that between `window` and `full`.\n"
        f"{windows}\nIntervals are 95 % bootstraps over excerpts ({_where(report['environment'])}).\n",
        *_read_in_full(report),
        *(["Products of the model were rounded to bfloat16.\n"] if settings.get("precision") == "bfloat16" else []),
        f"![share of the gap against bytes of cache](images/{gap.picture})\n",
        "| arm | cache, MB | nats per token | share of the gap | equal window | nats better than it |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in results["arms"].items():
        closed = _share(*row["closed"].values()) if row["closed"] else ""
        equal = results["equal_bytes"].get(name)
        better = _better(equal) if equal else ""
        cells = [f"`{name}`", f"{row['counted_bytes'] / 1e6:.1f}", f"{row['nll']['beyond']:.4f}", closed]
        lines.append(f"| {' | '.join([*cells, equal['arm'] if equal else '', better])} |")
    return "\n".join([*lines, ""])


def _read_in_full(report: dict) -> list[str]:
    """What the gap is measured on, where full attention reads less than all."""
    read, length = report["results"]["arms"]["full"]["tokens"], report["settings"]["length"]
    tokens = read // len(report["results"]["documents"])
    if tokens == length:
        return []
    return [f"`full` reads the first {tokens:,} tokens alone, so that nats and shares are those of them.\n"]


def _other_text_part(report: dict) -> str:
    settings, results, memory = report["settings"], report["results"], _memory(report)
    window = f"window {settings['window']:,}{'' if memory == 'hybrid' else f', {memory}'}"
    lines = [
        f"## What of it is memory: {settings['length']:,} tokens, {window}\n",
        "Weights of a memory also learn how texts of a kind are written, whatever its state holds. So each arm is\n"
        "read once more with the memory of another excerpt. Only what it gains over that is owed to the state of its\n"
        f"own text. The memory is `{memory}`, {len(results['documents'])} excerpts, intervals as above\n"
        f"({_where(report['environment'])}).\n",
        "| arm | share of the gap | with the memory of another text | its own beyond that | nats better |",
        "|---|---|---|---|---|",
    ]
    for name, other in results["other_text"].items():
        shares = (results["arms"][name]["closed"], other["closed"], other["own"])
        cells = [f"`{name}`", *(_share(*share.values()) for share in shares), _better(other)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _memory(report: dict) -> str:
    """The memory of a report; the first ones did not name theirs."""
    return Path(report["settings"].get("adapter") or "gated_delta_net").name


def _memories_part(report: dict) -> str:
    return "\n".join(
        [
            "## What a memory wins back\n",
            f"Nats per token beyond {report['sinks']} sinks and the window, over {report['pieces']} excerpts at even "
            "distances.\nIn brackets: the share of the gap between `window` and `full` that the memory closes, "
            f"with its 95 %\nbootstrap interval over excerpts ({_where(report)}).\n",
            *_rows(report),
            "",
        ]
    )


def _grid_part(report: dict) -> str:
    return "\n".join(
        [
            "## Other windows, longer texts\n",
            f"The same over {report['pieces']} excerpts, read once in each mode and at each window\n"
            f"({_where(report)}).\n",
            "![share of the gap that is closed, by window and length](images/results_memories.png)\n",
            *_rows(report),
            "",
        ]
    )


def _rows(report: dict) -> list[str]:
    names = list(report["rows"][0]["closed"])
    lines = [
        f"| tokens | window | full | window alone | {' | '.join(names)} |",
        "|---|---|---|---|" + "---|" * len(names),
    ]
    for row in report["rows"]:
        cells = [f"{row['nll'][name]:.4f} ({_share(*row['closed'][name])})" for name in names]
        exact = f"{row['nll']['full']:.4f} | {row['nll']['window']:.4f}"
        lines.append(f"| {row['length']:,} | {row['window']:,} | {exact} | {' | '.join(cells)} |")
    return lines


def _book_part(report: dict) -> str:
    document, settings = report["results"]["documents"][0], report["settings"]
    lines = [
        "## A whole book\n",
        f"`{document['name']}`, {document['tokens']:,} tokens, {settings['sinks']} sinks, window {settings['window']}\n"
        f"({_where(report['environment'])}).\n",
        "![score, cache and memory against position](images/results_book.png)\n",
        "| arm | nats per token | perplexity | cache, MB |",
        "|---|---|---|---|",
    ]
    for name, row in report["results"]["arms"].items():
        scores = f"{row['nll']['beyond']:.4f} | {row['perplexity']['beyond']:.2f}"
        lines.append(f"| {name} | {scores} | {row['cache_bytes'] / 1e6:.1f} |")
    return "\n".join([*lines, ""])


def _recall_part(report: dict) -> str:
    arms = report["settings"]["arms"]
    lines = [
        "## Hidden facts\n",
        "Answers that contain the fact, among all questions, by where the fact is when the question begins\n"
        f"(window {report['settings']['window']}, {_where(report['environment'])}).\n",
        f"![{TASK}](images/results_recall_{TASK}.png)\n",
        f"| task | tokens | where | {' | '.join(arms)} |",
        "|---|---|---|" + "---|" * len(arms),
    ]
    rows: dict[tuple, dict[str, str]] = {}
    for cell in report["results"]["cells"]:
        key = cell["task"], cell["length"], cell["label"]
        rows.setdefault(key, {})[cell["arm"]] = f"{cell['hits']}/{cell['values']}"
    for (task, length, label), row in rows.items():
        lines.append(f"| {task} | {length:,} | {label} | {' | '.join(row[arm] for arm in arms)} |")
    return "\n".join([*lines, "", *(f"- {sentence}" for sentence in report["results"]["verdicts"])]) + "\n"


PARTS = {
    **{gap.file: _gap_part for gap in GAPS},
    **{gap.other_text_file: _other_text_part for gap in OTHER_TEXTS},
    MEMORIES: _memories_part,
    GRID: _grid_part,
    BOOK: _book_part,
    RECALL: _recall_part,
}
"""Parts of the page by the file that each is made of; a part whose file is missing is left out."""


def _draw(report: dict) -> object:
    """Share of the gap that is closed against the window, a panel for each length."""
    from matplotlib.figure import Figure

    lengths = sorted({row["length"] for row in report["rows"]})
    figure = Figure(figsize=(4 * len(lengths), 3.6), layout="constrained")
    for panel, length in zip(figure.subplots(1, len(lengths), sharey=True, squeeze=False)[0], lengths, strict=True):
        rows = [row for row in report["rows"] if row["length"] == length]
        for shift, name in enumerate(rows[0]["closed"]):
            share, low, high = ([100 * row["closed"][name][part] for row in rows] for part in range(3))
            places = [number + 0.08 * (shift - 1) for number in range(len(rows))]
            error = [[a - b for a, b in zip(share, low)], [b - a for a, b in zip(share, high)]]
            panel.errorbar(places, share, error, marker="o", capsize=3, label=name)
        panel.axhline(0, color="black", linewidth=1)
        panel.set_xticks(range(len(rows)), [f"{row['window']:,}" for row in rows])
        panel.set(title=f"{length:,} tokens", xlabel="window", ylabel="gap closed, %" if length == lengths[0] else "")
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    # Where the gap is nearly nothing its share is noise, and would squeeze all others.
    panel.set_ylim(-50, 150)
    panel.legend()
    return figure


def _share(share: float, low: float, high: float) -> str:
    return f"{100 * share:.0f} %, {100 * low:.0f} to {100 * high:.0f}"


def _better(row: dict) -> str:
    return f"{row['nats_better']:+.4f} ({row['low']:+.4f} to {row['high']:+.4f})"


def _where(facts: dict) -> str:
    versions = ", ".join(f"{name} {facts[name]}" for name in ("torch", "transformers"))
    return f"{facts['date']}, {facts['device']}, {versions}"


def _run(*command: str) -> None:
    if code := subprocess.run(command).returncode:
        raise SystemExit(code)


def _keep(source: Path, target: Path, texts: Path) -> None:
    """Copies a report without the folder that the texts lie in."""
    write_text(target, source.read_text(encoding="utf-8").replace(f"{texts}/", ""))


def _take_picture(source: Path, name: str) -> None:
    IMAGES.mkdir(exist_ok=True)
    shutil.copy(source, IMAGES / name)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--texts", required=True, type=Path, help="folder of texts that no memory was trained on")
    arguments.add_argument("--only", nargs="*", choices=STEPS, default=STEPS)
    for name in ("lengths", "windows"):
        arguments.add_argument(f"--{name}", nargs="*", type=int, help="of the gaps and their controls, these alone")
    arguments.add_argument("--precision", default="float32", help="of the gaps; bfloat16 is quick where a CPU has AMX")
    options = arguments.parse_args()
    if not any(options.texts.rglob("*.txt")):
        raise SystemExit(f"{options.texts}: there are no .txt files in it; name a folder of texts")
    lengths, windows = (set(chosen or ()) for chosen in (options.lengths, options.windows))
    gaps, other_texts = (
        [gap for gap in every if gap.length in (lengths or {gap.length}) and gap.window in (windows or {gap.window})]
        for every in (GAPS, OTHER_TEXTS)
    )
    first = (
        partial(measure_gaps, gaps=gaps, precision=options.precision),
        partial(measure_other_texts, gaps=other_texts),
    )
    steps = dict(zip(STEPS, (*first, measure_memories, measure_book, measure_recall, write_page), strict=True))
    for name in options.only:
        steps[name](options.texts)


if __name__ == "__main__":
    main()
