"""The folder of made things: one process makes, others wait, and nobody sees half of it."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ahn._home import home, make_once
from ahn.errors import ModelError

SLOW_MAKER = """
import sys, time
from pathlib import Path
from ahn._home import make_once

def make(folder):
    (folder / "first").write_text("half")
    Path(sys.argv[2]).touch()
    time.sleep(float(sys.argv[3]))
    (folder / "second").write_text("whole")

make_once(Path(sys.argv[1]), make, doing="Making it", needed_bytes=1)
print(sorted(p.name for p in Path(sys.argv[1]).iterdir() if not p.name.startswith(".")))
"""


def start(folder: Path, started: Path, seconds: float) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", SLOW_MAKER, str(folder), str(started), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


def fill(folder: Path) -> None:
    (folder / "first").write_text("")
    (folder / "second").write_text("")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"AHN_HOME": "/a/b", "XDG_CACHE_HOME": "/c"}, "/a/b"),
        ({"AHN_HOME": "~/b"}, "/user/b"),
        ({"AHN_HOME": "", "XDG_CACHE_HOME": "/c"}, "/c/ahn"),
        ({"XDG_CACHE_HOME": "relative"}, "/user/.cache/ahn"),
        ({}, "/user/.cache/ahn"),
    ],
)
def test_home(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: str) -> None:
    for name in ("AHN_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**environment, "HOME": "/user"}.items():
        monkeypatch.setenv(name, value)
    assert home() == Path(expected)


def test_made_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "deep" / "thing"
    for _ in range(2):
        assert make_once(folder, fill, doing="Making it", needed_bytes=1) == folder
    assert capsys.readouterr().err == "Making it ...\n"
    assert oct(folder.stat().st_mode & 0o777) == "0o755"


def test_two_processes_make_it_once(tmp_path: Path) -> None:
    folder, started = tmp_path / "thing", tmp_path / "started"
    first = start(folder, started, seconds=1.0)
    wait_for(started)
    assert not folder.exists()
    second = start(folder, tmp_path / "never", seconds=0.0)
    outputs = [process.communicate(timeout=60) for process in (first, second)]
    assert [out for out, _ in outputs] == ["['first', 'second']\n"] * 2
    assert outputs[0][1] == "Making it ...\n"
    assert outputs[1][1] in ("Waiting for another process: Making it ...\n", "")
    assert not (tmp_path / "never").exists()


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system cannot kill -9")
def test_a_killed_process_leaves_nothing_that_is_used(tmp_path: Path) -> None:
    folder, started = tmp_path / "thing", tmp_path / "started"
    process = start(folder, started, seconds=600.0)
    wait_for(started)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert not folder.exists()
    assert list(tmp_path.glob(".thing.*")), "the killed process left its half"
    make_once(folder, fill, doing="Making it", needed_bytes=1)
    assert (folder / "second").exists()
    assert not list(tmp_path.glob(".thing.*"))


def test_a_failed_make_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        fill(folder)
        raise ModelError("on purpose")

    with pytest.raises(ModelError, match="on purpose"):
        make_once(tmp_path / "thing", fail, doing="Making it", needed_bytes=1)
    assert [path.name for path in tmp_path.iterdir()] in ([], ["thing.lock"])


def test_an_incomplete_folder_is_made_anew(tmp_path: Path) -> None:
    folder = tmp_path / "thing"
    folder.mkdir()
    (folder / "first").write_text("copied by hand, half of it")
    make_once(folder, fill, doing="Making it", needed_bytes=1)
    assert (folder / "first").read_text() == ""


def test_unwritable_place(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        ModelError, match=r"cannot be written: (Not a directory|File exists)\. Set AHN_HOME to a folder .* 600 MB free"
    ):
        make_once(tmp_path / "file" / "thing", fill, doing="Making it", needed_bytes=600 << 20)


@pytest.mark.parametrize("when", ["before", "during"])
def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    def fill_up(folder: Path) -> None:
        (folder / "first").touch()
        raise OSError(28, "No space left on device")

    if when == "before":
        usage = shutil.disk_usage(tmp_path)._replace(free=5 << 20)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ModelError, match=r"(only 5 MB are free|No space left on device)\. Set AHN_HOME"):
        make_once(tmp_path / "thing", fill_up, doing="Making it", needed_bytes=600 << 20)
    assert not (tmp_path / "thing").exists()
    assert not list(tmp_path.glob(".thing.*"))
