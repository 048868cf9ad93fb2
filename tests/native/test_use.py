"""When the kernels run and when they do not, and what a whole model makes of them."""

import copy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ahn
from ahn import native
from ahn.backbone import linear
from ahn.generation import new_cache
from ahn.native import build
from tests.tiny import awaken, tiny

needs_kernels = pytest.mark.skipif(native.why_not() is not None, reason=f"no kernels here: {native.why_not()}")
WIDE = {"hidden_size": 64, "head_dim": 16}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that run."""
    names: list[str] = []
    run = native._run

    def noted(name: str, *arguments: Any) -> None:
        names.append(name)
        run(name, *arguments)

    monkeypatch.setattr(native, "_run", noted)
    return names


@pytest.fixture
def forgotten() -> Iterator[None]:
    """Kernels are looked for anew inside the test, and after it."""
    native._kernels.cache_clear()
    yield
    native._kernels.cache_clear()


def model_with_memory(**config: Any) -> Any:
    model = tiny("llama", **WIDE)
    ahn.attach(model, ahn.AHNConfig(window=12, sinks=3, **config))
    awaken(model)
    return model


def read(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of a text read in a chunk, token by token, and in a chunk again."""
    cache, logits, seen = ahn.HippocampalCache(model), [], 0
    for size in (30, 1, 1, 1, 1, 1, 9):
        here = {} if mask is None else {"attention_mask": mask[:, : seen + size]}
        logits.append(model(ids[:, seen : seen + size], cache=cache, **here).logits)
        seen += size
    return torch.cat(logits, 1)


@needs_kernels
@pytest.mark.parametrize("settings", [{}, {"anchors": 4}, {"anchors": 4, "sink_positions": "bounded"}], ids=str)
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_a_model_reads_and_writes_as_in_torch(
    calls: list[str], memory: str, settings: dict[str, Any], padded: bool
) -> None:
    model = model_with_memory(memory=memory)
    ids = torch.randint(3, 128, (3, 44), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :5] = mask[2, :12] = 0
    with ahn.mode(model, "ahn", **settings):
        got = read(model, ids, mask if padded else None)
        used = set(calls)
        calls.clear()
        with native.switched_off():
            expected = read(model, ids, mask if padded else None)
    assert not calls
    assert {"ahn_attend_one", "ahn_linear", "ahn_scan"} <= used
    assert used & {"ahn_decode_add", "ahn_decode_add_linearized"}
    assert padded or "ahn_attend" in used
    real = mask.bool() if padded else torch.ones_like(ids).bool()
    torch.testing.assert_close(got[real], expected[real], atol=2e-4, rtol=2e-4)


@needs_kernels
@pytest.mark.parametrize("why", ["float64", "sizes", "off", "mode full"])
def test_torch_does_what_the_kernels_cannot(calls: list[str], why: str) -> None:
    model = tiny("llama", **({"head_dim": 8} if why == "sizes" else WIDE))
    ahn.attach(model, ahn.AHNConfig(window=12, sinks=3))
    model.to(torch.float64 if why == "float64" else torch.float32).eval()
    ids = torch.randint(3, 128, (1, 44))
    calls.clear()  # attaching reads a text
    with torch.no_grad(), ahn.mode(model, "full" if why == "mode full" else "ahn"):
        if why == "off":
            with native.switched_off():
                read(model, ids)
        elif why == "mode full":
            cache = new_cache(model)
            for piece in ids.split(1, 1):
                model(piece, cache=cache)
        else:
            read(model, ids)
    if why == "sizes":  # of a head; what does not ask for whole heads runs
        assert set(calls) <= {"ahn_linear", "ahn_linear_each"}
    else:
        assert not calls


@needs_kernels
def test_training_takes_gradients_through_the_same_model() -> None:
    model = model_with_memory()
    ids = torch.randint(3, 128, (1, 44))
    loss = model(ids, labels=ids).loss
    loss.backward()
    with torch.no_grad():
        assert abs(float(model(ids, labels=ids).loss) - float(loss)) < 1e-4
    assert model.model.layers[0].self_attn.memory.o_proj.grad.abs().sum() > 0


def forwards(model: nn.Module) -> int:
    return sum("forward" in vars(module) for module in model.modules())


def test_detaching_leaves_no_trace_in_linear_maps() -> None:
    model = tiny("llama", **WIDE)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    ahn.attach(model)
    assert forwards(model)
    ahn.detach(model)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before


def test_maps_that_something_else_runs_stay_as_they_are() -> None:
    model = tiny("llama", **WIDE)
    own = model.lm_head.forward = lambda x: x @ model.lm_head.weight.T
    ahn.attach(model)
    assert model.lm_head.forward is own
    ahn.detach(model)
    assert model.lm_head.forward is own


@needs_kernels
@torch.no_grad()
def test_a_copy_multiplies_with_its_own_weights(calls: list[str]) -> None:
    model = model_with_memory()
    ids = torch.randint(3, 128, (1, 44))
    twin = copy.deepcopy(model)
    expected = read(twin, ids)
    for parameter in model.parameters():
        parameter.mul_(0.5)
    torch.testing.assert_close(read(twin, ids), expected, atol=0, rtol=0)
    assert "ahn_linear" in calls  # of the head


@needs_kernels
@torch.no_grad()
def test_a_call_after_a_decoded_token_is_the_base_models(calls: list[str]) -> None:
    model = model_with_memory()
    read(model, torch.randint(3, 128, (1, 44)))
    with ahn.mode(model, "full"):
        model(torch.tensor([[5]]))
    calls.clear()
    model.lm_head(torch.randn(1, 1, 64))
    assert not calls


@torch.no_grad()
def test_without_a_compiler_everything_runs_in_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, forgotten: None
) -> None:
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    assert not native.ready(torch.ones(16))
    assert native.why_not() == "there is no C compiler; install gcc or clang"
    assert "changes no result: there is no C compiler" in caplog.text
    assert read(model_with_memory(), torch.randint(3, 128, (1, 44))).isfinite().all()


def test_a_compiler_that_fails_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, forgotten: None) -> None:
    compiler = tmp_path / "broken-cc"
    compiler.write_text("#!/bin/sh\necho no such instruction >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv("AHN_HOME", str(tmp_path / "home"))
    assert native.why_not() == f"{compiler} cannot compile the kernels: no such instruction"


def test_a_folder_that_cannot_be_written_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, forgotten: None
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("AHN_HOME", str(tmp_path / "file"))
    reason = native.why_not()
    assert reason is not None
    assert "Set AHN_HOME to a folder that is writable" in reason


def test_the_variable_switches_them_off() -> None:
    said = subprocess.run(
        [sys.executable, "-c", "from ahn import native; print(native.why_not())"],
        env={"AHN_NATIVE": "0", "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.strip() == "AHN_NATIVE=0 is set"


@needs_kernels
def test_they_are_compiled_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, forgotten: None) -> None:
    monkeypatch.setenv("AHN_HOME", str(tmp_path))
    assert native.why_not() is None
    monkeypatch.setattr(build, "_compile", lambda commands, to: pytest.fail("compiled again"))
    native._kernels.cache_clear()
    assert native.why_not() is None


def spoil(kind: str, folder: Path) -> None:
    """Does something to compiled kernels that makes them unfit to load."""
    library = folder / "kernels.so"
    content = library.read_bytes()
    if kind in ("truncated", "another library"):
        library.unlink()  # this process has it in its memory
        library.write_bytes(content[:5000] if kind == "truncated" else Path(torch._C.__file__).read_bytes())
        library.chmod(0o755)
    elif kind == "no checksum":
        (folder / "kernels.sha256").unlink()
    elif kind == "a link":
        library.rename(folder / "elsewhere.so")
        library.symlink_to("elsewhere.so")
    elif kind == "others write the file":
        library.chmod(0o777)
    else:
        folder.chmod(0o777)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, forgotten: None) -> list[Path]:
    """Places to which kernels are compiled in a home of this test alone; they are copies of those of this machine."""
    library = Path(native._kernels()._name)
    native._kernels.cache_clear()
    places: list[Path] = []

    def copy(commands: object, to: Path) -> None:
        places.append(to)
        shutil.copyfile(library, to)

    monkeypatch.setattr(build, "_compile", copy)
    monkeypatch.setenv("AHN_HOME", str(tmp_path))
    return places


@needs_kernels
@pytest.mark.parametrize(
    "kind",
    ["truncated", "another library", "no checksum", "a link", "others write the file", "others write the folder"],
)
def test_unfit_kernels_are_compiled_anew(kind: str, compiled: list[Path], tmp_path: Path) -> None:
    assert native.why_not() is None
    (library,) = tmp_path.glob("kernels/*/kernels.so")
    content = library.read_bytes()
    spoil(kind, library.parent)
    for _ in range(2):
        native._kernels.cache_clear()
        assert native.why_not() is None
    assert len(compiled) == 2
    assert library.read_bytes() == content
    assert [oct(path.lstat().st_mode & 0o777) for path in (library, library.parent)] == ["0o755", "0o755"]


@needs_kernels
def test_nobody_else_writes_among_the_kernels(
    monkeypatch: pytest.MonkeyPatch, compiled: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels").chmod(0o777)
    assert native.why_not() is None
    assert oct((tmp_path / "kernels").stat().st_mode & 0o777) == "0o755"
    owner = (tmp_path / "kernels").stat().st_uid
    monkeypatch.setattr(build.os, "getuid", lambda: owner + 1)
    native._kernels.cache_clear()
    reason = native.why_not()
    assert reason is None if owner == 0 else "belongs to another user" in str(reason)  # what root owns is for all


def test_the_note_is_of_the_last_call() -> None:
    linear.note_call(True)
    linear.note_call(False)
    plain = nn.Linear(8, 8)
    linear.speed_up(plain)
    x = torch.randn(1, 8)
    assert torch.equal(plain(x), nn.functional.linear(x, plain.weight, plain.bias))
    linear.restore(plain)
    assert "forward" not in vars(plain)
