"""The folder of made things: one process makes, others wait, and nobody sees half of it."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ahn._home import home, make_once, write_text
from ahn.errors import ModelError, OutputError

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


class TestWrittenFiles:
    def test_replaces_what_was_there_and_keeps_its_rights(self, tmp_path: Path) -> None:
        file = tmp_path / "page"
        file.write_text("old")
        file.chmod(0o640)
        write_text(file, "new")
        assert (file.read_text(), oct(file.stat().st_mode & 0o777)) == ("new", "0o640")
        assert list(tmp_path.iterdir()) == [file]

    def test_new_ones_have_the_rights_of_new_files(self, tmp_path: Path) -> None:
        write_text(tmp_path / "ours", "text")
        (tmp_path / "theirs").write_text("text")
        assert len({(tmp_path / name).stat().st_mode for name in ("ours", "theirs")}) == 1

    def test_writes_where_a_link_points_to(self, tmp_path: Path) -> None:
        (tmp_path / "there").mkdir()
        link, file = tmp_path / "link", tmp_path / "there" / "file"
        link.symlink_to(file)
        for text in ("first", "second"):  # the file need not be there
            write_text(link, text)
            assert link.is_symlink()
            assert file.read_text() == text

    def test_refuses_what_is_no_file(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "folder").mkdir()
        (tmp_path / "null").symlink_to("/dev/null")
        for name in ("pipe", "folder", "null"):
            with pytest.raises(OutputError, match=f"{name}: it is (a folder|no regular file)"):
                write_text(tmp_path / name, "text")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "null", "pipe"]

    def test_refuses_what_is_read(self, tmp_path: Path) -> None:
        source, link = tmp_path / "source", tmp_path / "link"
        source.write_text("text")
        link.symlink_to(source)
        with pytest.raises(OutputError, match="it is what is read"):
            write_text(link, "page", inputs=[tmp_path / "another", source])
        assert source.read_text() == "text"

    @pytest.mark.parametrize("when", ["while it is written", "when it is flushed"])
    def test_a_full_disk_leaves_what_was_there(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
    ) -> None:
        file = tmp_path / "page"
        file.write_text("old")

        def fail(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(*((os, "fsync") if when == "when it is flushed" else (Path, "write_text")), fail)
        with pytest.raises(OutputError, match=rf"cannot write {file}: No space left on device"):
            write_text(file, "new")
        assert file.read_text() == "old"
        assert list(tmp_path.iterdir()) == [file]

    @pytest.mark.parametrize("name", ["no/such/folder", "x" * 300])
    def test_names_a_place_that_cannot_be(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(OutputError, match="cannot write") as error:
            write_text(tmp_path / name, "text")
        assert "\n" not in str(error.value)
        assert list(tmp_path.iterdir()) == []
