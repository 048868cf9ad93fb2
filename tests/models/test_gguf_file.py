"""The reader of GGUF files against that of the package gguf, and its one line for files that are damaged."""

from pathlib import Path

import gguf
import numpy as np
import pytest

from ahn.models.gguf_file import GGUFFile
from tests.models.test_gguf import write

VALUES = {
    "a.u8": ("uint8", 200),
    "a.i8": ("int8", -3),
    "a.u16": ("uint16", 60000),
    "a.i16": ("int16", -300),
    "a.u32": ("uint32", 2**32 - 1),
    "a.i32": ("int32", -(2**31)),
    "a.u64": ("uint64", 2**64 - 1),
    "a.i64": ("int64", -(2**63)),
    "a.f32": ("float32", 0.5),
    "a.f64": ("float64", 0.1),
    "a.bool": ("bool", True),
    "a.text": ("string", "Ünïcode 你好"),
    "a.numbers": ("array", [1, -2, 3]),
    "a.words": ("array", ["", "é", "two words"]),
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    write(path, kind="Q4_1")
    return path


def test_values_of_every_type(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "llama")
    for key, (kind, value) in VALUES.items():
        getattr(writer, f"add_{kind}")(key, value)
    writer.add_tensor("t", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(tmp_path / "v.gguf")
    assert {key: file.value(key) for key in VALUES} == {key: value for key, (_, value) in VALUES.items()}
    assert file.value("a.missing", 7) == 7
    assert np.array_equal(file.read(file.tensors["t"]), [[0, 1, 2], [3, 4, 5]])


def test_says_what_the_other_reader_says(small: Path) -> None:
    file, other = GGUFFile(small), gguf.GGUFReader(small)
    for key, field in other.fields.items():
        if not key.startswith("GGUF."):
            assert file.value(key) == field.contents()
    assert list(file.tensors) == [tensor.name for tensor in other.tensors]
    for tensor in other.tensors:
        place = file.tensors[tensor.name]
        assert place.kind == tensor.tensor_type.name
        assert list(place.shape) == tensor.shape[::-1].tolist()
        assert np.array_equal(file.read(place), tensor.data)


@pytest.mark.parametrize(
    ("place", "wrong", "says"),
    [
        (0, b"GGML", "does not begin with GGUF"),
        (4, (9).to_bytes(4, "little"), "has version 9"),
        (4, (1).to_bytes(4, "little"), "has version 1; read are 2 and 3"),
        (4, (3).to_bytes(4, "big"), "is big-endian"),
        (8, (2**60).to_bytes(8, "little"), "ends before"),
        (24, (2**60).to_bytes(8, "little"), "ends at byte"),
    ],
    ids=["magic", "version", "version 1", "big-endian", "count", "length"],
)
def test_damaged(small: Path, tmp_path: Path, place: int, wrong: bytes, says: str) -> None:
    data = bytearray(small.read_bytes())
    data[place : place + len(wrong)] = wrong
    (tmp_path / "bad.gguf").write_bytes(data)
    with pytest.raises(ValueError, match=says):
        GGUFFile(tmp_path / "bad.gguf")


def test_cut_off_anywhere(small: Path, tmp_path: Path) -> None:
    """At places all over the beginning, and at both ends of every tensor."""
    data, file = small.read_bytes(), GGUFFile(small)
    ends = {place.start + offset for place in file.tensors.values() for offset in (-1, 0, 1, place.nbytes - 1)}
    first = min(place.start for place in file.tensors.values())
    for end in sorted({*range(0, first, 7), *ends}):
        (tmp_path / "cut.gguf").write_bytes(data[:end])
        with pytest.raises(ValueError, match=r"ends|has \d+ bytes"):
            GGUFFile(tmp_path / "cut.gguf")


def test_a_file_that_became_shorter(small: Path, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(small.read_bytes())
    file = GGUFFile(tmp_path / "m.gguf")
    last = max(file.tensors.values(), key=lambda place: place.start)
    tokens = small.read_bytes().index(b"unused7")
    with (tmp_path / "m.gguf").open("r+b") as opened:
        opened.truncate(last.start + 1)
    with pytest.raises(ValueError, match="ends within"):
        file.read(last)
    with (tmp_path / "m.gguf").open("r+b") as opened:
        opened.truncate(tokens)
    with pytest.raises(ValueError, match="ends at byte"):
        file.value("tokenizer.ggml.tokens")


def test_rows_of_a_tensor(small: Path) -> None:
    file = GGUFFile(small)
    for place in file.tensors.values():
        whole = file.read(place)
        assert np.array_equal(file.read(place, slice(8, 24)), whole[8:24])


def test_array_of_unknown_type_and_of_too_many(small: Path, tmp_path: Path) -> None:
    data = small.read_bytes()
    at = data.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 4
    for offset, wrong, says in ((0, (77).to_bytes(4, "little"), "77"), (4, (2**40).to_bytes(8, "little"), "ends")):
        bad = bytearray(data)
        bad[at + offset : at + offset + len(wrong)] = wrong
        (tmp_path / "bad.gguf").write_bytes(bad)
        with pytest.raises(ValueError, match=says):
            GGUFFile(tmp_path / "bad.gguf")
