"""Compiles the kernels for this machine, once, with the C compiler that it has."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from ahn._home import home, make_once
from ahn.errors import ModelError

SOURCES = sorted(Path(__file__).parent.glob("*.[ch]"))
_COMPILERS = ("gcc", "cc", "clang")
_OPTIONS = ("-O3", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")
_LIBRARY = "kernels.so"
_SECONDS = 120  # after which a compiler is given up
_BYTES = 2**20


class CannotBuild(Exception):
    """The kernels cannot be compiled or loaded here; the message says why."""


def load() -> ctypes.CDLL:
    """The kernels, compiled before the first use on this machine and kept in the library's folder.

    Raises:
        CannotBuild: There is no compiler, or it cannot compile them, or the system cannot load what it made.
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
        make_once(
            folder,
            lambda place: _compile(commands, place / _LIBRARY),
            doing="Compiling kernels for this CPU (once, a few seconds)",
            needed_bytes=_BYTES,
        )
        return ctypes.CDLL(str(folder / _LIBRARY))
    except ModelError as error:
        raise CannotBuild(str(error)) from None
    except OSError as error:
        raise CannotBuild(f"the compiled kernels cannot be loaded: {error}") from None


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
        if name and (found := shutil.which(name)):
            return found
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
    told = cpus.read_text(errors="replace").splitlines()
    return "\n".join(
        sorted({line for line in told if line.startswith(("model name", "flags", "Features", "CPU part"))})
    )
