"""Files that something has spoiled, of every kind: one clear line, never a crash or other numbers in silence.

`AHN_FUZZ=3000 pytest tests/test_fuzz.py` spoils thousands of each kind instead of some dozens.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ahn
from ahn import checkpoint
from ahn.attachment import find_attachment
from ahn.cache import storage
from ahn.checkpoint.content import memory_tensors
from ahn.evaluation.journal import Journal
from ahn.evaluation.report import EvaluationReport, read_report
from ahn.training.settings import TrainSettings, read_yaml
from tests.tiny import give_score_weights, read, text, tiny, with_memory

COUNT = int(os.environ.get("AHN_FUZZ", "32"))
BATCH = 32
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


def spoil_folder(source: Path, target: Path, names: tuple[str, str], chance: random.Random) -> None:
    """A copy of a folder of weights, one of whose two files, by name, is spoiled."""
    config, weights = names
    shutil.copytree(source, target)
    if chance.random() < 0.3:
        spoil_bytes(target / weights, chance)
    elif chance.random() < 0.3:
        spoil_bytes(target / config, chance)
    else:
        values = spoil_values(json.loads((target / config).read_text()), chance)
        (target / config).write_text(json.dumps(values))


def resign_folder(folder: Path, names: tuple[str, str], chance: random.Random) -> None:
    """Changes a tensor of a folder of our format, and its checksum with it, as somebody would who means harm."""
    config, weights = names
    tensors, values = load_file(folder / weights), json.loads((folder / config).read_text())
    name = chance.choice(list(tensors))
    tensors[chance.choice([name, f"{name}.x", "layers.99999999999.o_proj", "x"])] = spoil_tensor(
        tensors.pop(name), chance
    )
    save_file(tensors, folder / weights)
    values["weights"]["sha256"] = hashlib.sha256((folder / weights).read_bytes()).hexdigest()
    (folder / config).write_text(json.dumps(values))


def refused_in_one_line(*uses: Callable[[], object]) -> None:
    for use in uses:
        words = refusal(use) or ""
        assert "\n" not in words
        assert len(words) < 2000


def load_and_detach(base: Any, folder: Path) -> None:
    refused_in_one_line(lambda: checkpoint.describe(folder), lambda: checkpoint.load(base, folder))
    if find_attachment(base) is not None:
        ahn.detach(base)


MEMORY, ANCHORS = ("ahn_config.json", "ahn.safetensors"), ("anchors_config.json", "anchors.safetensors")
PUBLISHED = ("config.json", "model.safetensors")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter, weights of anchor scores, the published format, and a base model."""
    place, model = tmp_path_factory.mktemp("folders"), with_memory("qwen3")
    give_score_weights(model)
    checkpoint.save(model, place / "adapter")
    checkpoint.save_anchors(model, place / "anchors")
    checkpoint.convert(place / "adapter", place / "published")
    tiny("qwen3").save_pretrained(place / "base")
    return place


@pytest.fixture(scope="module")
def base() -> Any:
    return tiny("qwen3")


@pytest.mark.filterwarnings("ignore")  # a spoiled folder may name another base model
@pytest.mark.parametrize("seed", SEEDS)
def test_a_spoiled_adapter_is_refused(folders: Path, base: Any, tmp_path: Path, seed: int) -> None:
    whole = load_file(folders / "adapter" / "ahn.safetensors")
    for number in range(seed, seed + BATCH):
        folder, chance = tmp_path / f"adapter-{number}", random.Random(number)
        spoil_folder(folders / "adapter", folder, MEMORY, chance)
        refused_in_one_line(
            lambda folder=folder: checkpoint.describe(folder),
            lambda folder=folder: checkpoint.convert(folder, folder / "published"),
            lambda folder=folder: checkpoint.load(base, folder),
        )
        if find_attachment(base) is not None:  # what was taken has the weights that were saved
            assert all(torch.equal(tensor, whole[name]) for name, tensor in memory_tensors(base).items())
            ahn.detach(base)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", SEEDS)
def test_a_changed_adapter_with_the_right_checksum_never_crashes(
    folders: Path, base: Any, tmp_path: Path, seed: int
) -> None:
    for number in range(seed, seed + BATCH):
        folder = tmp_path / f"adapter-{number}"
        shutil.copytree(folders / "adapter", folder)
        resign_folder(folder, MEMORY, random.Random(number))
        load_and_detach(base, folder)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", SEEDS)
def test_spoiled_weights_of_anchor_scores_are_refused(folders: Path, tmp_path: Path, seed: int) -> None:
    model = with_memory("qwen3")
    for number in range(seed, seed + BATCH):
        folder, chance = tmp_path / f"anchors-{number}", random.Random(number)
        if chance.random() < 0.5:
            spoil_folder(folders / "anchors", folder, ANCHORS, chance)
        else:
            shutil.copytree(folders / "anchors", folder)
            resign_folder(folder, ANCHORS, chance)
        refused_in_one_line(lambda folder=folder: checkpoint.load_anchors(model, folder))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", SEEDS)
def test_a_spoiled_published_folder_is_refused(folders: Path, base: Any, tmp_path: Path, seed: int) -> None:
    for number in range(seed, seed + BATCH):
        folder = tmp_path / f"published-{number}"
        spoil_folder(folders / "published", folder, PUBLISHED, random.Random(number))
        load_and_detach(base, folder)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", SEEDS)
def test_a_spoiled_base_model_is_refused(folders: Path, tmp_path: Path, seed: int) -> None:
    from ahn.models import load_model

    for number in range(seed, seed + BATCH):
        folder = tmp_path / f"base-{number}"
        spoil_folder(folders / "base", folder, PUBLISHED, random.Random(number))
        refused_in_one_line(lambda folder=folder: load_model(folder))


SETTINGS = {"command": "recall", "lengths": [512, 1024], "arms": ["ahn", "full"], "seed": 0}


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("journal") / "journal.jsonl"
    begun = Journal(file, SETTINGS)
    begun.pin("weights", "abc")
    for number in range(4):
        begun.add(f"item {number}", {"answer": "4815", "score": 0.5, "tokens": [1, 2, 3]})
    return file


@pytest.mark.parametrize("seed", SEEDS)
def test_a_spoiled_journal_is_refused_or_goes_on(journal: Path, tmp_path: Path, seed: int) -> None:
    for number in range(seed, seed + BATCH):
        file, chance = tmp_path / f"journal-{number}", random.Random(number)
        shutil.copy(journal, file)
        if chance.random() < 0.5:
            spoil_bytes(file, chance)
        else:
            lines = file.read_text().splitlines()
            line = chance.randrange(len(lines))
            lines[line] = json.dumps(spoil_values(json.loads(lines[line]), chance))
            file.write_text("\n".join(lines) + "\n")

        def go_on_with(file: Path = file) -> None:
            again = Journal(file, SETTINGS)
            again.pin("weights", "abc")
            again.add("another", {})

        refused_in_one_line(go_on_with)


@pytest.mark.parametrize("seed", SEEDS)
def test_spoiled_settings_of_a_training_are_refused(tmp_path: Path, seed: int) -> None:
    whole = TrainSettings(data=("text.txt",), out="out").to_dict()
    for number in range(seed, seed + BATCH):
        file, chance = tmp_path / "train.yaml", random.Random(number)
        if chance.random() < 0.5:
            file.write_text(yaml.safe_dump(spoil_values(whole, chance)))
        else:
            file.write_text(yaml.safe_dump(whole))
            spoil_bytes(file, chance)
        refused_in_one_line(lambda file=file: TrainSettings.from_dict(read_yaml(file)))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_spoiled_report_is_refused(tmp_path: Path, seed: int) -> None:
    whole = tmp_path / "whole.json"
    EvaluationReport("recall", {"seed": 0}, {"torch": "2"}, {"ahn": {"score": 0.5}}).write(whole)
    for number in range(seed, seed + BATCH):
        file, chance = tmp_path / "report.json", random.Random(number)
        shutil.copy(whole, file)
        if chance.random() < 0.5:
            spoil_bytes(file, chance)
        else:
            file.write_text(json.dumps(spoil_values(json.loads(file.read_text()), chance)))
        refused_in_one_line(lambda file=file: read_report(file))
