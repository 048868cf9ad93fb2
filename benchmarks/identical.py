"""Whether two versions of this library compute the same numbers with the shipped memories, bit for bit.

    python benchmarks/identical.py write old.pt     # in the old tree, with its own src on PYTHONPATH
    python benchmarks/identical.py write new.pt     # in the new one
    python benchmarks/identical.py compare old.pt new.pt

Tiny random models of four families, float32 and bfloat16, with the kernels in C and without, with and without padding,
read at once, in chunks and token by token: fresh weights, logits and states; and the losses and gradients of training.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path.cwd()))

from tests.tiny import awaken, read, text, tiny

import ahn
from ahn import native
from ahn.attachment import attachment_of
from ahn.training import distillation_loss
from ahn.training.transfer import transfer_loss

MEMORIES = ("gated_delta_net", "delta_net", "mamba2")
FAMILIES = (("llama", "rope"), ("llama:wide", "none"), ("qwen3", "rope"), ("gpt2", "rope"))
SPAN = {"window": 16, "sinks": 5}
CHUNKS = ([90], [40, *[1] * 20, 30], [1] * 90)


def numbers() -> Iterator[tuple[str, Tensor]]:
    """All tensors by name."""
    for memory, dtype, kernels, (family, positions) in itertools.product(
        MEMORIES, (torch.float32, torch.bfloat16), (True, False), FAMILIES
    ):
        model = tiny(family).to(dtype)
        torch.manual_seed(3)
        ahn.attach(model, ahn.AHNConfig(memory=memory, memory_positions=positions, **SPAN))  # type: ignore[arg-type]
        name = f"{memory}/{dtype}/{'C' if kernels else 'torch'}/{family}"
        for site in attachment_of(model).sites:
            for key, weight in site.memory.named_parameters():  # type: ignore[union-attr]
                yield f"{name}/fresh/{site.index}.{key}", weight
        awaken(model)
        with contextlib.nullcontext() if kernels else native.switched_off():
            yield from reading(model, name)
        if kernels and dtype is torch.float32:
            yield from training(model, name)


def reading(model: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Logits and states."""
    ids = text(3, 90)
    mask = torch.ones_like(ids)
    mask[1, :9] = mask[2, :30] = 0
    for padded, chunks in itertools.product((False, True), CHUNKS):
        cache = ahn.HippocampalCache(model)
        logits = read(model, ids, list(chunks), cache=cache, **({"attention_mask": mask} if padded else {}))
        yield f"{name}/{padded}/{len(chunks)}/logits", logits
        for index, layer in enumerate(cache.layers):
            yield f"{name}/{padded}/{len(chunks)}/state {index}", layer.state  # type: ignore[attr-defined]


def training(model: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Losses and gradients."""
    ids = text(3, 90)
    for site in attachment_of(model).sites:
        site.memory.requires_grad_(True)  # type: ignore[union-attr]
    batch = {"input_ids": ids}
    for kind, loss in (
        ("labels", lambda: model(ids, labels=ids, use_cache=False).loss),
        ("distill", lambda: distillation_loss(model, batch, {"kl": 1}, *SPAN.values()).mean({"kl": 1})),
        ("transfer", lambda: transfer_loss(model, batch, **SPAN).mean({"transfer": 1})),
    ):
        model.zero_grad()
        found = loss()
        found.backward()
        yield f"{name}/{kind}/loss", found
        for key, parameter in model.named_parameters():
            if parameter.grad is not None:
                yield f"{name}/{kind}/gradient/{key}", parameter.grad


def compare(old: dict[str, Tensor], new: dict[str, Tensor]) -> None:
    """Prints how many tensors differ, and the largest difference of each kind relative to the length of the tensor."""
    if old.keys() != new.keys():
        raise SystemExit(f"only in one of them: {', '.join(sorted(old.keys() ^ new.keys())[:5])}")
    apart: dict[str, list[float]] = defaultdict(list)
    for name, before in old.items():
        if not torch.equal(before, new[name]):
            kind = "gradients" if "gradient" in name else name.rsplit("/", 1)[-1]
            change = (before.double() - new[name].double()).norm() / before.double().norm()
            apart[f"{name.partition('/')[0]} {kind}"].append(float(change))
    print(f"{len(old)} tensors, {sum(map(len, apart.values()))} differ")
    for kind, changes in apart.items():
        print(f"{kind}: {len(changes)}, by up to {max(changes):.1e}")


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("command", choices=("write", "compare"))
    arguments.add_argument("files", nargs="+", type=Path)
    options = arguments.parse_args()
    torch.set_num_threads(1)
    if options.command == "write":
        torch.save({name: tensor.detach().clone() for name, tensor in numbers()}, options.files[0])
    else:
        compare(*(torch.load(file) for file in options.files))
