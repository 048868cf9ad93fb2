"""Whether SmolLM2 with the memories that ship computes what it computed at another revision, to the last bit.

    python benchmarks/same_numbers.py --against a542a72            # about three minutes on one core
    python benchmarks/same_numbers.py --against a542a72 --speed    # times of both in turns, on a quiet machine
    AHN_NATIVE=0 python benchmarks/same_numbers.py --against ...   # the same without the kernels in C

A text is read in chunks and then token by token, with and without anchors; logits, everything that the cache holds, the
losses of the distillation and the gradients of the memories are compared. Each revision runs in a process of its own,
which knows the library by its public names alone.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.revision import checked_out, git  # noqa: E402

MEMORIES = ("gated_delta_net", "delta_net", "mamba2")
WINDOW, SINKS, ANCHORS = 256, 32, (0, 64)
READ_TOKENS, DECODED_TOKENS, CHUNK_TOKENS = 700, 48, 173
TRAINED_TOKENS, TRAINED_WINDOW, TRAINED_SINKS = 160, 48, 8
TIMED_READ, TIMED_DECODED = 1024, 64
ROUNDS = 7
Tensors = dict[str, torch.Tensor]


def write_numbers(folder: Path) -> None:
    """Writes every number of the library that this process imports to `numbers.safetensors`.

    Args:
        folder: Where to write.
    """
    numbers: Tensors = {}
    for memory in MEMORIES:
        model, ids = load(memory)
        for anchors in ANCHORS:
            with mode(model, anchors):
                read = read_text(model, ids[:, : READ_TOKENS + DECODED_TOKENS], folder / "cache")
            numbers |= {f"{memory}, {anchors} anchors, {name}": tensor for name, tensor in read.items()}
        numbers |= {f"{memory}, {name}": tensor for name, tensor in train(model, ids[:, :TRAINED_TOKENS]).items()}
    save_file({name: tensor.contiguous() for name, tensor in numbers.items()}, folder / "numbers.safetensors")


def load(memory: str) -> tuple[Any, torch.Tensor]:
    """SmolLM2 with a memory and weights for anchors, and the tokens of a text, `[1, T]`."""
    import ahn
    from ahn.models import load_model, load_tokenizer

    torch.set_num_threads(1)
    model: Any = load_model("smollm2-135m", "float32")
    ahn.load(model, f"smollm2-135m/{memory}")
    ahn.load_anchors(model, "smollm2-135m/anchors")
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    return model.eval(), torch.tensor([load_tokenizer("smollm2-135m")(text)["input_ids"]])


def mode(model: Any, anchors: int) -> Any:
    """The mode that reads with the memory."""
    import ahn

    return ahn.mode(model, "ahn", window=WINDOW, sinks=SINKS, anchors=anchors)


@torch.no_grad()
def read_text(model: Any, ids: torch.Tensor, file: Path) -> Tensors:
    """Logits of a text, whose last tokens are read one by one, and what the cache holds at its end."""
    import ahn

    cache = ahn.HippocampalCache(model)
    spans = [*range(0, READ_TOKENS, CHUNK_TOKENS), *range(READ_TOKENS, ids.size(1) + 1)]
    logits = [model(ids[:, a:b], past_key_values=cache).logits for a, b in pairwise(spans)]
    cache.save(file)
    first = len([a for a in spans if a < READ_TOKENS])
    return {
        "logits of chunks": torch.cat(logits[:first], 1),
        "logits token by token": torch.cat(logits[first:], 1),
        **{f"cache: {name}": tensor for name, tensor in load_file(file).items()},
    }


def train(model: Any, ids: torch.Tensor) -> Tensors:
    """Losses of the distillation of a text and the gradients of the memory."""
    from ahn.training import distillation_loss

    weights = {"kl": 1.0, "ce": 0.5, "attention": 2.0}
    trained = {name: weight for name, weight in model.named_parameters() if re.search(r"\.(memory|ahn)\.", name)}
    for weight in trained.values():
        weight.requires_grad_(True)
    output = distillation_loss(model, {"input_ids": ids}, weights, TRAINED_WINDOW, TRAINED_SINKS)
    output.mean(weights).backward()
    gradients = {f"gradient: {name}": weight.grad for name, weight in trained.items() if weight.grad is not None}
    return {f"loss {name}": loss.detach() for name, loss in output.sums.items()} | gradients


def serve_times() -> None:
    """Answers each line of standard input, a number of anchors, with the seconds of reading and of a decoded token."""
    model, ids = load(MEMORIES[0])
    for line in sys.stdin:
        with mode(model, int(line)):
            sys.stdout.write(" ".join(map(str, seconds(model, ids))) + "\n")
        sys.stdout.flush()


@torch.no_grad()
def seconds(model: Any, ids: torch.Tensor) -> tuple[float, float]:
    """Seconds of reading a text, and of a token after it."""
    import ahn

    cache, begin = ahn.HippocampalCache(model), time.perf_counter()
    model(ids[:, :TIMED_READ], past_key_values=cache, logits_to_keep=1)
    middle = time.perf_counter()
    for place in range(TIMED_READ, TIMED_READ + TIMED_DECODED):
        model(ids[:, place : place + 1], past_key_values=cache)
    return middle - begin, (time.perf_counter() - middle) / TIMED_DECODED


def compare(before: Mapping[str, torch.Tensor], now: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """A line for each quantity: identical, or how much it differs. Layers are taken together."""
    quantities: dict[str, list[str]] = {}
    for name in sorted({*before, *now}):
        quantities.setdefault(re.sub(r"(cache: |layers\.)\d+\.", r"\1N.", name), []).append(name)
    for quantity, names in quantities.items():
        if not all(name in before and name in now for name in names):
            yield f"only {'before' if names[0] in before else 'now'}: {quantity}"
        elif any(before[name].shape != now[name].shape for name in names):
            yield f"another shape: {quantity}, {list(before[names[0]].shape)} -> {list(now[names[0]].shape)}"
        elif all(torch.equal(before[name], now[name]) for name in names):
            yield f"identical: {quantity}"
        else:
            yield f"differs by {max(difference(before[name], now[name]) for name in names):.2g}: {quantity}"


def difference(before: torch.Tensor, now: torch.Tensor) -> float:
    """Largest difference, relative to the largest number."""
    return float((before.double() - now.double()).abs().max() / before.double().abs().max().clamp(min=1e-30))


def start(checkout: Path, *arguments: str, **pipes: Any) -> subprocess.Popen[str]:
    """This script in a process that imports the library of a checkout."""
    place = {"PYTHONPATH": str(checkout / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), *arguments]
    return subprocess.Popen(command, env={**os.environ, **place}, text=True, **pipes)


def compare_numbers(checkout: Path) -> bool:
    """Prints how the numbers of a checkout and of this one compare; whether all are the same."""
    numbers: list[Tensors] = []
    for root in (checkout, ROOT):
        with tempfile.TemporaryDirectory() as folder:
            if start(root, "--write", folder).wait():
                raise SystemExit(f"{root}: its numbers could not be computed")
            numbers.append(load_file(Path(folder) / "numbers.safetensors"))
    lines = list(compare(*numbers))
    sys.stdout.write("\n".join(lines) + "\n")
    return all(line.startswith("identical") for line in lines)


def compare_speed(checkout: Path) -> None:
    """Prints how fast a checkout and this one read and decode, in turns within one run."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    processes = [start(root, "--serve", **pipes) for root in (checkout, ROOT)]
    for anchors in ANCHORS:
        rounds = [[ask(process, anchors) for process in processes] for _ in range(ROUNDS + 1)][1:]
        for place, what in enumerate(("read", "decode")):
            ratio = median(now[place] / before[place] for before, now in rounds)
            times = [1e3 * median(pair[side][place] for pair in rounds) for side in (0, 1)]
            sys.stdout.write(f"{what}, {anchors} anchors: {times[0]:.4g} -> {times[1]:.4g} ms, ratio {ratio:.3f}\n")
    for process in processes:
        process.communicate()


def ask(process: subprocess.Popen[str], anchors: int) -> tuple[float, ...]:
    """The times of one round of a process that serves them."""
    if process.stdin is None or process.stdout is None:
        raise ValueError("the process has no pipes")
    process.stdin.write(f"{anchors}\n")
    process.stdin.flush()
    return tuple(map(float, process.stdout.readline().split()))


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="REV", help="the revision to compare with")
    parser.add_argument("--speed", action="store_true", help="compare times instead of numbers")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        write_numbers(options.write)
    elif options.serve:
        serve_times()
    elif not options.against:
        parser.error("name a revision to compare with: --against REV")
    else:
        with checked_out(options.against) as place:
            sys.stdout.write(
                f"{git('rev-parse', '--short', options.against)} -> {git('rev-parse', '--short', 'HEAD')}\n"
            )
            same = compare_speed(place) if options.speed else compare_numbers(place)
        sys.exit(0 if same in (None, True) else 1)


if __name__ == "__main__":
    main()
