"""What every test runs under: no network, two threads, fixed seeds, and uninitialised memory that shows."""

import os

# Before transformers is imported; a run of the network tests sets it to 0 itself.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Before torch is: threads that spin while they wait take the cores from whatever else runs.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# The processes that tests start, too: workers of pytest share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import logging
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils import _device

from ahn import native
from tests.tiny import DOCUMENTED, MEMORIES, registered

GOLDEN = Path(__file__).parent / "fixtures" / "golden"

# Tiny tensors: a second thread costs more than it helps, above all beside other work.
torch.set_num_threads(1)
# torch remembers its constructors at the first use of `with torch.device(...)`: it must see the real ones.
_device._device_constructors()


def _poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @wraps(make)
    def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = make(*args, **kwargs)
        if kwargs.get("out") is not None or tensor.is_meta:
            return tensor
        with torch.no_grad():
            if tensor.is_floating_point() or tensor.is_complex():
                tensor.detach().fill_(float("nan"))
            elif tensor.dtype in (torch.int8, torch.int16, torch.int32, torch.int64):
                tensor.detach().fill_(torch.iinfo(tensor.dtype).max // 2)
        return tensor

    return wrapper


@pytest.fixture(autouse=True, scope="session")
def kernels_are_compiled() -> None:
    """Before any test, so that none of them sees the note that they are being compiled."""
    native.why_not()


@pytest.fixture(autouse=True, scope="session")
def uninitialised_memory_shows() -> Iterator[None]:
    """`torch.empty` and its kin hand out NaN (integers: a huge number) instead of whatever was there."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("empty", "empty_like", "empty_strided"):
            patch.setattr(torch, name, _poisoned(getattr(torch, name)))
        for name in ("new_empty", "new_empty_strided"):
            patch.setattr(torch.Tensor, name, _poisoned(getattr(torch.Tensor, name)))
        yield


class _Deprecations(logging.Handler):
    """Raises what transformers only logs of its deprecations, as pytest does with those it warns of."""

    def emit(self, record: logging.LogRecord) -> None:
        if "deprecated" in (message := record.getMessage()):
            raise FutureWarning(message)


@pytest.fixture(autouse=True, scope="session")
def logged_deprecations_are_errors() -> Iterator[None]:
    """Some names of transformers are deprecated in its log alone, where `filterwarnings` does not look."""
    logger, handler = logging.getLogger("transformers"), _Deprecations(logging.WARNING)
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Every test starts from the same random numbers, alone or among others."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="module", params=[*MEMORIES, DOCUMENTED])
def memory(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every memory's name: those of the registry, and the one of CONTRIBUTING, which is added at run time."""
    with registered(request.param) as name:
        yield name


@pytest.fixture
def golden_dir() -> Callable[[str], Path]:
    """`golden_dir("qwen2_DeltaNet")`: the folder of fixtures that the published implementation produced."""

    def folder(name: str) -> Path:
        path = GOLDEN / name
        if not path.is_dir():
            raise ValueError(f"no golden folder {name!r}: there are {sorted(p.name for p in GOLDEN.iterdir())}")
        return path

    return folder


@pytest.fixture(scope="session")
def smollm2_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An `AHN_HOME` of this test run, so that the user's own is neither needed nor touched."""
    folder = tmp_path_factory.mktemp("ahn-home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AHN_HOME", str(folder))
        yield folder
    shutil.rmtree(folder, ignore_errors=True)  # half a gigabyte, which pytest would keep for three runs


@pytest.fixture(scope="session")
def smollm2_conversion(smollm2_home: Path) -> list[tuple[str, str]]:
    """What two processes printed and said that asked for SmolLM2 at the same moment, as two shells may do."""
    command = [sys.executable, "-c", "from ahn import models; print(models.resolve('smollm2-135m'))"]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, env={**os.environ}, **pipes) for _ in range(2)]
    return [process.communicate(timeout=240) for process in both]
