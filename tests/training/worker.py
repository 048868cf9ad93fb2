"""One of two processes that train together; started by torchrun. Writes what the test compares into a folder.

First DDP through `AHNTrainer`, one step, whose gradients are kept; then FSDP2 applied directly to the same model.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parents[2]))
torch.set_num_threads(1)

from accelerate.utils import DistributedType  # noqa: E402

from ahn.checkpoint.content import memory_tensors  # noqa: E402
from ahn.training.batches import collate  # noqa: E402
from ahn.training.distiller import Distiller  # noqa: E402
from ahn.training.processes import part  # noqa: E402
from ahn.training.run import training_arguments  # noqa: E402
from ahn.training.sampling import Span  # noqa: E402
from ahn.training.saving import load_adapter, save_adapter  # noqa: E402
from ahn.training.settings import TrainSettings  # noqa: E402
from tests.tiny import with_memory  # noqa: E402
from tests.training.common import gradients_of_a_step, pieces  # noqa: E402


def world(out: Path) -> None:
    """As `ahn train` under torchrun sets up its processes, with no word about CPUs."""
    arguments = training_arguments(TrainSettings(data=("texts",), out=str(out / "run")), "distill")
    (out / f"world-{arguments.process_index}").write_text(str(arguments.world_size))


def ddp(out: Path) -> None:
    trainer, gradients = gradients_of_a_step(out / "ddp", batch=1, accumulation=2, ddp_backend="gloo")
    assert trainer.accelerator.distributed_type == DistributedType.MULTI_CPU
    assert trainer.accelerator.num_processes == 2
    assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
    if distributed.get_rank() == 0:
        torch.save(gradients, out / "ddp.pt")


def fsdp(out: Path) -> None:
    """Each process has another sequence with another span; the mean of their gradients is the expected one."""
    rank = distributed.get_rank()
    distiller = Distiller(with_memory("llama"), {"kl": 1.0, "attention": 1.0})
    mesh = distributed.init_device_mesh("cpu", (2,))
    for layer in distiller.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(distiller, mesh=mesh)
    assert isinstance(distiller, FSDPModule)
    assert all(isinstance(parameter, DTensor) for parameter in distiller.parameters())
    batch: dict[str, Any] = collate([pieces()[2 * rank], pieces()[2 * rank + 1]])
    sums = distiller(**batch, spans=[Span(16, 4), Span(16 + 8 * rank, 4)])
    torch.stack(list(sums.values())).sum().backward()
    gradients = {name: tensor.grad.full_tensor() for name, tensor in memory_tensors(distiller.model).items()}
    save_adapter(distiller.model, out / "fsdp", write=rank == 0)
    distributed.barrier()
    before = {name: tensor.full_tensor() for name, tensor in memory_tensors(distiller.model).items()}
    with torch.no_grad():
        for tensor in memory_tensors(distiller.model).values():
            tensor.zero_()
    load_adapter(distiller.model, out / "fsdp")
    for name, tensor in memory_tensors(distiller.model).items():
        assert torch.equal(tensor.full_tensor(), before[name])
    if rank == 0:
        torch.save(gradients, out / "fsdp.pt")


if __name__ == "__main__":
    world(Path(sys.argv[1]))
    ddp(Path(sys.argv[1]))
    fsdp(Path(sys.argv[1]))
    part()
