"""What a checkpoint holds, whatever its format, and the checks that every format shares."""

from __future__ import annotations

import dataclasses
import re
import reprlib
import warnings
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any, Literal

import torch
from torch import nn

from ahn.attachment import attachment_of
from ahn.backbone import compat
from ahn.backbone.survey import find_backbone
from ahn.checkpoint.files import Stored, brief, failure, read_tensors
from ahn.config import AHNConfig
from ahn.errors import ConfigError
from ahn.memories import MemoryShape, build_memory, memory_kinds, split_names
from ahn.models import base_name

Kind = Literal["adapter", "published", "merged"]
_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
_MOST_LAYERS = 10_000
"""What no model passes: a damaged file shall not make this library reserve memory for it."""
_MOST = {"num_hidden_layers": _MOST_LAYERS}
_MOST_OF_OTHERS = 1 << 20
_KEY = re.compile(r"layers\.(\d{1,5})\.(.+)", re.ASCII)
_UNNAMED = MemoryShape(1, 1, 1, 1, 1)
_AGAIN = "Copy or download the folder again, weights and config together"


@dataclasses.dataclass(frozen=True)
class BaseInfo:
    """The base model that a memory was made for. What is `None` is not known and not checked.

    Attributes:
        name: Name under which it was loaded.
        revision: Its commit on the hub.
        model_type: Its family, as transformers names it.
        hidden_size: Width of the hidden state.
        num_hidden_layers: Number of layers.
        num_attention_heads: Query heads per layer.
        num_key_value_heads: Key/value heads per layer.
        head_dim: Size of one head.
    """

    name: str | None = None
    revision: str | None = None
    model_type: str | None = None
    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None

    @classmethod
    def of_config(cls, config: Any, name: str | None = None) -> BaseInfo:
        """The base model with this config of transformers."""
        sizes = {size: _whole(getattr(config, size, None)) for size in _SIZES}
        heads = sizes["num_attention_heads"]
        sizes["num_key_value_heads"] = sizes["num_key_value_heads"] or heads
        if sizes["head_dim"] is None and sizes["hidden_size"] and heads:
            sizes["head_dim"] = sizes["hidden_size"] // heads
        return _base(name or None, getattr(config, "_commit_hash", None), config.model_type, sizes)

    @classmethod
    def of_model(cls, model: nn.Module) -> BaseInfo:
        """The base model that this model is."""
        inner = compat.unwrap(model)
        base = cls.of_config(find_backbone(inner).config, base_name(inner))
        return dataclasses.replace(base, revision=getattr(inner.config, "_commit_hash", None))

    @classmethod
    def of_dict(cls, values: Mapping[str, Any], where: str) -> BaseInfo:
        """The base model that a file describes.

        Args:
            values: What the file says.
            where: Its name, for messages.

        Raises:
            CheckpointError: A size is no number of a model.
        """
        for size in _SIZES:
            value = values.get(size)
            if value is not None and not (_whole(value) and value <= _MOST.get(size, _MOST_OF_OTHERS)):
                raise failure(where, f"its {size} is {reprlib.repr(value)}", _AGAIN)
        name, revision, family = (_text(values.get(key)) for key in ("name", "revision", "model_type"))
        return _base(name, revision, family, {size: _whole(values.get(size)) for size in _SIZES})

    def unlike(self, other: BaseInfo) -> list[str]:
        """Names of what is known of both and differs, the name itself and the revision left out."""
        pairs = {key: (getattr(self, key), getattr(other, key)) for key in ("model_type", *_SIZES)}
        return [key for key, (ours, theirs) in pairs.items() if ours != theirs and None not in (ours, theirs)]

    def text(self, facts: Iterable[str]) -> str:
        """Its name and some facts about it."""
        named = f"'{self.name}'" if self.name else "a model"
        return f"{named} with {', '.join(f'{fact} {getattr(self, fact)}' for fact in facts)}"

    def memory_shape(self) -> MemoryShape | None:
        """Sizes of a memory for one of its layers, or `None` if not all are known."""
        sizes = (self.hidden_size, self.num_attention_heads, self.num_key_value_heads, self.head_dim, self.head_dim)
        return MemoryShape(*(size for size in sizes if size)) if all(sizes) else None


@dataclasses.dataclass(frozen=True)
class Content:
    """What a checkpoint holds; its tensors stay in their files until `tensors` is called.

    Attributes:
        where: The name that the user gave.
        kind: Its format.
        config: Settings of the memory.
        base: The base model that it was made for.
        stored: Its tensors by our names, `layers.N.<parameter>`.
        format_version: Version of an adapter's format; 0 for the published ones.
        library_version: Version of the library that wrote an adapter.
    """

    where: str
    kind: Kind
    config: AHNConfig
    base: BaseInfo
    stored: Mapping[str, Stored]
    format_version: int = 0
    library_version: str | None = None

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the layers that have weights."""
        return tuple(sorted({layer for key in self.stored if (layer := layer_of(key)) is not None}))

    @property
    def kinds(self) -> dict[int, str]:
        """The name of each layer's memory, by layer index.

        Raises:
            CheckpointError: It has fewer layers than memories.
        """
        layers = self.layers if self.config.layers is None else self.config.layers
        if self.config.layers is None and self.kind != "adapter":
            layers = tuple(range(self.base.num_hidden_layers or 0))
        layers = layers or (0,)
        try:
            return dict(zip(layers, memory_kinds(self.config.memory, len(layers))))
        except ConfigError as error:
            raise failure(self.where, brief(error), _AGAIN) from None

    def check_names(self) -> None:
        """Checks that every layer has every parameter of its memory and nothing else.

        Raises:
            CheckpointError: Keys are missing or surplus.
        """
        check_keys(self.where, self.stored, set(parameter_shapes(self.kinds, _UNNAMED)))

    def check_base(self, base: BaseInfo, stacklevel: int = 3) -> None:
        """Checks that the memory was made for this base model; another name alone is a warning.

        Args:
            base: The base model.
            stacklevel: Whose line the warning names: 3 is the caller of the function that calls this one.

        Raises:
            CheckpointError: The family or a size differs.
        """
        check_base(self.where, self.base, base, "its memory was", stacklevel + 1)

    def check_sizes(self) -> None:
        """Checks the shapes of all tensors against what the base model's sizes ask for, where they are known.

        Raises:
            CheckpointError: A shape differs.
        """
        if (shape := self.base.memory_shape()) is None:
            return
        check_shapes(self.where, self.stored, parameter_shapes(self.kinds, shape))

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by our names, on the CPU.

        Raises:
            CheckpointError: They cannot be read or are not finite.
        """
        return read_tensors(self.stored)


def check_base(where: str, made_for: BaseInfo, base: BaseInfo, what: str, stacklevel: int) -> None:
    """Checks that something was made for this base model; another name alone is a warning.

    Args:
        where: The name that the user gave, for messages.
        made_for: The base model that it was made for.
        base: The base model that it is to serve.
        what: What was made, as the beginning of a sentence: "its memory was".
        stacklevel: Whose line the warning names: 2 is the caller of this function.

    Raises:
        CheckpointError: The family or a size differs.
    """
    if facts := made_for.unlike(base):
        raise failure(
            where, f"{what} made for {made_for.text(facts)}, but this is {base.text(facts)}", "Use its own base model"
        )
    if made_for.name and base.name and _bare(made_for.name) != _bare(base.name):
        warnings.warn(
            f"{where}: {what} trained for {made_for.name}, but the model is {base.name}; the shapes fit, yet it is of "
            "use only if both have the same weights",
            stacklevel=stacklevel,
        )


def memory_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Weights of all memories on a model by our names, not copied.

    Raises:
        ModelError: No memory is attached.
    """
    layers = [layer for layer in attachment_of(model).layers if layer.memory is not None]
    return {
        f"layers.{layer.index}.{name}": tensor
        for layer in layers
        if layer.memory is not None
        for name, tensor in layer.memory.state_dict(keep_vars=True).items()
    }


def parameter_shapes(kinds: Mapping[int, str], shape: MemoryShape) -> dict[str, tuple[int, ...]]:
    """Our names and the shapes of the parameters of memories.

    Args:
        kinds: The name of each layer's memory, by layer index.
        shape: The sizes of every layer.
    """
    with torch.device("meta"):
        built = {kind: build_memory(kind, shape).state_dict() for kind in set(kinds.values())}
    return {
        f"layers.{layer}.{name}": tuple(tensor.shape)
        for layer, kind in kinds.items()
        for name, tensor in built[kind].items()
    }


def memory_config(where: str, values: Any) -> AHNConfig:
    """Settings of a memory from a file.

    Raises:
        CheckpointError: They are no settings, or of a memory that this library does not have.
    """
    if not isinstance(values, dict):
        raise failure(where, "it has no settings of a memory", _AGAIN)
    try:
        config = AHNConfig.from_dict(values)
    except (ConfigError, TypeError, ValueError) as error:
        raise failure(where, f"its settings cannot be used ({brief(error)})", _AGAIN) from None
    if config.layers is not None and config.layers[-1] >= _MOST_LAYERS:
        raise failure(where, f"it names layer {reprlib.repr(config.layers[-1])}, which no model has", _AGAIN)
    try:
        split_names(config.memory)
    except ConfigError as error:
        raise failure(where, f"it holds an {brief(error)}", "Upgrade this library if it is newer") from None
    return config


def layer_of(key: str) -> int | None:
    """The layer that a key of ours names."""
    match = _KEY.fullmatch(key)
    return int(match[1]) if match else None


def check_keys(where: str, tensors: Mapping[str, Any], expected: set[str]) -> None:
    """Checks that all keys are there and no other.

    Raises:
        CheckpointError: Keys are missing or surplus; the first of them is named.
    """
    if missing := sorted(expected - set(tensors)):
        raise failure(where, f"{_count(missing)} missing: {missing[0]}{_more(missing)}", _AGAIN)
    if surplus := sorted(set(tensors) - expected):
        raise failure(where, f"{_count(surplus)} too many: {surplus[0]}{_more(surplus)}", _AGAIN)


def check_shapes(where: str, tensors: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Checks the shapes of tensors.

    Raises:
        CheckpointError: One differs.
    """
    for key, shape in expected.items():
        if (actual := tuple(tensors[key].shape)) != shape:
            raise failure(
                where, f"{key} has the shape {list(actual)} instead of {list(shape)}", "Use its own base model"
            )


def require_published_positions(content: Content) -> None:
    """Checks that the published format can express what a memory was trained with.

    Raises:
        CheckpointError: It cannot.
    """
    if content.config.memory_positions != "rope":
        raise failure(
            content.where,
            f'the published format has no memory_positions="{content.config.memory_positions}"',
            "Keep it as an adapter and load it with ahn.load",
        )


def _base(name: str | None, revision: str | None, family: str | None, sizes: Mapping[str, int | None]) -> BaseInfo:
    return BaseInfo(name, revision, family, *(sizes[size] for size in _SIZES))


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _count(names: list[str]) -> str:
    return "1 tensor is" if len(names) == 1 else f"{len(names)} tensors are"


def _more(names: list[str]) -> str:
    return "" if len(names) == 1 else f" and {len(names) - 1} more"


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _bare(name: str) -> str:
    """A model's name without its owner or folder, so that a hub id and a local copy of it agree."""
    parts = PurePath(name).parts
    cached = next((part for part in reversed(parts) if part.startswith("models--")), None)
    return (cached.split("--")[-1] if cached else parts[-1] if parts else name).lower()
