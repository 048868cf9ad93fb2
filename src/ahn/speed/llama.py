"""llama.cpp as one of the ways of reading that are timed: the same GGUF file, by the package xllamacpp.

What it takes is what it says itself of its calls. Before each turn it rests, because its threads go on spinning for a
while when they have nothing to do.
"""

from __future__ import annotations

import importlib
import mmap
import os
import random
import shutil
import time
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ahn.errors import ModelError
from ahn.models.gguf_file import GGUFFile
from ahn.speed.baselines import MOST, Baseline

NAME = "llama.cpp"
"""The arm."""
PACKAGE = "xllamacpp"
INSTALL = "pip install 'ahn[bench]'"

_REST = 0.3  # seconds
_BATCH = 512
_KIND_BYTES = 4  # between a key and its value
_HALF = 2  # bytes of a number in its cache


def find_gguf(model: Any) -> Path:
    """The GGUF file that a model was made of.

    Raises:
        ModelError: llama.cpp is not installed, or the model was made of no such file.
    """
    if find_spec(PACKAGE) is None:
        raise ModelError(f"the arm {NAME} needs llama.cpp, which is not installed. Install it: {INSTALL}")
    name = str(getattr(model.config, "_name_or_path", ""))
    if name.endswith(".gguf") and os.path.isfile(name):
        return Path(name)
    from ahn.models import base_name, smollm2

    if base_name(model) == "smollm2-135m":
        return smollm2.gguf_file()
    raise ModelError(f"the arm {NAME} reads GGUF files, and this model is of none: name one with --model")


class LlamaBaseline(Baseline):
    """llama.cpp with a cache of float16 that has read a text of random tokens.

    Args:
        path: The GGUF file.
        context: Tokens read.
        threads: Threads that it works with.

    Raises:
        ModelError: It cannot read the file.
    """

    def __init__(self, path: Path, context: int, threads: int) -> None:
        file = GGUFFile(path)
        kind = file.value("general.architecture")
        heads = file.value(f"{kind}.attention.head_count")
        kv_heads = file.value(f"{kind}.attention.head_count_kv", heads)
        size = file.value(f"{kind}.attention.key_length", file.value(f"{kind}.embedding_length") // heads)
        self.cache_bytes = 2 * _HALF * file.value(f"{kind}.block_count") * kv_heads * size * context
        draw = random.Random(0)
        words = len(file.value("tokenizer.ggml.tokens"))
        self._ids = [draw.randrange(3, words) for _ in range(context + _BATCH)]
        self._context = context
        room = context + _BATCH + 2 * MOST
        self._folder = TemporaryDirectory()
        if room > file.value(f"{kind}.context_length", room):
            path = _with_context(path, f"{kind}.context_length", room, Path(self._folder.name))
        self._server = _serve(path, room, threads)

    def decode_tokens(self, tokens: int) -> float:
        """See `Baseline.decode_tokens`."""
        return float(self._run(self._ids[: self._context], tokens + 1)["predicted_per_token_ms"]) / 1e3

    def read(self, tokens: int) -> float:
        """See `Baseline.read`."""
        self._run(self._ids[: self._context], 1)  # its cache may go on with tokens that were written
        said = self._run(self._ids[: self._context + tokens], 1)
        return float(said["prompt_ms"]) / 1e3 * tokens / float(said["prompt_n"])

    def _run(self, ids: list[int], tokens: int) -> dict[str, Any]:
        """What a call says that it took: it reads what it has not read before, and writes so many tokens."""
        time.sleep(_REST)
        said = self._server.handle_completions(
            {
                "prompt": ids,
                "max_tokens": tokens,
                "temperature": 0.0,
                "ignore_eos": True,
                "cache_prompt": True,
                "id_slot": 0,
            }
        )
        if "timings" not in said:
            raise ModelError(f"llama.cpp cannot be timed: {' '.join(str(said).split())[:200]}")
        timings: dict[str, Any] = said["timings"]
        return timings


def _with_context(path: Path, key: str, room: int, folder: Path) -> Path:
    """A copy of a file whose trained context is said to be larger: llama.cpp reads no text beyond it."""
    copied = folder / path.name
    shutil.copyfile(path, copied)
    with copied.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        at = mapped.find(key.encode()) + len(key.encode()) + _KIND_BYTES
        mapped[at : at + 4] = room.to_bytes(4, "little")
    if GGUFFile(copied).value(key) != room:
        raise ModelError(f"llama.cpp cannot read {room} tokens with '{path}', which says its context in another way")
    return copied


def _serve(path: Path, room: int, threads: int) -> Any:
    xllamacpp: Any = importlib.import_module(PACKAGE)
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.n_ctx = room
    parameters.n_parallel, parameters.n_batch, parameters.n_ubatch = 1, _BATCH, _BATCH
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    parameters.warmup, parameters.fit_params, parameters.verbosity = False, False, -1
    try:
        return xllamacpp.Server(parameters)
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"llama.cpp cannot read '{path}': {' '.join(str(error).split())[:200]}") from None
