"""How fast SmolLM2 reads and writes with a bounded memory, against what one would run instead.

    make bench                                      # under 20 minutes on two cores; also writes docs/performance.md
    make bench ARGS="--only ops page"               # one part; the others stay as they were measured

All that is compared takes turns within one run; ratios are medians of the ratios of each round. Parts: `model` (writing
and reading in every arm and context), `long` (a token after 8,192 tokens and after 100,000), `layer` (what a memory
adds to layers of the shape of Qwen2.5-3B), `ops` (the recurrences against those in transformers), `memory` (peak
memory of reading 16,384 tokens), `llama` (4-bit weights against llama.cpp, see llama.py). On a machine with a GPU the
first three run there, in bfloat16, and are kept apart.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import llama
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import ahn
from ahn._home import write_text
from ahn.cost import SHAPES
from ahn.evaluation.report import environment, plain
from ahn.models import load_model
from ahn.speed import Speed, Timing, measure, read_seconds
from ahn.speed.measure import baselines
from ahn.speed.plot import plot_speed
from ahn.speed.timing import Machine, Spread, interleave, ratio

HERE = Path(__file__).parent
ON_GPU = torch.cuda.is_available()
KEPT, OPS = HERE / "results" / ("speed_cuda.json" if ON_GPU else "speed.json"), HERE / "results" / "ops.json"
PAGE, PICTURE = HERE.parent / "docs" / "performance.md", HERE.parent / "docs" / "images" / "speed.png"
BEGIN, END = "<!-- measured by make bench -->", "<!-- end of what was measured -->"
SPAN = {"window": 2048, "sinks": 32}
ARMS = ["full", "window", "ahn", "ahn+64:learned", "ahn+64:key_diff"]
CONTEXTS = [32, 2048, 8192, 32768]
WATCHED = 16_384  # tokens of the text whose peak memory is watched
PARTS = ("model", "long", "layer") if ON_GPU else ("model", "long", "layer", "ops", "memory", "llama")
DEVICE, DTYPE = ("cuda", torch.bfloat16) if ON_GPU else ("cpu", torch.float32)


def smollm2() -> Any:
    """SmolLM2 with the memory and the votes that ship."""
    model = load_model("smollm2-135m", DTYPE).to(DEVICE)
    ahn.load(model, "smollm2-135m/gated_delta_net")
    ahn.load_anchors(model, "smollm2-135m/anchors")
    return model.eval()


def time_model() -> dict[str, Any]:
    """Writing and reading in every arm and context."""
    model = smollm2()
    with ahn.mode(model, "ahn", **SPAN):
        speed = measure(model, ARMS, CONTEXTS, rounds=7, reading_rounds=2, on_round=_dot)
    return {**environment(model), **dataclasses.asdict(speed)}


def time_long() -> dict[str, Any]:
    """A token after 8,192 and after 100,000 tokens, sinks seen from within the trained context."""
    model = smollm2()
    places = (8192, 100_000)
    with ahn.mode(model, "ahn", **SPAN):
        cases = {str(place): baselines(None, model, ["ahn"], place)["ahn"].decode for place in places}
        taken = interleave(cases, 41)
    return {**environment(model), "late_to_early": ratio(taken[str(places[1])], taken[str(places[0])])}


def time_layer() -> dict[str, Any]:
    """What a memory adds to reading in two layers of the shape of Qwen2.5-3B, of random weights."""
    config = AutoConfig.for_model(**{**SHAPES["qwen2.5-3b"], "num_hidden_layers": 2, "vocab_size": 1024})
    model = AutoModelForCausalLM.from_config(config, dtype=DTYPE).to(DEVICE).eval()
    ahn.attach(model, ahn.AHNConfig("gated_delta_net", **SPAN))
    with ahn.mode(model, "ahn", **SPAN):
        speed = measure(model, ["window", "ahn"], [8192], rounds=5)
    cost = {kind: speed.find(kind, "ahn", 8192).of_first.median ** -1 - 1 for kind in ("reading", "decoding")}
    return {**environment(model), "added": cost}


def time_ops() -> dict[str, Any]:
    """The recurrences against those in transformers."""
    _run("ops.py", "--rounds", "15", "--json", str(OPS))
    found: dict[str, Any] = json.loads(OPS.read_text(encoding="utf-8"))
    return found


def watch_memory() -> dict[str, Any]:
    """Peak resident memory of reading a text, at the end against a fifth of the way."""
    lines = _run("constant_memory.py", "--tokens", str(WATCHED), "--window", str(SPAN["window"])).splitlines()
    return {"end_to_fifth": float(lines[-1].rpartition(":")[2]), "constant_cache": lines[-2].endswith("yes")}


def time_llama() -> dict[str, Any]:
    """What `llama.py` measures."""
    _run("llama.py")
    return llama.kept()


MEASURES = {
    "model": time_model,
    "long": time_long,
    "layer": time_layer,
    "ops": time_ops,
    "memory": watch_memory,
    "llama": time_llama,
}


def speed_of(found: dict[str, Any]) -> Speed:
    """What `time_model` measured, from its JSON."""

    def timing(row: dict[str, Any]) -> Timing:
        return Timing(**{**row, "seconds": Spread(*row["seconds"]), "of_first": Spread(*row["of_first"])})

    decoding, reading = ([timing(row) for row in found[kind]] for kind in ("decoding", "reading"))
    return Speed(Machine(*found["machine"]), found["chunk"], decoding, reading)


def lines(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What was to be reached: the sentence, the target, what was measured."""
    rows: list[tuple[str, str, str]] = []
    if "model" in found:
        speed = speed_of(found["model"])

        def times(context: int, arm: str, than: str, kind: str = "decoding") -> float:
            return speed.find(kind, than, context).of_first.median / speed.find(kind, arm, context).of_first.median

        start = speed.find("decoding", "full", 32).seconds.median
        whole = read_seconds(speed.reading, "full", 32768) / read_seconds(speed.reading, "ahn", 32768)
        rows += [
            (
                "speed of writing after 32,768 tokens, against full attention",
                "6",
                f"{1 / times(32768, 'ahn', 'full'):.1f}",
            ),
            (
                "speed of writing after 8,192 tokens, against full attention",
                "2",
                f"{1 / times(8192, 'ahn', 'full'):.1f}",
            ),
            (
                "extra time to write with the memory, against the window alone",
                "10 %",
                _more(times(8192, "ahn", "window")),
            ),
            (
                "extra time to read with the memory, against the window alone",
                "20 %",
                _more(times(8192, "ahn", "window", "reading")),
            ),
            ("speed of reading 32,768 tokens, against full attention", "5", f"{whole:.1f}"),
            ("time of a token after 32 tokens, against full attention", "1.2", f"{times(32, 'ahn', 'full'):.2f}"),
            (
                "time of a token after 8,192 tokens, against full attention after 32",
                "",
                f"{speed.find('decoding', 'ahn', 8192).seconds.median / start:.2f}",
            ),
            (
                "time of a token after 8,192 tokens, against this machine's floor",
                "",
                f"{speed.find('decoding', 'ahn', 8192).seconds.median / speed.find('decoding', 'ahn', 8192).floor:.1f}",
            ),
        ]
        for arm in ARMS[3:]:
            rows += [
                (f"extra time to write with {arm}, against ahn", "8 %", _more(times(8192, arm, "ahn"))),
                (f"extra time to read with {arm}, against ahn", "10 %", _more(times(8192, arm, "ahn", "reading"))),
            ]
    if "long" in found:
        late = found["long"]["late_to_early"][0]
        rows.append(("time of a token after 100,000 tokens, against one after 8,192", "1.03", f"{late:.2f}"))
    if "layer" in found:
        rows.append(
            (
                "extra time to read in layers of 3B shape, against the window",
                "6 %",
                f"{found['layer']['added']['reading']:.1%}",
            )
        )
    for case, tokens, heads, size, target in (
        ("gated_delta_rule", 512, 9, 64, "2.5"),
        ("gated_delta_rule", 512, 16, 128, "2.2"),
        ("state_space", 512, 9, 64, ""),
        ("state_space", 512, 16, 128, ""),
    ):
        for row in found.get("ops", {"results": []})["results"]:
            if (row["case"], row["tokens"], row["heads"], row["size"]) == (case, tokens, heads, size):
                what = f"speed of {case}, {tokens} tokens, {heads} x {size}, against transformers in torch"
                rows.append((what, target, f"{row['ratio']:.1f}"))
    if "memory" in found:
        what = f"peak memory at {WATCHED:,} tokens, against {WATCHED // 5:,}"
        rows.append((what, "1.05", f"{found['memory']['end_to_fifth']:.3f}"))
    return rows


def part_of_page(found: dict[str, Any]) -> str:
    """The tables of docs/performance.md, as Markdown."""
    text = ["| | target | measured |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in lines(found)), ""]
    if "model" in found:
        about, speed = found["model"], speed_of(found["model"])
        text += [
            "![time of a token and cache against the context](images/speed.png)\n",
            f"{about['device']}, {about['threads']} threads, float32, torch {about['torch']}, transformers "
            f"{about['transformers']}, {about['date']}.",
            f"This machine copies {speed.machine.bandwidth / 1e9:.1f} GB/s and multiplies "
            f"{speed.machine.flops / 1e9:.0f} GFLOP/s.",
            "Milliseconds per token: median (quartiles, floor).\n",
        ]
        for title, rows in (("writing", speed.decoding), ("reading", speed.reading)):
            text += [f"| {title} after | {' | '.join(ARMS)} |", "|---|" + "---|" * len(ARMS)]
            for context in CONTEXTS:
                cells = [_cell(row) for arm in ARMS for row in rows if (row.arm, row.context) == (arm, context)]
                text.append(f"| {context:,} | {' | '.join(cells)} |")
            text.append("")
    if fewer_bits := llama.kept():
        text += [*llama.tables(fewer_bits), ""]
    return "\n".join(text)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--only", nargs="+", choices=(*PARTS, "page"), default=[*PARTS, "page"])
    options = arguments.parse_args()
    found: dict[str, Any] = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.is_file() else {}
    for part in PARTS:
        if part in options.only:
            started = time.monotonic()
            print(f"{part} ...", end="", flush=True)
            found[part] = plain(MEASURES[part]())
            print(f" {time.monotonic() - started:.0f} s", flush=True)
            write_text(KEPT, json.dumps(found, indent=1) + "\n")
    for what, target, measured in lines(found):
        print(f"{measured:>8}  {what}" + (f" (target {target})" if target else ""))
    if "page" in options.only and not ON_GPU:
        write_page(found)


def write_page(found: dict[str, Any]) -> None:
    """The picture, and what stands between the two marks of the page."""
    PICTURE.parent.mkdir(exist_ok=True)
    if "model" in found:
        title = f"SmolLM2-135M, sinks {SPAN['sinks']}, window {SPAN['window']:,}, {found['model']['threads']} threads"
        plot_speed(speed_of(found["model"]), title, [PICTURE])
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    write_text(PAGE, f"{before}{BEGIN}\n{part_of_page(found)}{END}{rest.partition(END)[2]}")


def _cell(row: Timing) -> str:
    middle, low, high = (1e3 * seconds for seconds in row.seconds)
    return f"{middle:.1f} ({low:.1f} to {high:.1f}, {1e3 * row.floor:.1f})"


def _more(times: float) -> str:
    return f"{times - 1:.0%}"


def _run(script: str, *options: str) -> str:
    done = subprocess.run([sys.executable, str(HERE / script), *options], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{script} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def _dot() -> None:
    print(".", end="", flush=True)


if __name__ == "__main__":
    main()
