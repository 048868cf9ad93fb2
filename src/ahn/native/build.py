"""Compiles the kernels for this machine, once, with the C compiler that it has."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from ahn._home import flush, home, make_once
from ahn.errors import ModelError

SOURCES = sorted(Path(__file__).parent.glob("*.[ch]"))
_COMPILERS = ("gcc", "cc", "clang")
_OPTIONS = ("-O3", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")
_LIBRARY, _CHECKSUM = "kernels.so", "kernels.sha256"
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_SECONDS = 120  # after which a compiler is given up
_BYTES = 2**20


class CannotBuild(Exception):
    """The kernels cannot be compiled or loaded here; the message says why."""


def load() -> ctypes.CDLL:
    """The kernels, compiled before the first use on this machine and kept in the library's folder.

    What lies there is loaded only if it is what was compiled, and if no other user could have changed it; otherwise
    the kernels are compiled anew.

    Raises:
        CannotBuild: There is no compiler, or it cannot compile them, or the system cannot load what it made, or the
            folder belongs to another user.
    """
    if sys.platform == "win32":
        raise CannotBuild("Windows is not supported")
    compiler, openmp = _compiler(), _openmp()
    commands = [[compiler, *_OPTIONS, *tuning, *_threads(openmp)] for tuning in (["-march=native"], ["-mcpu=native"])]
    key = hashlib.sha256()
    for part in (*(file.read_bytes() for file in SOURCES), repr(commands).encode(), _machine().encode()):
        key.update(part)
    folder = home() / "kernels" / key.hexdigest()[:16]
    try:
        _keep_from_others(folder.parent)
        make_once(
            folder,
            lambda target: _make(commands, target),
            doing="Compiling kernels for this CPU (once, a few seconds)",
            needed_bytes=_BYTES,
            is_whole=_is_whole,
        )
        return ctypes.CDLL(str(folder / _LIBRARY))
    except ModelError as error:
        raise CannotBuild(str(error)) from None
    except OSError as error:
        raise CannotBuild(f"the compiled kernels cannot be loaded: {error}") from None


def _keep_from_others(folder: Path) -> None:
    """Takes the right to write in the folder of all kernels, if there is one, from everybody else."""
    if not folder.is_dir():
        return
    status = folder.stat()
    if status.st_uid not in (os.getuid(), 0):
        raise CannotBuild(f"{folder} belongs to another user; set AHN_HOME to a folder of your own")
    if status.st_mode & _OTHERS_WRITE and status.st_uid == os.getuid():
        folder.chmod(0o755)


def _is_safe(path: Path) -> bool:
    """Whether a file or folder is no link and can be changed by nobody but this user and root."""
    status = path.lstat()
    return not stat.S_ISLNK(status.st_mode) and status.st_uid in (os.getuid(), 0) and not status.st_mode & _OTHERS_WRITE


def _is_whole(folder: Path) -> bool:
    """Whether a folder holds the kernels that were compiled into it, and nobody else could have changed them."""
    library, checksum = folder / _LIBRARY, folder / _CHECKSUM
    try:
        safe = all(_is_safe(path) for path in (folder, library, checksum))
        return safe and checksum.read_text() == hashlib.sha256(library.read_bytes()).hexdigest()
    except (OSError, ValueError):
        return False


def _make(commands: list[list[str]], folder: Path) -> None:
    """Compiles the kernels into a folder and waits until they are on the disk."""
    library, checksum = folder / _LIBRARY, folder / _CHECKSUM
    _compile(commands, library)
    library.chmod(0o755)
    checksum.write_text(hashlib.sha256(library.read_bytes()).hexdigest())
    checksum.chmod(0o644)
    for path in (library, checksum):
        flush(path)


def _compile(commands: list[list[str]], to: Path) -> None:
    files = [str(file) for file in SOURCES if file.suffix == ".c"]
    said = ""
    for command in commands:
        # The library of threads comes behind what needs it.
        try:
            done = subprocess.run(
                [*command[:1], *files, *command[1:], "-lm", "-o", str(to)],
                capture_output=True,
                text=True,
                timeout=_SECONDS,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise CannotBuild(f"{command[0]} does not run: {error}") from None
        if done.returncode == 0:
            return
        said = said or done.stderr.strip().partition("\n")[0]
    raise CannotBuild(f"{commands[0][0]} cannot compile the kernels: {said}")


def _compiler() -> str:
    for name in (os.environ.get("CC", ""), *_COMPILERS):
        if name and (path := shutil.which(name)):
            return path
    raise CannotBuild("there is no C compiler; install gcc or clang")


def _openmp() -> Path:
    """The OpenMP library that torch has loaded: a second one would compete with it for the cores."""
    for path in _loaded():
        if path.name.startswith(("libgomp", "libomp", "libiomp")) and path.is_file():
            return path
    raise CannotBuild("torch runs without OpenMP here")


def _loaded() -> Iterator[Path]:
    maps = Path("/proc/self/maps")
    if maps.is_file():
        yield from {Path(line.split(maxsplit=5)[-1]) for line in maps.read_text().splitlines() if "omp" in line}
    yield from (Path(torch.__file__).parent / "lib").glob("lib*omp*.*")


def _threads(openmp: Path) -> list[str]:
    switch = ["-Xpreprocessor", "-fopenmp"] if sys.platform == "darwin" else ["-fopenmp", "-nostdlib", "-lc"]
    return [*switch, str(openmp)]


def _machine() -> str:
    """What the compiler tunes for: kernels in a folder that several machines share must not meet another CPU."""
    cpus = Path("/proc/cpuinfo")
    if not cpus.is_file():
        return f"{platform.platform()} {platform.processor()}"
    lines = cpus.read_text(errors="replace").splitlines()
    return "\n".join(
        sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    )
