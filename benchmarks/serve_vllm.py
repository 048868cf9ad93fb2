"""A base with a memory and the same base with full attention, both served by vLLM; and one request against `ahn` alone.

    python benchmarks/serve_vllm.py                                  # 16 requests of 8,192 tokens, window 1,024
    python benchmarks/serve_vllm.py --requests 4 --tokens 2048 --window 256   # the same, shorter

Needs the environment of `make vllm`. Each engine runs in a process of its own, one after the other, with the same bytes
for keys and values. The last rows take turns in one process.
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of each prompt")
    parser.add_argument("--written", type=int, default=64, help="tokens that are written after each prompt")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--sinks", type=int, default=32)
    parser.add_argument("--anchors", type=int, default=0)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="room for keys, values and states")
    parser.add_argument("--parts", default="memory,full,one")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")  # texts longer than the base was trained on
    if options.folder is not None:
        part: Any = {"one": one_request}.get(options.parts, many_requests)
        print("RESULT " + json.dumps(part(options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        merge(Path(folder))
        results = {part: in_a_process(part, Path(folder)) for part in options.parts.split(",")}
    for row in table(options, results):
        print("| " + " | ".join(row) + " |")


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


def engine_of(options: Any, part: str, requests: int) -> Any:
    """An engine of vLLM with a memory or with full attention."""
    import vllm

    own = {"window": options.window, "sinks": options.sinks, "anchors": options.anchors}
    if options.anchors:
        own["anchor_weights"] = "smollm2-135m/anchors"
    return vllm.LLM(
        model=str(options.folder / part),
        dtype="float32",
        max_model_len=options.tokens + options.written + 512,
        max_num_seqs=requests,
        max_num_batched_tokens=1024,
        kv_cache_memory_bytes=int(options.gigabytes * (1 << 30)),
        enable_prefix_caching=False,
        enforce_eager=True,
        skip_tokenizer_init=True,
        hf_overrides={"ahn": own} if part == "memory" else None,
    )


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


def many_requests(options: Any) -> Numbers:
    """Times of requests that are sent at once: until the last has begun to be answered, and from then on."""
    llm: Any = engine_of(options, options.parts, options.requests).llm_engine
    for number, prompt in enumerate(prompts(options, options.requests)):
        llm.add_request(str(number), {"prompt_token_ids": prompt}, greedy(options.written))
    written: dict[str, int] = {}
    begin, most, together = time.perf_counter(), 0, []
    while llm.has_unfinished_requests():
        before, start = sum(written.values()), time.perf_counter()
        for output in llm.step():
            written[output.request_id] = len(output.outputs[0].token_ids)
        running = sum(0 < count < options.written for count in written.values())
        most = max(most, running)
        if sum(written.values()) - before == running == options.requests:
            together.append(time.perf_counter() - start)
    total = time.perf_counter() - begin
    return {"total": total, "step": statistics.median(together) if together else 0.0, "most": most}


def one_request(options: Any) -> Numbers:
    """Seconds a token of one request in vLLM and in `ahn` alone, turn by turn; medians."""
    import torch

    import ahn

    llm: Any = engine_of(options, "memory", 1).llm_engine
    prompt = prompts(options, 1)[0]
    config = ahn.AHNConfig(window=options.window, sinks=options.sinks, anchors=options.anchors)
    model: Any = ahn.from_pretrained(options.folder / "memory", config=config)
    if options.anchors:
        ahn.load_anchors(model, "smollm2-135m/anchors")
    llm.add_request("0", {"prompt_token_ids": prompt}, greedy(options.written + 8))
    outputs: list[Any] = []
    while not outputs:
        outputs = llm.step()
    times: dict[str, list[float]] = {"vllm": [], "ahn": []}
    with torch.inference_mode():
        cache = ahn.HippocampalCache(model)
        token = model(torch.tensor([prompt]), cache=cache, logits_to_keep=1).logits.argmax(-1)
        for _ in range(options.written):
            start = time.perf_counter()
            outputs = llm.step()
            between = time.perf_counter()
            token = model(token, cache=cache).logits.argmax(-1)
            times["ahn"].append(time.perf_counter() - between)
            times["vllm"].append(between - start)
    same = outputs[0].outputs[0].token_ids[-1] == int(token)
    return {**{name: statistics.median(each) for name, each in times.items()}, "same": float(same)}


def table(options: Any, results: dict[str, Numbers]) -> list[tuple[str, str]]:
    """What was found, as ratios."""
    rows = []
    if {"memory", "full"} <= results.keys():
        memory, full = results["memory"], results["full"]
        rows.append(("all requests read and answered, full attention against memory", ratio(full, memory, "total")))
        if memory["step"] and full["step"]:
            rows.append(("a step in which all of them write a token, likewise", ratio(full, memory, "step")))
        rows.append(("requests that wrote at the same time: memory", f"{memory['most']:.0f} of {options.requests}"))
        rows.append(
            ("requests that wrote at the same time: full attention", f"{full['most']:.0f} of {options.requests}")
        )
    if "one" in results:
        rows.append(
            ("a token of one request, vLLM against ahn alone", ratio(results["one"], results["one"], "vllm", "ahn"))
        )
        rows.append(("the last token of both is the same", "yes" if results["one"]["same"] else "no"))
    return rows


def ratio(above: Numbers, below: Numbers, name: str, other: str = "") -> str:
    return f"{above[name] / below[other or name]:.2f} times"


if __name__ == "__main__":
    main()
