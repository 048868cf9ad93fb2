"""Folders of weights: finding them by name, reading safetensors and JSON without trust, writing all or nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ahn._home import flush, umask
from ahn.errors import CheckpointError
from ahn.models import KNOWN

SHIPPED = Path(__file__).resolve().parents[1] / "adapters"
"""Adapters that come with the library, each a folder such as `smollm2-135m/gated_delta_net`."""
USUAL = ("hybrid", "gated_delta_net")
"""The adapters that are taken where the user names none, the best first."""

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_WANTED = ("*.json", "*.safetensors")
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
"""What a memory may be stored in: the names of safetensors and those of torch."""

_KINDS = {"ahn_config.json": ("a memory", "ahn.load"), "anchors_config.json": ("anchor scores", "ahn.load_anchors")}
"""What a folder with such a file holds, and what loads it."""

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class Stored(NamedTuple):
    """A tensor in a file.

    Attributes:
        file: The safetensors file.
        key: Its name there.
        shape: Its shape.
        dtype: Its dtype as safetensors names it, such as "BF16".
    """

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def elements(self) -> int:
        """Number of its elements."""
        return int(torch.Size(self.shape).numel())

    @property
    def bytes(self) -> int:
        """Bytes that it takes in the file."""
        bits = re.search(r"\d+", self.dtype)  # "BF16", "F8_E4M3", "U8"; "BOOL" has none and takes a byte
        return self.elements * int(bits[0] if bits else 8) // 8


class HubOptions(TypedDict, total=False):
    """What `load` and its kin take of the Hugging Face hub beside the revision; see `HubSource`."""

    subfolder: str
    token: str | bool | None
    cache_dir: str | os.PathLike[str] | None
    local_files_only: bool


@dataclasses.dataclass(frozen=True)
class HubSource:
    """How a checkpoint is found: options of the Hugging Face hub; a local folder uses the subfolder only.

    Attributes:
        revision: Branch, tag or commit.
        subfolder: Folder within the repository or within the local folder; "" for the whole.
        token: Access token, `True` for the one that is logged in, `False` for none; `None` leaves it to the hub.
        cache_dir: Where downloads are kept; the hub's own cache if left out.
        local_files_only: Whether to take what was downloaded before and ask no server.
    """

    revision: str | None = None
    subfolder: str = ""
    token: str | bool | None = None
    cache_dir: str | os.PathLike[str] | None = None
    local_files_only: bool = False

    def options(self) -> dict[str, Any]:
        """Those of its values, without the subfolder, that differ from what the hub takes by itself."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del values["subfolder"]
        return {name: value for name, value in values.items() if value not in (None, False) or name == "revision"}

    def load_options(self) -> dict[str, Any]:
        """The same for a model of transformers, which looks into the subfolder itself."""
        options = self.options() | ({"subfolder": self.subfolder} if self.subfolder else {})
        return {name: value for name, value in options.items() if value is not None}

    def within(self, folder: Path, name: str) -> Path:
        """The subfolder of a folder.

        Args:
            folder: The whole.
            name: The name that the user gave, for messages.

        Raises:
            CheckpointError: The subfolder is not there, or lies outside.
        """
        subfolder = folder / self.subfolder
        if not subfolder.is_dir() or not subfolder.resolve().is_relative_to(folder.resolve()):
            raise failure(name, f"it has no subfolder {self.subfolder!r}", "Check the name of the subfolder")
        return subfolder


def failure(where: str | os.PathLike[str], what: str, remedy: str) -> CheckpointError:
    """An error of one line: where, what is wrong, what to do."""
    name = os.fspath(where).strip() or repr("")
    text = f"{name if len(name) <= 200 else f'{name[:197]}...'}: {what}. {remedy}."
    return CheckpointError(" ".join(text.split()))


def brief(error: BaseException) -> str:
    """What an error says, without its line breaks and cut to a readable length."""
    text = " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
    return (text if len(text) <= 200 else f"{text[:197]}...").rstrip(".")


def shipped(config: str = "ahn_config.json") -> list[str]:
    """Names of what comes with the library: of all folders that hold such a file."""
    return sorted(file.parent.relative_to(SHIPPED).as_posix() for file in SHIPPED.glob(f"*/*/{config}"))


def shipped_for(model: str) -> str | None:
    """The name of the adapter that is taken for a model where the user names none, if one ships."""
    return next((name for usual in USUAL if (name := f"{model}/{usual}") in shipped()), None)


def locate(name: str | os.PathLike[str], source: HubSource | None = None, config: str = "ahn_config.json") -> Path:
    """The folder that an adapter's name stands for; one on the hub is downloaded.

    Args:
        name: A local folder, a name in `shipped(config)`, or a hub id `owner/name`, tried in this order.
        source: Where in it to look, and how to reach the hub.
        config: The file that what is wanted has.

    Raises:
        CheckpointError: There is nothing of this name, it holds weights of another kind, or the hub cannot be reached.
    """
    name, source = os.fspath(name), source or HubSource()
    folder = _find(name, source, config)
    is_other = not any((folder / file).is_file() for file in (config, "config.json"))
    for file, (what, function) in _KINDS.items():
        if is_other and (folder / file).is_file():
            raise failure(name, f"these are weights of {what}", f"Load them with {function}")
    return folder


def _find(name: str, source: HubSource, config: str) -> Path:
    """The folder of a name, whatever it holds; see `locate`."""
    path = Path(name).expanduser()
    if name.strip() and os.path.isdir(path):  # those of pathlib raise at a name that is too long
        return source.within(path, name)
    if os.path.isfile(path):
        raise failure(name, "this is a file", "Give the folder that holds it and its config")
    if any(name in shipped(kind) for kind in _KINDS):
        return SHIPPED / name
    owner = name.partition("/")[0]
    if not is_hub_id(name) or owner in KNOWN or owner in (".", ".."):
        known = ", ".join(shipped(config)) or "none yet"
        raise failure(
            name, "there is no such folder", f"Check the path, or name one that ships with this library ({known})"
        )
    return download(name, source, _WANTED)


def is_hub_id(name: str) -> bool:
    """Whether a name could be one on the Hugging Face hub, `owner/name`."""
    return bool(_HUB_ID.fullmatch(name)) and not name.endswith((".safetensors", ".json", ".gguf", *_PICKLES))


def download(name: str, source: HubSource, patterns: Iterable[str]) -> Path:
    """Files of a repository on the hub, in the hub's own cache.

    Args:
        name: The repository, `owner/name`.
        source: Where in it to look, and how to reach the hub.
        patterns: Which files, by names with wildcards.

    Returns:
        The folder that holds them.

    Raises:
        CheckpointError: They cannot be downloaded and are not in the cache.
    """
    import huggingface_hub

    wanted = [f"{source.subfolder}/{pattern}" if source.subfolder else pattern for pattern in patterns]
    try:
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted, **source.options()))
    except Exception as error:  # the hub's client raises errors of four libraries
        reason = f"{type(error).__name__}: {brief(error).split('. ')[0]}"
        raise failure(
            name,
            f"this is no local folder and cannot be fetched from the hub ({reason})",
            "Check the name, the connection and HF_HUB_OFFLINE (a private or gated repository needs: hf auth login), "
            "or give a folder",
        ) from None
    return source.within(folder, name)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: It cannot be read or holds no object.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise failure(file, f"it cannot be read ({brief(error)})", "Copy or download the folder again") from None
    if not isinstance(values, dict):
        raise failure(file, "it holds no JSON object", "Copy or download the folder again")
    return values


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model's folder: those of its index, its only one, or all that there are.

    Raises:
        CheckpointError: There are none, or one that the index names is missing.
    """
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        names = set(weight_map.values()) if isinstance(weight_map, dict) else set()
        if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
            raise failure(folder / INDEX, "its weight_map names no files", "Copy or download the folder again")
        if missing := sorted(name for name in names if not (folder / name).is_file()):
            raise failure(folder, f"{missing[0]} is missing, which {INDEX} names", "Copy or download the folder again")
        return [folder / name for name in sorted(names)]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if single_files := sorted(folder.glob("*.safetensors")):
        return single_files
    if pickled := sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLES):
        raise failure(
            folder,
            f"{pickled[0]} is a pickle, which can run code when it is read",
            "Convert it to safetensors where you trust it",
        )
    raise failure(folder, "it holds no *.safetensors", "Copy or download the folder again, weights included")


def stored_tensors(files: Iterable[Path]) -> dict[str, Stored]:
    """What safetensors files hold, read from their headers alone.

    Raises:
        CheckpointError: A file is no safetensors file or is cut off, or a key is in two files.
    """
    tensors: dict[str, Stored] = {}
    for file in files:
        with _reader(file) as reader:
            for key in reader.keys():  # noqa: SIM118 (a reader is no mapping)
                if key in tensors:
                    raise failure(
                        file.parent, f"{key} is in {tensors[key].file.name} and in {file.name}", "Remove one of them"
                    )
                part = reader.get_slice(key)
                tensors[key] = Stored(file, key, tuple(part.get_shape()), str(part.get_dtype()))
    return tensors


def read_tensors(stored: Mapping[str, Stored]) -> dict[str, torch.Tensor]:
    """The tensors themselves, on the CPU, under the given names.

    Raises:
        CheckpointError: A file cannot be read, or a tensor is of another dtype than those or not finite.
    """
    for each in stored.values():
        if each.dtype not in DTYPES:
            raise failure(
                each.file, f"{each.key} is stored in {each.dtype}", f"Store it in {', '.join(DTYPES.values())}"
            )
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted({each.file for each in stored.values()}):
        with _reader(file) as reader:
            tensors.update({name: reader.get_tensor(each.key) for name, each in stored.items() if each.file == file})
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise failure(
                stored[name].file,
                f"{stored[name].key} holds values that are not finite numbers",
                "Take a checkpoint from before the training diverged",
            )
    return tensors


@contextlib.contextmanager
def _reader(file: Path) -> Iterator[Any]:
    """An open safetensors file.

    Raises:
        CheckpointError: It cannot be read, is cut off or of another format.
    """
    try:
        with safe_open(file, framework="pt") as reader:
            yield reader
    except (OSError, SafetensorError) as error:
        raise failure(
            file, f"it is cut off or no safetensors file ({brief(error)})", "Copy or download it again"
        ) from None


def write_tensors(tensors: Mapping[str, torch.Tensor], file: Path) -> None:
    """Writes a safetensors file and waits until it is on the disk."""
    save_file({key: tensor.contiguous() for key, tensor in sorted(tensors.items())}, file, {"format": "pt"})
    file.chmod(0o666 & ~umask())  # safetensors 0.8 keeps its files from everybody else
    flush(file)


def write_json(values: Mapping[str, Any], file: Path) -> None:
    """Writes a JSON file and waits until it is on the disk."""
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    flush(file)


@contextlib.contextmanager
def writing(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Turns what can go wrong while writing into one line.

    Raises:
        CheckpointError: The disk is full or the place not writable.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise failure(
            folder, f"it cannot be written ({brief(error)})", "Choose a folder that is writable and has space"
        ) from None


@contextlib.contextmanager
def new_folder(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields an empty folder that becomes `target` at the end, and vanishes if anything fails.

    Raises:
        CheckpointError: The target is there and not empty, or cannot be written.
    """
    target_path = Path(target).expanduser().absolute()
    with writing(target):
        if target_path.exists() and (not target_path.is_dir() or any(target_path.iterdir())):
            raise failure(target, "it exists already", "Choose a new or an empty folder")
        target_path.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{target_path.name}.", dir=target_path.parent))
        try:
            yield part
            part.chmod(0o777 & ~umask())
            if target_path.is_dir():
                target_path.rmdir()
            os.replace(part, target_path)
        finally:
            shutil.rmtree(part, ignore_errors=True)
