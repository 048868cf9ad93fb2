"""Two processes on one machine: their gradient is that of one process, in DDP and in FSDP2."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ahn.checkpoint.content import memory_tensors
from ahn.errors import ConfigError
from ahn.training.batches import collate
from ahn.training.distiller import Distiller
from ahn.training.run import training_arguments
from ahn.training.sampling import Span
from ahn.training.settings import TrainSettings
from tests.tiny import with_memory
from tests.training.common import gradients_of_a_step, pieces


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what two processes computed."""
    out = tmp_path_factory.mktemp("together")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*torchrun, str(Path(__file__).parent / "worker.py"), str(out)],
        capture_output=True,
        text=True,
        timeout=200,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return out


def assert_same(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        # Sums of products in another order: their rounding is relative to the largest numbers of the tensor.
        allowed = 4e-6 * float(gradient.abs().max())
        torch.testing.assert_close(actual[name], gradient, rtol=1e-5, atol=allowed, msg=name)


def test_processes_without_a_gpu_find_each_other(together: Path) -> None:
    assert [(together / f"world-{rank}").read_text() for rank in range(2)] == ["2", "2"]


def test_processes_that_would_train_alone_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("ahn.training.run._started_processes", lambda: 2)
    monkeypatch.setattr("ahn.training.run._on_cpus", dict)
    with pytest.raises(ConfigError, match="do not find each other"):
        training_arguments(TrainSettings(data=("texts",), out=str(tmp_path)), "distill")


def test_ddp_gives_the_gradient_of_one_process(together: Path, tmp_path: Path) -> None:
    _, alone = gradients_of_a_step(tmp_path, batch=1, accumulation=4)
    assert_same(torch.load(together / "ddp.pt"), alone)


def test_fsdp2_gives_the_gradient_of_one_process(together: Path) -> None:
    distiller = Distiller(with_memory("llama"), {"kl": 1.0, "attention": 1.0})
    for rank in range(2):
        batch: dict[str, Any] = collate([pieces()[2 * rank], pieces()[2 * rank + 1]])
        sums = distiller(**batch, spans=[Span(16, 4), Span(16 + 8 * rank, 4)])
        (torch.stack(list(sums.values())).sum() / 2).backward()
    alone = {name: tensor.grad for name, tensor in memory_tensors(distiller.model).items()}
    assert_same(torch.load(together / "fsdp.pt"), alone)


def test_the_sharded_adapter_is_whole(together: Path) -> None:
    import ahn

    model, expected = with_memory("llama"), with_memory("llama")
    with torch.no_grad():
        for tensor in memory_tensors(model).values():
            tensor.zero_()
    ahn.load(model, together / "fsdp")
    for name, tensor in memory_tensors(expected).items():
        assert torch.equal(memory_tensors(model)[name], tensor)
