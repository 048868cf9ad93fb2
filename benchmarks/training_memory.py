"""Peak memory of one step of distillation, with what each kind of checkpointing and slicing saves.

    python benchmarks/training_memory.py                 # SmolLM2, 4,096 tokens, float32: some ten minutes on a laptop

Each case runs in a process of its own: the model is loaded, one step is taken (forward and backward pass of teacher and
student), and the most memory that the process ever held is printed. `whole logits` computes the same divergence the
plain way, from the logits of all positions of both models.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import torch

import ahn
from ahn.models import load_model
from ahn.training import Distiller

SPAN = (256, 32)
CASES = ("layers", "attention", "none", "layers, whole logits")


def whole_logits(model, ids: torch.Tensor) -> torch.Tensor:
    """The divergence from two tensors of logits, `[T, V]` each."""
    with torch.no_grad(), ahn.mode(model, "full"):
        expected = model(ids, use_cache=False).logits[:, sum(SPAN) :].log_softmax(-1)
    with ahn.mode(model, "ahn", window=SPAN[0], sinks=SPAN[1]):
        logits = model(ids, use_cache=False).logits[:, sum(SPAN) :]
    return torch.nn.functional.kl_div(logits.log_softmax(-1), expected, log_target=True, reduction="sum")


def step(case: str, length: int) -> dict[str, object]:
    """One step, and what it took."""
    model = load_model("smollm2-135m", "float32")
    torch.manual_seed(0)
    ahn.attach(model, ahn.AHNConfig(window=SPAN[0], sinks=SPAN[1]))
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    distiller = Distiller(model, recompute_attention=case != "none")
    if case.startswith("layers"):
        distiller.activation_checkpointing_enable()
    ids = torch.randint(3, 49_000, (1, length))
    started = time.perf_counter()
    if case.endswith("whole logits"):
        loss = whole_logits(model, ids)
    else:
        loss = distiller(ids, [SPAN])["kl"]
    loss.backward()
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    gib = {"loaded_gib": loaded / 2**20, "peak_gib": peak / 2**20}
    return {"case": case, "length": length, "loss": float(loss.detach()), "seconds": seconds, **gib}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--length", type=int, default=4096)
    arguments.add_argument("--cases", nargs="*", default=list(CASES), choices=CASES)
    arguments.add_argument("--one", choices=CASES, help="run this case here and print it as JSON")
    options = arguments.parse_args()
    if options.one:
        print(json.dumps(step(options.one, options.length)))
        return
    for case in options.cases:
        call = [sys.executable, __file__, "--one", case, "--length", str(options.length)]
        done = subprocess.run(call, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        print(
            f"{case:>22}: peak {found['peak_gib']:.2f} GiB ({found['loaded_gib']:.2f} with the model loaded), "
            f"{found['seconds']:.0f} s, loss {found['loss']:.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
