"""Reads GGUF files: what they say of a model, and their tensors one at a time.

Arrays of strings are found when a file is opened, and read when they are asked for: a tokenizer has 100,000 of them.
Tensors are read from the file, not mapped, so that no page of it stays in memory beside what is made of it.

Layout of a file: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_STRING, _ARRAY = 8, 9
_NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_LEAST_STRING, _LEAST_TENSOR = 8, 24  # bytes
_PLAIN = {"F32": np.float32, "F16": np.float16, "F64": np.float64}


class UnknownFormatError(ValueError):
    """A file is whole, as far as can be told, and of a form that cannot be read; says so behind the file's name."""


class TensorPlace(NamedTuple):
    """A tensor of a file.

    Attributes:
        name: Its name.
        kind: The type of its numbers or blocks, such as "Q4_0".
        shape: Its sizes, rows first.
        start: Its first byte in the file.
        nbytes: Its bytes.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


class GGUFFile:
    """A GGUF file whose beginning was read.

    Args:
        path: The file.

    Raises:
        UnknownFormatError: It is of a version or byte order, or has types, that are not known.
        ValueError: It is no GGUF file, or cut off.
        OSError: It cannot be read.

    Attributes:
        path: The file.
        tensors: Its tensors by name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._values: dict[str, Callable[[], Any]] = {}
        with path.open("rb") as file:
            self._size = file.seek(0, 2)
            if self._size < len(_MAGIC) + 20:
                raise ValueError(f"it has {self._size} bytes")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                reader = _Reader(mapped, path)
                tensors, values = _read_counts(reader)
                for _ in range(values):
                    key = reader.string()
                    self._values[key] = reader.value(reader.number("<I"))
                entries = [_read_place(reader) for _ in range(tensors)]
        alignment = int(self.value("general.alignment", 32))
        if alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"its alignment is {alignment}")
        data = -(-reader.at // alignment) * alignment
        self.tensors = {entry.name: entry._replace(start=data + entry.start) for entry in entries}
        for entry in self.tensors.values():
            if entry.start + entry.nbytes > self._size:
                raise ValueError(f"it ends within {entry.name}")

    def value(self, key: str, default: Any = None) -> Any:
        """The value of a key, or the default where the file does not say it."""
        stored = self._values.get(key)
        return default if stored is None else stored()

    def read(self, entry: TensorPlace, rows: slice | None = None) -> np.ndarray[Any, Any]:
        """A tensor: its numbers, or bytes of blocks `[..., bytes of a row]` for types other than F16, F32 and F64.

        Args:
            entry: The tensor.
            rows: A span of its rows to read alone.

        Raises:
            ValueError: The file has become shorter.
        """
        kind, height = np.dtype(_PLAIN.get(entry.kind, np.uint8)), entry.shape[0]
        rows = rows or slice(0, height)
        start, stop = (entry.nbytes * row // height for row in (rows.start, rows.stop))
        stored = np.fromfile(self.path, kind, (stop - start) // kind.itemsize, offset=entry.start + start)
        if stored.nbytes != stop - start:
            raise ValueError(f"it ends within {entry.name}")
        return stored if len(entry.shape) == 1 else stored.reshape(rows.stop - rows.start, *entry.shape[1:-1], -1)


class _Reader:
    """Goes through the beginning of a file.

    Args:
        mapped: The file.
        path: Its path, from which arrays of strings are read again when they are asked for.

    Attributes:
        at: The next byte.
    """

    def __init__(self, mapped: mmap.mmap, path: Path) -> None:
        self.mapped, self.path = mapped, path
        self.at = 0

    def number(self, form: str) -> Any:
        """The next number, by its format as of `struct`."""
        start = self.skip(struct.calcsize(form))
        return struct.unpack_from(form, self.mapped, start)[0]

    def string(self) -> str:
        """The next string."""
        length = self.number("<Q")
        start = self.skip(length)
        return str(self.mapped[start : start + length], "utf-8")

    def skip(self, size: int) -> int:
        """Goes on behind this number of bytes; where they begin."""
        start, self.at = self.at, self.at + size
        if self.at > len(self.mapped):
            raise ValueError(f"it ends at byte {len(self.mapped)}")
        return start

    def expect(self, count: int, size: int) -> int:
        """The count, if so many things of at least this size can follow."""
        if count * size > len(self.mapped) - self.at:
            raise ValueError(f"it ends before {count} values")
        return count

    def value(self, kind: int) -> Callable[[], Any]:
        """The next value, of a type by its number; made when it is called."""
        if kind in _NUMBERS:
            number = self.number(_NUMBERS[kind])
            return lambda: number
        if kind == _STRING:
            text = self.string()
            return lambda: text
        if kind != _ARRAY:
            raise ValueError(f"{kind} is no type of values")
        inner, count = self.number("<I"), self.number("<Q")
        if inner in _NUMBERS:
            dtype = np.dtype(_NUMBERS[inner])
            start = self.skip(self.expect(count, dtype.itemsize) * dtype.itemsize)
            return np.frombuffer(self.mapped[start : self.at], dtype).tolist
        if inner == _STRING:
            return self._strings(self.expect(count, _LEAST_STRING))
        values = [self.value(inner) for _ in range(self.expect(count, 1))]
        return lambda: [value() for value in values]

    def _strings(self, count: int) -> Callable[[], list[str]]:
        """An array of strings, of which only the place is found."""
        begin, path = self.at, self.path
        length_at = struct.Struct("<Q").unpack_from
        mapped, at, size = self.mapped, self.at, len(self.mapped)
        for _ in range(count):
            if at + _LEAST_STRING > size:
                raise ValueError(f"it ends at byte {size}")
            at += _LEAST_STRING + length_at(mapped, at)[0]
        self.skip(at - begin)
        return lambda: list(_read_strings(path, begin, at - begin))


def _read_strings(path: Path, start: int, nbytes: int) -> Iterator[str]:
    """The strings that lie one behind the other in a part of a file."""
    with path.open("rb") as file:
        file.seek(start)
        data = file.read(nbytes)
    if len(data) < nbytes:
        raise ValueError(f"it ends at byte {start + len(data)}")
    at, length_at = 0, struct.Struct("<Q").unpack_from
    while at < nbytes:
        end = at + _LEAST_STRING + length_at(data, at)[0]
        yield str(data[at + _LEAST_STRING : end], "utf-8")
        at = end


def _read_counts(reader: _Reader) -> tuple[int, int]:
    """Checks the first bytes; numbers of tensors and of values."""
    start = reader.skip(len(_MAGIC))
    if reader.mapped[start : reader.at] != _MAGIC:
        raise ValueError("it does not begin with GGUF")
    version = reader.number("<I")
    if int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS:
        raise UnknownFormatError("is big-endian, which is not read. Convert the model anew without --bigendian.")
    if version not in _VERSIONS:
        known = " and ".join(map(str, _VERSIONS))
        raise UnknownFormatError(f"has version {version}; read are {known}. Convert the model anew with llama.cpp.")
    tensors, values = reader.number("<Q"), reader.number("<Q")
    return reader.expect(tensors, _LEAST_TENSOR), reader.expect(values, _LEAST_STRING)


def _read_place(reader: _Reader) -> TensorPlace:
    """The next tensor; its start is still that behind the first of them."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    name = reader.string()
    sizes = [reader.number("<Q") for _ in range(reader.expect(reader.number("<I"), 8))]
    number, start = reader.number("<I"), reader.number("<Q")
    if number not in {kind.value for kind in GGML_QUANT_SIZES}:
        raise UnknownFormatError(
            f"holds {name} as type {number}, which is not known here. Upgrade the package gguf, or take another file."
        )
    kind = GGMLQuantizationType(number)
    numbers, nbytes = GGML_QUANT_SIZES[kind]
    if not math.prod(sizes):
        raise ValueError(f"{name} has no numbers")
    if not sizes or sizes[0] % numbers:
        raise ValueError(f"rows of {name} do not fill blocks of {numbers}")
    return TensorPlace(name, kind.name, tuple(reversed(sizes)), start, math.prod(sizes) // numbers * nbytes)
