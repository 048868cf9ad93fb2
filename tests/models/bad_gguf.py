"""GGUF files that cannot be read, each in its own way."""

from pathlib import Path
from typing import Any

from tests.models.test_gguf import write

_TENSOR = b"output_norm.weight"  # behind it: how many sizes (4 bytes), the size (8), the type (4), the place (8)
_BYTES: dict[str, tuple[int, bytes]] = {
    "magic": (0, b"GGML"),
    "version1": (4, (1).to_bytes(4, "little")),
    "big_endian": (4, (3).to_bytes(4, "big")),
}
_TENSOR_BYTES = {
    "zero_size": (4, bytes(8)),
    "unknown_type": (12, (99).to_bytes(4, "little")),
    "beyond": (16, (2**40).to_bytes(8, "little")),
}
_LENGTHS = {"empty": 0.0, "cut_early": 0.01, "cut_late": 0.9}
_OTHERS: dict[str, dict[str, Any]] = {
    "architecture": {"named": "runes"},
    "incomplete": {"keys": {"embedding_length": None}},
    "yarn": {"keys": {"rope.scaling.type": "yarn"}},
    "part": {"parts": 3},
    "no_tokenizer": {"tokenizer": False},
    "splitting": {"pre": "runes"},
}
BAD_FILES = (*_LENGTHS, *_BYTES, *_TENSOR_BYTES, *_OTHERS)
"""Names of the files, without their ending."""


def write_bad_files(folder: Path) -> None:
    """Writes them, and `good.gguf`."""
    write(folder / "good.gguf")
    data = (folder / "good.gguf").read_bytes()
    tensor = data.index(_TENSOR) + len(_TENSOR)
    places = _BYTES | {name: (tensor + offset, wrong) for name, (offset, wrong) in _TENSOR_BYTES.items()}
    for name, (at, wrong) in places.items():
        (folder / f"{name}.gguf").write_bytes(data[:at] + wrong + data[at + len(wrong) :])
    for name, share in _LENGTHS.items():
        (folder / f"{name}.gguf").write_bytes(data[: int(share * len(data))])
    for name, changes in _OTHERS.items():
        write(folder / f"{name}.gguf", **changes)
