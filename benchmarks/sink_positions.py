"""Does a model read on past its trained context? Absolute against bounded sinks on Python's language reference.

    python benchmarks/sink_positions.py            # about 113,000 tokens, some ten minutes on a laptop

Reads the reference in `window` mode with both settings and prints the mean negative log-likelihood (nats per token) of
early and late tokens, beside the same tokens read fresh from 4,096 tokens before them, which shows what the text itself
explains.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch

import ahn
from ahn.models import load_model, load_tokenizer

EARLY, LATE, RUN_UP = (6_000, 16_000), (90_000, 100_000), 4_096


@torch.inference_mode()
def token_nll(model, ids: torch.Tensor, chunk: int = 512) -> tuple[torch.Tensor, list[dict[str, float]]]:
    """Negative log-likelihood of every token but the first, `[T - 1]`, and what was held on the way."""
    cache, parts, held, last = ahn.HippocampalCache(model), [], [], None
    started = time.perf_counter()
    for start in range(0, ids.size(1), chunk):
        piece = ids[:, start : start + chunk]
        logits = model(piece, cache=cache).logits[0]
        ahead = logits[:-1] if last is None else torch.cat((last, logits[:-1]))
        parts.append(torch.nn.functional.cross_entropy(ahead, piece[0, -len(ahead) :], reduction="none"))
        last = logits[-1:]
        if start % (chunk * 20) == 0:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
            held.append({"tokens": cache.seen_tokens, "cache_bytes": cache.nbytes, "peak_resident_mb": peak})
            print(held[-1], f"{cache.seen_tokens / (time.perf_counter() - started):.0f} tokens/s", flush=True)
    return torch.cat(parts), held


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--window", type=int, default=1024)
    arguments.add_argument("--sinks", type=int, default=32)
    arguments.add_argument("--tokens", type=int, default=LATE[1])
    arguments.add_argument("--json", type=Path)
    options = arguments.parse_args()
    model, tokenizer = load_model("smollm2-135m"), load_tokenizer("smollm2-135m")
    ids = tokenizer("\n\n".join(topics.values()), return_tensors="pt").input_ids[:, : options.tokens]
    ahn.attach(model, ahn.AHNConfig(window=options.window, sinks=options.sinks, sink_positions="bounded"))
    result: dict[str, object] = {"window": options.window, "sinks": options.sinks, "tokens": ids.size(1)}
    for positions in ("bounded", "absolute"):
        with ahn.mode(model, "window", sink_positions=positions):
            nll, held = token_nll(model, ids)
        result[positions] = {name: nll[a - 1 : b - 1].mean().item() for name, (a, b) in spans().items()}
        result[f"{positions}_held"] = held
        print(positions, result[positions], flush=True)
    with ahn.mode(model, "window"):
        fresh = {}
        for name, (a, b) in spans().items():
            nll, _ = token_nll(model, ids[:, a - RUN_UP : b])
            fresh[name] = nll[RUN_UP - 1 :].mean().item()
    result["fresh"] = fresh
    print("fresh", fresh)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


def spans() -> dict[str, tuple[int, int]]:
    """The stretches of the text that are compared."""
    return {"early": EARLY, "late": LATE}


if __name__ == "__main__":
    main()
