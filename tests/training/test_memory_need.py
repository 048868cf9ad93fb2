"""What a training is said to hold: against the tensors of real steps, for the recipes, and on the command line."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ahn
from ahn.cli import main
from ahn.training.distiller import Distiller
from ahn.training.memory_need import memory_need
from ahn.training.sampling import Span
from ahn.training.settings import TrainSettings, read_yaml
from tests.scripts import ROOT
from tests.tiny import text, tiny

RECIPES = [*sorted(ROOT.glob("examples/train_qwen*.yaml")), ROOT / "examples" / "train_8_gpus.yaml"]


class LiveTensors(TorchDispatchMode):
    """Bytes of all tensors that operations make and that are not gone, and the most that they ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        made = operation(*arguments, **(options or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._forget, storage._cdata)
        return made

    def _forget(self, storage: int) -> None:
        self.now -= self.sizes.pop(storage, 0)


@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2},
        {"hidden_size": 128, "intermediate_size": 1024, "num_hidden_layers": 2},
        {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 4},
    ],
    ids=["small", "wide", "deep"],
)
def test_against_the_tensors_of_a_step(sizes: dict[str, int], tmp_path: Path) -> None:
    model = tiny("qwen2", **sizes, vocab_size=259)
    model.save_pretrained(tmp_path / "base")
    settings = TrainSettings(
        model=str(tmp_path / "base"), length=512, window=32, sinks=4, totals=(64, 128), sink_counts=(4,),
        checkpointing="layers", dtype="float32",
    )  # fmt: skip
    counted = memory_need(settings)
    ahn.attach(model, settings.memory_config())
    distiller = Distiller(model)
    distiller.activation_checkpointing_enable()
    with LiveTensors() as live:
        distiller(text(1, 512), [Span(32, 4)])["kl"].backward()
    step = sum(size for part, size in counted.parts.items() if part not in ("base model", "memories, gradients, AdamW"))
    assert step == pytest.approx(live.peak, rel=0.35)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_fit_into_80_gigabytes(recipe: Path) -> None:
    settings = TrainSettings.from_dict(read_yaml(recipe))
    need = memory_need(settings)
    assert 10e9 < need.total < 60e9
    assert need.step_tokens * (8 if "8_gpus" in recipe.name else 1) == 128 * 24576  # the published global batch


def test_memories_of_several_kinds_are_counted_as_each_layer_has_them(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)

    def bytes_of(memory: str) -> int:
        settings = TrainSettings(model=str(tmp_path), memory=memory, checkpointing="layers", dtype="float32")
        return memory_need(settings).parts["memories, gradients, AdamW"]

    lower, upper = bytes_of("gated_delta_net"), bytes_of("linearized_attention")
    assert bytes_of("gated_delta_net+linearized_attention") == (2 * lower + upper) / 3


def test_a_dry_run_loads_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--config", str(RECIPES[0]), "--data", "texts", "--out", str(tmp_path / "out"), "--dry-run"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "all together" in shown
    assert "Per process." in shown
    assert not (tmp_path / "out").exists()
    assert main([*words, "--checkpointing", "none"]) == 2
    assert "the need of memory is counted for checkpointing: layers" in capsys.readouterr().err
