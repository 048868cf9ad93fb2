"""A base with a memory and the same base with full attention, both served by vLLM; and one request against `ahn` alone.

    python benchmarks/serve_vllm.py                                     # 16 requests of 8,192 tokens, window 1,024
    python benchmarks/serve_vllm.py --tokens 2048 --window 256          # the same, shorter
    python benchmarks/serve_vllm.py --parts whole,writing,one           # with the time that reading takes: an hour

Needs the environment of `make vllm`. `whole` runs each engine in a process of its own, one after the other, with the
same bytes for keys and values. In `writing`, both engines take turns in one process. There full attention has read one
prompt for all requests, which it shares, and a memory as many tokens as its window holds: its step costs the same at
any length. In `one`, vLLM and `ahn` take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

Numbers = dict[str, float]
Table = list[tuple[str, str]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of each prompt")
    parser.add_argument("--written", type=int, default=64, help="tokens that are written after each prompt")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--sinks", type=int, default=32)
    parser.add_argument("--anchors", type=int, default=0)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="room for keys, values and states of an engine")
    parser.add_argument("--parts", default="writing,one")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")  # texts longer than the base was trained on
    if options.folder is not None:
        part: Any = {"one": one_request, "writing": writing}.get(options.parts, whole)
        print("RESULT " + json.dumps(part(options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        merge(Path(folder))
        for part in options.parts.split(","):
            names = ("memory", "full") if part == "whole" else (part,)
            for row in table(part, options, [in_a_process(name, Path(folder)) for name in names]):
                print("| " + " | ".join(row) + " |", flush=True)


def merge(folder: Path) -> None:
    """The base alone and with its memory, as vLLM reads them."""
    from ahn.checkpoint import merge as write_merged
    from ahn.models import resolve

    write_merged("smollm2-135m", "smollm2-135m/gated_delta_net", folder / "memory")
    (folder / "full").symlink_to(resolve("smollm2-135m"))


def in_a_process(part: str, folder: Path) -> Numbers:
    """What one part measures, in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--parts", part, "--folder", str(folder)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found = next(line for line in output.splitlines() if line.startswith("RESULT "))
    numbers: Numbers = json.loads(found.removeprefix("RESULT "))
    return numbers


def engine_of(options: Any, part: str, requests: int, shares: bool = False) -> Any:
    """An engine of vLLM with a memory or with full attention, which may share what prompts have in common."""
    import vllm

    own = {"ahn_window": options.window, "ahn_sinks": options.sinks, "ahn_anchors": options.anchors}
    if options.anchors:
        own["ahn_anchor_weights"] = "smollm2-135m/anchors"
    llm: Any = vllm.LLM(
        model=str(options.folder / part),
        dtype="float32",
        max_model_len=options.tokens + options.written + 512,
        max_num_seqs=requests,
        max_num_batched_tokens=1024,
        kv_cache_memory_bytes=int(options.gigabytes * (1 << 30)),
        enable_prefix_caching=shares,
        enforce_eager=True,
        skip_tokenizer_init=True,
        hf_overrides=own if part == "memory" else None,
    )
    return llm.llm_engine


def prompts(options: Any, count: int) -> list[list[int]]:
    """Different prompts of equal length, from the reference of Python's language."""
    from ahn.cli.texts import reference
    from ahn.models import load_tokenizer
    from ahn.models.text import text_tokens

    ids = text_tokens(reference(), load_tokenizer("smollm2-135m"))
    ids = ids * (1 + (options.tokens + 17 * count) // len(ids))
    return [ids[17 * number : 17 * number + options.tokens] for number in range(count)]


def greedy(tokens: int) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)


def whole(options: Any) -> Numbers:
    """Seconds until requests that are sent at once are answered, and how many of them wrote at the same time."""
    engine = engine_of(options, options.parts, options.requests)
    for number, prompt in enumerate(prompts(options, options.requests)):
        engine.add_request(str(number), {"prompt_token_ids": prompt}, greedy(options.written))
    written: dict[str, int] = {}
    begin, most = time.perf_counter(), 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            written[output.request_id] = len(output.outputs[0].token_ids)
        most = max(most, sum(0 < count < options.written for count in written.values()))
    return {"seconds": time.perf_counter() - begin, "most": most}


def writing(options: Any) -> Numbers:
    """Seconds of a step in which all requests write a token, of both engines turn by turn; medians."""
    own = options.sinks + options.window + 8
    lengths = {"memory": [own] * options.requests, "full": [options.tokens] * options.requests}
    engines = {name: engine_of(options, name, options.requests, name == "full") for name in lengths}
    for name, engine in engines.items():
        texts = prompts(options, options.requests if name == "memory" else 1) * options.requests
        begun: set[str] = set()
        for number, length in enumerate(lengths[name]):
            prompt = {"prompt_token_ids": texts[number][:length]}
            engine.add_request(str(number), prompt, greedy(options.written + 64))
            while name == "full" and not begun:  # the first has read for the others
                begun |= {output.request_id for output in engine.step()}
        while len(begun) < options.requests:
            begun |= {output.request_id for output in engine.step()}
    times: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(options.written):
        for name, engine in engines.items():
            start = time.perf_counter()
            if len(engine.step()) == options.requests:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in times.items()}


def one_request(options: Any) -> Numbers:
    """Seconds a token of one request in vLLM and in `ahn` alone, turn by turn; medians."""
    import torch

    import ahn

    engine = engine_of(options, "memory", 1)
    prompt = prompts(options, 1)[0]
    config = ahn.AHNConfig(window=options.window, sinks=options.sinks, anchors=options.anchors)
    model: Any = ahn.from_pretrained(options.folder / "memory", config=config)
    if options.anchors:
        ahn.load_anchors(model, "smollm2-135m/anchors")
    engine.add_request("0", {"prompt_token_ids": prompt}, greedy(options.written + 8))
    outputs: list[Any] = []
    while not outputs:
        outputs = engine.step()
    times: dict[str, list[float]] = {"vllm": [], "ahn": []}
    with torch.inference_mode():
        cache = ahn.HippocampalCache(model)
        token = model(torch.tensor([prompt]), cache=cache, logits_to_keep=1).logits.argmax(-1)
        for _ in range(options.written):
            start = time.perf_counter()
            outputs = engine.step()
            between = time.perf_counter()
            token = model(token, cache=cache).logits.argmax(-1)
            times["ahn"].append(time.perf_counter() - between)
            times["vllm"].append(between - start)
    same = outputs[0].outputs[0].token_ids[-1] == int(token)
    return {**{name: statistics.median(each) for name, each in times.items()}, "same": float(same)}


def table(part: str, options: Any, results: list[Numbers]) -> Table:
    """What was found, as ratios."""
    first = results[0]
    if part == "whole":
        full = results[1]
        ratio = full["seconds"] / first["seconds"]
        return [
            ("all requests read and answered: full attention against memory", f"{ratio:.2f} times the seconds"),
            ("requests that wrote at the same time: memory", f"{first['most']:.0f} of {options.requests}"),
            ("requests that wrote at the same time: full attention", f"{full['most']:.0f} of {options.requests}"),
        ]
    if part == "writing":
        ratio = first["full"] / first["memory"]
        return [("a step in which all write: full attention against memory", f"{ratio:.2f} times the seconds")]
    return [
        ("a token of one request: vLLM against ahn alone", f"{first['vllm'] / first['ahn']:.2f} times the seconds"),
        ("the last token of both is the same", "yes" if first["same"] else "no"),
    ]


if __name__ == "__main__":
    main()
