"""Saved caches and adapters that something has spoiled: one clear line, never a crash or other numbers in silence.

`AHN_FUZZ=3000 pytest tests/cache/test_mangled.py` spoils thousands of them instead of some dozens.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import ahn
from ahn import checkpoint
from ahn.cache import storage
from tests.tiny import read, text, tiny, with_memory

COUNT = int(os.environ.get("AHN_FUZZ", "48"))
BATCH = 24
SEEDS = range(0, COUNT, BATCH)
ODD: list[Any] = [None, True, 0, -1, 1, 10**30, 0.5, float("nan"), "", "x" * 300, "\x1b[31m", [], {}, [[[]]], {"a": {}}]
KINDS: dict[str, dict[str, Any]] = {
    "memory": {},
    "anchors": {"anchors": 4, "anchor_score": "key_diff"},
    "unrotated": {"memory_positions": "none", "sink_positions": "bounded"},
    "mamba2": {"memory": "mamba2"},
    "some layers": {"layers": (1,)},
}


@pytest.fixture(scope="module", params=list(KINDS))
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, torch.Tensor]:
    """A model, a cache of it in a file, and what the model says when it goes on from there."""
    model = with_memory("llama:wide", **KINDS[request.param])
    cache = ahn.HippocampalCache(model)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, :3] = 0
    read(model, text(2, 40), 20, attention_mask=mask, cache=cache)
    file = tmp_path_factory.mktemp("cache") / "cache"
    cache.save(file)
    return model, file, go_on(model, file)


def refusal(use: Callable[[], object]) -> str | None:
    """In which words something is refused, or `None`; anything but an error of this library is raised."""
    try:
        use()
    except ahn.AHNError as error:
        return str(error)
    return None


def go_on(model: Any, file: Path) -> torch.Tensor:
    logits: torch.Tensor = read(model, text(2, 12, seed=3), [5, 1, 1, 5], cache=ahn.HippocampalCache.load(file, model))
    return logits


def spoil_bytes(file: Path, chance: random.Random) -> None:
    """Cuts, flips, zeroes, repeats or appends bytes."""
    content = bytearray(file.read_bytes())
    place, length = chance.randrange(len(content)), chance.choice([1, 1, 8, 100])
    kind = chance.choice(["cut", "flip", "zero", "repeat", "append"])
    if kind == "cut":
        del content[place:]
    elif kind == "flip":
        content[place] ^= 1 << chance.randrange(8)
    elif kind == "zero":
        content[place : place + length] = bytes(length)
    elif kind == "repeat":
        content[place:place] = content[place : place + length]
    else:
        content += os.urandom(length)
    file.write_bytes(bytes(content))


def spoil_values(values: Any, chance: random.Random) -> Any:
    """JSON with one value of it replaced, removed or repeated."""
    if not isinstance(values, dict | list) or not values or chance.random() < 0.2:
        return chance.choice(ODD)
    key = chance.choice(list(values) if isinstance(values, dict) else range(len(values)))
    changed: Any = dict(values) if isinstance(values, dict) else list(values)
    if chance.random() < 0.2:
        del changed[key]
    else:
        changed[key] = spoil_values(values[key], chance)
    return changed


def spoil_tensor(tensor: torch.Tensor, chance: random.Random) -> torch.Tensor:
    """A tensor of another shape or dtype, or with numbers that cannot be."""
    if tensor.dim() == 0 or tensor.numel() == 0:
        return torch.ones(3, 2)
    kinds: list[Callable[[], torch.Tensor]] = [
        lambda: tensor[:0],
        lambda: tensor[..., :0],
        lambda: tensor[..., :-1],
        lambda: torch.cat((tensor, tensor), chance.randrange(tensor.dim())),
        lambda: tensor.flatten(),
        lambda: tensor.transpose(0, -1),
        lambda: tensor[None],
        lambda: tensor.double() if tensor.is_floating_point() else tensor.int(),
        lambda: tensor.to(torch.int64) if tensor.is_floating_point() else tensor.float(),
        lambda: torch.full_like(tensor, float("nan") if tensor.is_floating_point() else 2**62),
        lambda: torch.full_like(tensor, float("inf") if tensor.is_floating_point() else -(2**62)),
    ]
    return chance.choice(kinds)().contiguous().clone()


def resign(file: Path, chance: random.Random) -> None:
    """Changes what a saved cache holds, and its checksum with it, as somebody would who means harm."""
    with safe_open(file, "pt") as content:
        header = json.loads(content.metadata()["ahn_cache"])
        tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    name = chance.choice(list(tensors))
    kind = chance.choice(["header", "tensor", "tensor", "tensor", "drop", "rename"])
    if kind == "header":
        header = spoil_values(header, chance)
    elif kind == "tensor":
        tensors[name] = spoil_tensor(tensors[name], chance)
    elif kind == "drop":
        del tensors[name]
    else:
        tensors[chance.choice(["x", "0.", "7.keys", "padding", f"{name}.x", "ballot.votes"])] = tensors.pop(name)
    words = json.dumps(header)
    save_file(tensors, file, metadata={"ahn_cache": words, "sha256": storage._checksum(words, tensors)})


@pytest.mark.parametrize("seed", SEEDS)
def test_a_spoiled_cache_is_refused(saved: tuple[Any, Path, torch.Tensor], tmp_path: Path, seed: int) -> None:
    model, file, expected = saved
    for number in range(seed, seed + BATCH):
        spoiled, chance = tmp_path / "cache", random.Random(number)
        shutil.copy(file, spoiled)
        spoil_bytes(spoiled, chance)
        words = refusal(lambda file=spoiled: torch.testing.assert_close(go_on(model, file), expected, rtol=0, atol=0))
        assert "\n" not in (words or "")


@pytest.mark.parametrize("seed", SEEDS)
def test_a_changed_cache_with_the_right_checksum_never_crashes(
    saved: tuple[Any, Path, torch.Tensor], tmp_path: Path, seed: int
) -> None:
    model, file, _ = saved
    for number in range(seed, seed + BATCH):
        changed = tmp_path / "cache"
        shutil.copy(file, changed)
        resign(changed, random.Random(number))
        for use in (lambda file=changed: go_on(model, file), lambda file=changed: storage.describe_cache(file)):
            assert "\n" not in (refusal(use) or "")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    checkpoint.save(with_memory("llama"), folder)
    return folder


@pytest.mark.parametrize("seed", SEEDS)
def test_a_spoiled_adapter_is_refused(adapter: Path, tmp_path: Path, seed: int) -> None:
    for number in range(seed, seed + BATCH):
        folder, chance, model = tmp_path / f"adapter-{number}", random.Random(number), tiny("llama")
        shutil.copytree(adapter, folder)
        config = folder / "ahn_config.json"
        if chance.random() < 0.3:
            spoil_bytes(folder / "ahn.safetensors", chance)
        elif chance.random() < 0.3:
            spoil_bytes(config, chance)
        else:
            config.write_text(json.dumps(spoil_values(json.loads(config.read_text()), chance)))
        for use in (
            lambda folder=folder: checkpoint.describe(folder),
            lambda folder=folder: checkpoint.convert(folder, folder / "published"),
            lambda folder=folder, model=model: checkpoint.load(model, folder),
        ):
            assert "\n" not in (refusal(use) or "")
