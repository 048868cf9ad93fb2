"""How much of what a window loses do the shipped memories win back? Held-out text, by window and length.

    python benchmarks/shipped_memories.py --texts FOLDER            # about 40 minutes on two cores
    make results TEXTS=FOLDER ARGS="--only memories page"            # the same, and the page of results

Every text is cut into pieces of the greatest length, from which as many as asked for are taken at even distances over
all texts. A piece is read once in each mode and at each window; what is read up to a length is what a piece of that
length would give. Scored are the tokens beyond sinks and window (nats per token). The interval is that of a bootstrap
over pieces (10,000 draws, 95 %).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

import ahn
from ahn.checkpoint.files import SHIPPED
from ahn.evaluation.report import environment
from ahn.generation import read
from ahn.memories import memory_names
from ahn.models import load_model, load_tokenizer
from ahn.models.text import evenly
from ahn.training import Cut, load_pieces

OURS, DRAWS = SHIPPED / "smollm2-135m", 10_000


def pieces(folder: str, base: str, length: int, count: int) -> list[torch.Tensor]:
    """Some pieces of a length, at even distances over all texts."""
    every, _ = load_pieces([folder], load_tokenizer(base), Cut(length, length))
    return [every[index]["input_ids"] for index in evenly(range(len(every)), min(count, len(every)))]


def score(model, texts: list[torch.Tensor], mode: str, window: int, sinks: int) -> list[np.ndarray]:
    """Negative log-likelihood of the tokens of each piece but the first."""
    with ahn.mode(model, mode, window=window, sinks=sinks):
        return [read(model, ids).nll.double().numpy() for ids in texts]


def beyond(scores: list[np.ndarray], exact: int, length: int) -> np.ndarray:
    """Mean over the tokens beyond sinks and window of each piece, `[pieces]`."""
    return np.array([each[exact : length - 1].mean() for each in scores])


def closed(full: np.ndarray, window: np.ndarray, memory: np.ndarray) -> tuple[float, float, float]:
    """Share of the gap that is closed, and its interval."""

    def share(rows: np.ndarray) -> np.ndarray:
        return (window[rows] - memory[rows]).mean(-1) / (window[rows] - full[rows]).mean(-1)

    drawn = share(np.random.default_rng(0).integers(0, len(full), (DRAWS, len(full))))
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(share(np.arange(len(full)))), float(low), float(high)


def table(rows: list[dict], memories: list[str]) -> str:
    """Rows as Markdown."""
    lines = [
        "| length | window | full | window alone | " + " | ".join(memories) + " |",
        "|---|---|---|---|" + "---|" * len(memories),
    ]
    for row in rows:
        cells = [
            f"{row['nll'][memory]:.4f} ({row['closed'][memory][0]:.0%}, {row['closed'][memory][1]:.0%} to "
            f"{row['closed'][memory][2]:.0%})"
            for memory in memories
        ]
        exact = f"{row['nll']['full']:.4f} | {row['nll']['window']:.4f}"
        lines.append(f"| {row['length']:,} | {row['window']:,} | {exact} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--texts", required=True, help="folder of held-out texts")
    arguments.add_argument("--base", default="smollm2-135m")
    arguments.add_argument("--memories", nargs="*", default=[each for each in memory_names() if (OURS / each).is_dir()])
    arguments.add_argument("--adapters", default="{base}/{memory}", help="name or folder of each memory's weights")
    arguments.add_argument("--windows", nargs="*", type=int, default=[128, 256, 512, 1024])
    arguments.add_argument("--lengths", nargs="*", type=int, default=[2048, 4096, 8192])
    arguments.add_argument("--sinks", type=int, default=32)
    arguments.add_argument("--pieces", type=int, default=4)
    arguments.add_argument("--json", type=Path)
    options = arguments.parse_args()
    texts = pieces(options.texts, options.base, max(options.lengths), options.pieces)
    model = load_model(options.base, "float32")
    scores: dict[tuple[str, int], list[np.ndarray]] = {}
    for memory in options.memories:
        ahn.load(model, options.adapters.format(base=options.base, memory=memory))
        if not scores:
            full = score(model, texts, "full", max(options.windows), options.sinks)
        for window in options.windows:
            started = time.perf_counter()
            if ("window", window) not in scores:
                scores["window", window] = score(model, texts, "window", window, options.sinks)
            scores[memory, window] = score(model, texts, "ahn", window, options.sinks)
            print(f"{memory}, window {window}: {time.perf_counter() - started:.0f} s", flush=True)
        ahn.detach(model)
    rows = []
    for length in options.lengths:
        for window in options.windows:
            exact = options.sinks + window
            nll = {"full": beyond(full, exact, length), "window": beyond(scores["window", window], exact, length)}
            nll |= {memory: beyond(scores[memory, window], exact, length) for memory in options.memories}
            shares = {memory: closed(nll["full"], nll["window"], nll[memory]) for memory in options.memories}
            means = {name: float(each.mean()) for name, each in nll.items()}
            rows.append({"length": length, "window": window, "nll": means, "closed": shares})
    print(table(rows, options.memories))
    if options.json:
        facts = {**environment(model), "base": options.base, "sinks": options.sinks, "pieces": len(texts)}
        options.json.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
