"""Every table and picture of docs/recall.md that counts answers, from one command.

    make recall TEXTS=FOLDER     # five hours of a core; the same command again goes on
    make recall TEXTS=FOLDER ARGS="--tasks number --lengths 1536 --arms full ahn+64:asked"     # a part of it
    make recall TEXTS=FOLDER ARGS="--page"     # tables and pictures alone, from what was measured before

FOLDER holds texts that no memory was trained on. Facts are hidden in a text made of pieces of all of them, so that
prose, dialogue, code and tables alternate, and asked for at its end (`ahn eval recall`).
"""

from __future__ import annotations

import argparse
import json
import math
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ahn._home import write_text
from ahn.evaluation.recall.findings import capacity_curve, cells, heat_map
from ahn.evaluation.recall.tasks import EVICTED, TASKS, RecallSettings

HERE = Path(__file__).parent
KEPT, PAGE = HERE / "results" / "recall_answers.json", HERE.parent / "docs" / "recall.md"
IMAGES = HERE.parent / "docs" / "images"
WORK = HERE.parent / ".recall"
Record = dict[str, Any]
ADAPTER = "smollm2-135m/hybrid"
WINDOW, SINKS, DISTRACTORS = 256, 32, 4
DEPTHS = 12  # with five texts each, fifty whose fact has left the window even where texts are short
FACTS = (1, 2, 4, 8, 16, 32)
PIECE_CHARACTERS, PIECES = 5_000, 60
SINGLE = ("number", "word", "uuid")
_Z = 1.96


class Group(NamedTuple):
    """What one table shows; `items` is the number of texts at each depth, or for each number of facts."""

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    arms: tuple[str, ...]
    items: int


GROUPS = {
    "single": Group(SINGLE, (1536, 3072, 6144), ("full", "ahn+64:asked", "ahn+64:learned"), items=5),
    "controls": Group(
        SINGLE,
        (1536,),
        (
            "window",
            "window+64",
            "ahn",
            "ahn+64:random",
            "ahn+64:recent",
            "ahn+64:key_diff",
            "ahn+64:value_norm",
            "ahn+64:window_attention",
            "ahn+64:oracle",
        ),
        items=1,
    ),
    "keys": Group(("multi_key",), (1536,), ("full", "ahn+128:asked", "ahn+128:learned"), items=5),
    "several": Group(
        ("multi_value", "multi_query", "variables", "needles"),
        (1536,),
        ("full", "ahn+128:asked", "ahn+128:learned"),
        items=1,
    ),
    "capacity": Group(
        ("capacity",),
        (1536,),
        ("full", *(f"ahn+{anchors}:{score}" for score in ("asked", "learned") for anchors in (64, 128, 256))),
        items=8,
    ),
}


class Part(NamedTuple):
    """One arm of one task at one length, which is measured by itself."""

    group: str
    task: str
    length: int
    arm: str

    @property
    def folder(self) -> Path:
        """Where it is measured."""
        return WORK / self.group / f"{self.task}_{self.length}_{self.arm.replace(':', '_').replace('+', '_')}"

    @property
    def finished(self) -> bool:
        """Whether all of it was measured."""
        return (self.folder / "report.json").is_file()

    @property
    def records(self) -> list[Record]:
        """What was measured; nothing if it is not finished."""
        if not self.finished:
            return []
        lines = (self.folder / "journal.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["record"] for line in lines[1:]]

    @property
    def environment(self) -> dict[str, Any]:
        """The memory, date, device and versions; it is finished."""
        report = json.loads((self.folder / "report.json").read_text(encoding="utf-8"))
        names = ("date", "device", "torch", "transformers")
        return {"adapter": report["settings"]["adapter"], **{name: report["environment"][name] for name in names}}


def parts() -> Iterator[Part]:
    """All of them, in the order in which they are measured."""
    for name, group in GROUPS.items():
        for length in group.lengths:
            for task in group.tasks:
                yield from (Part(name, task, length, arm) for arm in group.arms)


def haystack(texts: Path) -> Path:
    """A file of pieces of all texts in random order, the same every time."""
    rng = random.Random(0)
    books = [file.read_text(encoding="utf-8") for file in sorted(texts.rglob("*.txt"))]
    pieces = []
    for number in range(PIECES):
        book = books[number % len(books)]
        start = book.find("\n\n", rng.randrange(max(1, len(book) - PIECE_CHARACTERS))) + 2
        pieces.append(book[start : start + PIECE_CHARACTERS])
    rng.shuffle(pieces)
    WORK.mkdir(exist_ok=True)
    file = WORK / "haystack.txt"
    write_text(file, "\n\n".join(pieces))
    return file


def measure(part: Part, file: Path) -> None:
    """Measures a part, or the rest of it."""
    group = GROUPS[part.group]
    if part.finished:
        return
    settings = {
        "adapter": ADAPTER,
        "tasks": part.task,
        "lengths": part.length,
        "arms": part.arm,
        "items": group.items,
        "depths": DEPTHS,
        "facts": ",".join(map(str, FACTS)),
        "distractors": DISTRACTORS,
        "window": WINDOW,
        "sinks": SINKS,
        "haystack": file,
        "out": part.folder,
    }
    options = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    if code := subprocess.run((sys.executable, "-m", "ahn", "eval", "recall", *options)).returncode:
        raise SystemExit(code)


def keep() -> dict[str, dict[str, Any]]:
    """Gathers what was measured in one file, arm by arm, and draws the pictures; what the file then holds."""
    before, gathered = measured(), dict[str, dict[str, Any]]()
    singles: list[Record] = []
    for part in parts():
        name = f"{part.task}/{part.length}/{part.arm}"
        counts = before.get(part.group, {}).get(name)
        if own := part.records:
            if part.group == "single":
                singles += own
            counts = {**part.environment, "cells": _evicted(own)}
        if counts is not None:
            gathered.setdefault(part.group, {})[name] = counts
    write_text(KEPT, json.dumps(gathered, indent=1) + "\n")
    _draw_single(singles)
    _draw_capacity(gathered.get("capacity", {}))
    return gathered


def measured() -> dict[str, dict[str, Any]]:
    """What was measured before: by group, then by task, length and arm."""
    return json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.is_file() else {}


def _evicted(records: list[Record]) -> list[dict[str, int | None]]:
    """Counts of the values that had left the window, for each number of facts."""
    return [
        {
            **{name: cell[name] for name in ("facts", "values", "hits")},
            "first": round(cell["first"]["share"] * cell["values"]),
        }
        for cell in cells(records)
        if cell["label"] == EVICTED
    ]


def _draw_single(records: list[Record]) -> None:
    """Maps of single facts by depth and length, of what was measured on this machine."""
    single = GROUPS["single"]
    for task in SINGLE:
        mine = [record for record in records if record["task"] == task]
        arms = tuple(arm for arm in single.arms if any(record["arm"] == arm for record in mine))
        lengths = tuple(length for length in single.lengths if any(record["length"] == length for record in mine))
        if mine:
            settings = RecallSettings((task,), lengths, DEPTHS, distractors=DISTRACTORS, arms=arms)
            heat_map(task, mine, settings).savefig(IMAGES / f"recall_{task}.png", dpi=120)


def _draw_capacity(counts: dict[str, Any]) -> None:
    """The curve over many facts, of the counts that are kept."""
    rows = []
    for key, part in counts.items():
        _, length, arm = key.split("/")
        for cell in part["cells"]:
            found = wilson(cell["hits"], cell["values"])
            rows.append({"length": int(length), "label": EVICTED, "arm": arm, "facts": cell["facts"], "found": found})
    if rows:
        arms = tuple(dict.fromkeys(row["arm"] for row in rows))
        capacity_curve(rows, RecallSettings(arms=arms)).savefig(IMAGES / "recall_capacity.png", dpi=120)


def wilson(hits: int, values: int) -> dict[str, float]:
    """A share and its 95 % interval, each value standing for itself.

    Source: E. B. Wilson, Probable inference, Journal of the American Statistical Association 22 (1927).
    """
    share, spread = hits / values, _Z**2 / values
    centre = (share + spread / 2) / (1 + spread)
    half = _Z * math.sqrt(share * (1 - share) / values + spread / (4 * values)) / (1 + spread)
    return {"share": share, "low": centre - half, "high": centre + half}


def page(written: str, counts: dict[str, dict[str, Any]]) -> str:
    """The page with the table of each group put between its two marks.

    Args:
        written: The page as it is.
        counts: What was measured, as `measured` gives it.
    """
    for name, group in counts.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, _, rest = written.partition(begin)
        _, mark, after = rest.partition(end)
        if not mark:
            raise SystemExit(
                f"{PAGE}: the marks {begin.strip()} and {end} are missing; put them where the table belongs"
            )
        table = _capacity_table(group) if name == "capacity" else _table(group)
        written = f"{before}{begin}{table}\n{end}{after}"
    return written


def _table(group: dict[str, Any]) -> str:
    """A row for each length and arm, a column for each task."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for key, part in group.items():
        task, length, arm = key.split("/")
        (cell,) = part["cells"]
        rows.setdefault((length, arm), {})[task] = f"{cell['hits']} of {cell['values']} ({cell['first']})"
    tasks = list(dict.fromkeys(key.split("/")[0] for key in group))
    lines = [f"| tokens | arm | {' | '.join(tasks)} |", "|---" * (2 + len(tasks)) + "|"]
    for (length, arm), row in sorted(rows.items(), key=lambda item: int(item[0][0])):
        shown = " | ".join(row.get(task, "") for task in tasks)
        lines.append(f"| {int(length):,} | `{arm}` | {shown} |")
    return "\n".join(lines)


def _capacity_table(group: dict[str, Any]) -> str:
    """A row for each number of facts, a column for each arm."""
    arms = {key.split("/")[2]: part["cells"] for key, part in group.items()}
    lines = [f"| facts in the text | {' | '.join(f'`{arm}`' for arm in arms)} |", "|---" * (1 + len(arms)) + "|"]
    for row in zip(*arms.values(), strict=True):
        shown = " | ".join(f"{cell['hits']} of {cell['values']}" for cell in row)
        lines.append(f"| {row[0]['facts']} | {shown} |")
    return "\n".join(lines)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--texts", required=True, type=Path, help="folder of texts that no memory was trained on")
    arguments.add_argument("--page", action="store_true", help="measure nothing")
    arguments.add_argument("--groups", nargs="*", choices=tuple(GROUPS), help="these alone")
    arguments.add_argument("--tasks", nargs="*", choices=tuple(TASKS), help="these alone")
    arguments.add_argument("--lengths", nargs="*", type=int, help="these alone")
    arguments.add_argument("--arms", nargs="*", help="these alone")
    options = arguments.parse_args()
    if not any(options.texts.rglob("*.txt")):
        raise SystemExit(f"{options.texts}: there are no .txt files in it; name a folder of texts")
    if not options.page:
        file = haystack(options.texts)
        wanted = {name: getattr(options, f"{name}s") for name in Part._fields}
        for part in parts():
            if all(not wanted[name] or value in wanted[name] for name, value in part._asdict().items()):
                measure(part, file)
    counts = keep()
    write_text(PAGE, page(PAGE.read_text(encoding="utf-8"), counts))
    done, all_ = sum(map(len, counts.values())), len(list(parts()))
    print(f"docs/{PAGE.name}: {done} of {all_} parts are measured")


if __name__ == "__main__":
    main()
