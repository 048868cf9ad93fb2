"""SmolLM2 in 4 bits against llama.cpp, what each format of weights costs, and a token of the shape of a 3B model.

    make bench ARGS="--only llama page"                     # about ten minutes on two quiet cores
    python benchmarks/llama.py --only peer --contexts 64 2048 8192 16384 32768   # half an hour: llama.cpp reads slowly
    python benchmarks/llama.py --only formats loading       # the figures on weights in fewer bits

Parts: `peer` (llama.cpp and ahn from the very same GGUF file, with caches in float16, in turns), `base` (ahn in 4 bits
against the base model in torch float32), `shape` (Qwen2.5-3B's config with random weights in 4 bits: six and three
layers are timed, and their difference is taken for each of the other thirty), `formats` (processor time of a token and
of 512 tokens, and the loss, in every format), `load` (a core that something else takes, against the base model),
`loading` (seconds and peak memory of loading the GGUF file, in a process of its own).
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import ahn
from ahn._home import write_text
from ahn.cost import SHAPES
from ahn.evaluation.report import environment, plain
from ahn.models import load_model, load_tokenizer
from ahn.quantization import QUANTIZE, QuantizedEmbedding, QuantizedLinear, quantize_model
from ahn.speed import measure, read_seconds
from ahn.speed.baselines import ArmBaseline, FullBaseline
from ahn.speed.measure import Speed
from ahn.speed.timing import interleave, measure_machine, ratio, spread

KEPT = Path(__file__).parent / "results" / "llama.json"
TEXT = Path(__file__).parents[1] / "docs" / "design.md"
SPAN: dict[str, Any] = {"window": 2048, "sinks": 32, "cache_dtype": "float16"}  # of llama.cpp's cache
PEER_ARMS = ("llama.cpp", "window", "ahn", "ahn+64:learned")
CONTEXTS = (64, 2048, 8192)
SHAPE, LAYERS, TIMED = "qwen2.5-3b", 36, (6, 3)


def smollm2(quantize: str | None = "int4") -> Any:
    """SmolLM2 with the memory and the anchor weights that ship."""
    model = load_model("smollm2-135m", quantize=quantize)
    ahn.load(model, "smollm2-135m/gated_delta_net")
    ahn.load_anchors(model, "smollm2-135m/anchors")
    return model.eval()


def time_peer(options: argparse.Namespace) -> dict[str, Any]:
    """Writing and reading of every arm, in turns."""
    model = smollm2()
    arms = PEER_ARMS if find_spec("xllamacpp") else PEER_ARMS[1:]
    with ahn.mode(model, "ahn", **SPAN):
        speed = measure(model, arms, options.contexts, options.rounds, max(2, options.rounds // 3), on_round=_dot)
    return {**environment(model), "arms": arms, "rows": _rows(speed, arms, options.contexts)}


def _rows(speed: Speed, arms: tuple[str, ...], contexts: list[int]) -> list[dict[str, Any]]:
    return [
        {
            "arm": arm,
            "context": context,
            "writing": 1e3 * (writing := speed.find("decoding", arm, context)).seconds.median,
            "writing_faster": writing.of_first.median,
            "reading": 1 / speed.find("reading", arm, context).seconds.median,
            "reading_from_start": context / read_seconds(speed.reading, arm, context),
            "cache_bytes": writing.cache_bytes,
        }
        for context in contexts
        for arm in arms
    ]


def time_base(options: argparse.Namespace) -> dict[str, Any]:
    """The base in torch float32 over ahn in 4 bits."""
    base, model = load_model("smollm2-135m"), smollm2()
    found = {}
    for context in (8192, 32768):
        with ahn.mode(model, "ahn", **SPAN):
            cases = {"base": FullBaseline(base, model, context), "ahn": ArmBaseline(model, "ahn", context)}
        taken = interleave({name: case.decode for name, case in cases.items()}, options.rounds, _dot)
        found[context] = ratio(taken["base"], taken["ahn"]).median
    return {**environment(model), "faster": found}


def time_shape(options: argparse.Namespace) -> dict[str, Any]:
    """A token of the shape of a 3B model, over the time in which its bytes can be read."""
    models = {layers: _random_model(layers) for layers in TIMED}
    cases, sizes = {}, {}
    for layers, model in models.items():
        with ahn.mode(model, "ahn", **SPAN):
            baseline = ArmBaseline(model, "ahn", 8192)
        cases[str(layers)] = baseline.decode
        sizes[layers] = baseline.cache_bytes + _map_bytes(model)
    taken = interleave(cases, options.rounds, _dot)
    more, fewer = (spread(taken[str(layers)]).median for layers in TIMED)
    seconds, bytes_ = (
        first + (LAYERS - TIMED[0]) * (first - second) / (TIMED[0] - TIMED[1])
        for first, second in ((more, fewer), (sizes[TIMED[0]], sizes[TIMED[1]]))
    )
    machine = measure_machine(torch.device("cpu"), torch.float32)
    return {
        **environment(models[TIMED[0]]),
        "seconds": seconds,
        "bytes": bytes_,
        "bandwidth": machine.bandwidth,
        "over_floor": seconds * machine.bandwidth / bytes_,
    }


def _random_model(layers: int) -> Any:
    config = AutoConfig.for_model(**{**SHAPES[SHAPE], "num_hidden_layers": layers, "dtype": "float32"})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    quantize_model(model, "int4")
    ahn.attach(model, ahn.AHNConfig("gated_delta_net", **SPAN))
    return model


def _map_bytes(model: nn.Module) -> int:
    maps = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    return sum(buffer.nbytes for module in maps for buffer in module.stored.buffers())


def time_formats(options: argparse.Namespace) -> dict[str, Any]:
    """Processor time of a token behind a window of 256 and of 512 tokens read, and the loss over 1,500 tokens."""
    words = TEXT.read_text(encoding="utf-8")
    ids = load_tokenizer("smollm2-135m")(words, return_tensors="pt")["input_ids"][:, :1500]
    writing: dict[str, Callable[[], float]] = {}
    reading: dict[str, Callable[[], float]] = {}
    losses: dict[str, float] = {}
    for name in ("float32", *QUANTIZE):
        model = smollm2(None if name == "float32" else name)
        with ahn.mode(model, "ahn", window=256, sinks=32), torch.no_grad():
            cache = ahn.HippocampalCache(model)
            for start in range(0, 512, 128):
                model(ids[:, start : start + 128], cache=cache, logits_to_keep=1)
            losses[name] = float(model(ids, labels=ids).loss)
            if name == "int4":
                losses["int4, dequantised"] = float(_dequantized(model)(ids, labels=ids).loss)
        writing[name] = lambda model=model, cache=cache: _processor_time(model, cache, ids[:, :1])
        reading[name] = lambda model=model, cache=cache: _processor_time(model, cache, ids[:, :512])
    wrote, read = interleave(writing, 3 * options.rounds, _dot), interleave(reading, options.rounds, _dot)
    return {
        **environment(model),
        "writing": {name: spread(taken).median for name, taken in wrote.items()},
        "reading": {name: spread(taken).median for name, taken in read.items()},
        "losses": losses,
    }


@torch.no_grad()
def _processor_time(model: Any, cache: Any, ids: torch.Tensor) -> float:
    fork = cache.fork()
    model(ids[:, :1], cache=fork, logits_to_keep=1)
    start = time.process_time()
    model(ids, cache=fork, logits_to_keep=1)
    return time.process_time() - start


def _dequantized(model: Any) -> Any:
    """A copy with float32 weights in place of the stored ones."""
    plain_model = copy.deepcopy(model)
    for parent in list(plain_model.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, QuantizedLinear):
                new: Any = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
                new.weight, new.bias = nn.Parameter(module.dequantize()), module.bias
                setattr(parent, name, new)
            elif isinstance(module, QuantizedEmbedding):
                setattr(parent, name, nn.Embedding.from_pretrained(module.dequantize()))
    return plain_model


def time_under_load(options: argparse.Namespace) -> dict[str, Any]:
    """A token after 2,048 tokens while another program spins on a core, and the base model's in torch float32."""
    base, model = load_model("smollm2-135m"), smollm2()
    with ahn.mode(model, "ahn", **SPAN):
        cases = {"base": FullBaseline(base, model, 2048).decode, "ahn": ArmBaseline(model, "ahn", 2048).decode}
    spinner = [sys.executable, "-c", "import os; os.sched_setaffinity(0, {0})\nwhile True: pass"]
    found: dict[str, Any] = {}
    for state, command in (("quiet", [sys.executable, "-c", ""]), ("busy", spinner)):
        with subprocess.Popen(command) as process:
            try:
                taken = interleave(cases, options.rounds, _dot)
            finally:
                process.kill()
        found[state] = {name: spread(seconds).median for name, seconds in taken.items()}
    return {**environment(model), **found}


def time_loading(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds and peak memory of loading the GGUF file with its tokenizer, in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--load"], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def load_once() -> None:
    """What the process of `time_loading` does."""
    from ahn.models.smollm2 import gguf_file

    before = _peak_kib()
    start = time.process_time()
    load_tokenizer(gguf_file())
    load_model(gguf_file())
    seconds, after = time.process_time() - start, _peak_kib()
    facts = {
        "seconds": seconds,
        "imports_kib": before,
        "peak_kib": after,
        "file_kib": gguf_file().stat().st_size // 1024,
    }
    print(json.dumps(facts))


def _peak_kib() -> int:
    """Most memory that this program has held; that of the process that started it does not count."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))


MEASURES = {
    "peer": time_peer,
    "base": time_base,
    "shape": time_shape,
    "formats": time_formats,
    "load": time_under_load,
    "loading": time_loading,
}


def lines(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What was to be reached: the sentence, the target, what was measured."""
    rows: list[tuple[str, str, str]] = []
    if "peer" in found and "llama.cpp" in found["peer"]["arms"]:
        by_place = {(row["arm"], row["context"]): row for row in found["peer"]["rows"]}
        due = {64: "0.7", 2048: "1.2", 8192: "3.5", 16384: "10", 32768: "20"}
        for context in sorted({context for _, context in by_place}):
            faster = by_place["ahn", context]["writing_faster"]
            rows.append((f"speed of writing after {context:,} tokens", due.get(context, ""), f"{faster:.2f}"))
        if ("ahn", 8192) in by_place:
            own, other = (by_place[arm, 8192]["reading_from_start"] for arm in ("ahn", "llama.cpp"))
            rows.append(("speed of reading 8,192 tokens", "3", f"{own / other:.1f}"))
    if "peer" in found:
        writing = {row["arm"]: row["writing_faster"] for row in found["peer"]["rows"] if row["context"] == 8192}
        if writing:
            more = writing["window"] / writing["ahn+64:learned"]
            rows.append(("time of a token with memory and 64 anchors, against the window alone", "1.06", f"{more:.2f}"))
    for context, faster in found.get("base", {"faster": {}})["faster"].items():
        due_base = {"8192": "6", "32768": "25"}[str(context)]
        what = f"speed of writing after {int(context):,} tokens, against the base in torch float32"
        rows.append((what, due_base, f"{faster:.1f}"))
    if "shape" in found:
        rows.append(("a token of the 3B shape, over its floor", "1.4", f"{found['shape']['over_floor']:.2f}"))
    if "load" in found:
        busy = found["load"]["busy"]
        what = "speed of writing with one of two cores taken, against the base in torch float32"
        rows.append((what, "1", f"{busy['base'] / busy['ahn']:.1f}"))
    if "loading" in found:
        own = found["loading"]
        peak = (own["peak_kib"] - own["imports_kib"]) / own["file_kib"]
        rows.append(("peak memory of loading, beyond the imports, against the file", "1.3", f"{peak:.2f}"))
    if "formats" in found:
        losses = found["formats"]["losses"]
        apart = abs(losses["int4"] - losses["int4, dequantised"])
        rows.append(("loss in 4 bits, less that of the dequantised weights", "1e-4", f"{apart:.0e}"))
    return rows


def tables(found: dict[str, Any]) -> list[str]:
    """Tables of what was measured, as Markdown."""
    text = ["| SmolLM2 in 4 bits | target | measured |", "|---|---|---|"]
    text += [f"| {' | '.join(row)} |" for row in lines(found)]
    if "peer" in found:
        arms = found["peer"]["arms"]
        for key, what in (("writing", "ms a token, after"), ("reading_from_start", "tokens read a second, of")):
            text += ["", f"| {what} | {' | '.join(arms)} |", "|---|" + "---|" * len(arms)]
            for context in sorted({row["context"] for row in found["peer"]["rows"]}):
                cells = [f"{row[key]:,.1f}" for row in found["peer"]["rows"] if row["context"] == context]
                text.append(f"| {context:,} | {' | '.join(cells)} |")
    if "formats" in found:
        text += [
            "",
            "| weights | ms of processor time a token | s for 512 tokens | nats per token |",
            "|---|---|---|---|",
        ]
        for name, seconds in found["formats"]["writing"].items():
            read, loss = found["formats"]["reading"][name], found["formats"]["losses"][name]
            text.append(f"| {name} | {1e3 * seconds:.1f} | {read:.2f} | {loss:.4f} |")
    return text


def kept() -> dict[str, Any]:
    """What was measured before."""
    found: dict[str, Any] = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.is_file() else {}
    return found


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--only", nargs="+", choices=MEASURES, default=list(MEASURES))
    arguments.add_argument("--contexts", nargs="+", type=int, default=list(CONTEXTS))
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--load", action="store_true", help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.load:
        load_once()
        return
    found = kept()
    for part in options.only:
        started = time.monotonic()
        print(f"{part} ...", end="", flush=True)
        found[part] = plain(MEASURES[part](options))
        print(f" {time.monotonic() - started:.0f} s", flush=True)
        write_text(KEPT, json.dumps(found, indent=1) + "\n")
    print("\n".join(tables(found)))


def _dot() -> None:
    print(".", end="", flush=True)


if __name__ == "__main__":
    main()
