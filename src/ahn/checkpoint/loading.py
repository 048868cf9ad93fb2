"""From a folder or a name to a model with a memory: everything is checked before anything is changed."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ahn.attachment import Attachment, find_attachment
from ahn.checkpoint import adapter as own
from ahn.checkpoint import published
from ahn.checkpoint.anchors import load_anchors, score_weights_for, usual_anchors
from ahn.checkpoint.content import BaseInfo, Content, check_keys, check_shapes, memory_tensors
from ahn.checkpoint.files import (
    SHIPPED,
    HubOptions,
    HubSource,
    brief,
    download,
    failure,
    is_hub_id,
    locate,
    read_json,
    shipped,
    stored_tensors,
    weight_files,
)
from ahn.config import AHNConfig, RunSettings, check_config, check_whole
from ahn.errors import CheckpointError, ConfigError
from ahn.models import KNOWN, load_model
from ahn.surgery import attach, detach

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel
    from typing_extensions import Unpack

_DETACH = "Call ahn.detach(model) first, or load a checkpoint of the same kind"


def load(
    model: nn.Module,
    path_or_hub_id: str | os.PathLike[str],
    revision: str | None = None,
    **options: Unpack[HubOptions],
) -> None:
    """Loads a memory's weights onto a base model.

    Without a memory attached, one is attached with the saved settings. An attached memory must be of the same kind, in
    the same layers, with the same `memory_positions`. Its window, sinks and sink positions are settings of a run and
    stay. All is checked first: if anything is wrong, the model stays unchanged.

    Args:
        model: The base model.
        path_or_hub_id: A folder that `save` wrote, the name of an adapter that ships with the library, or a hub id
            `owner/name`. Also a folder of the published format, with or without base weights, which are not used. A
            folder that exists wins.
        revision: Branch, tag or commit on the hub.
        **options: `subfolder`, `token`, `cache_dir` and `local_files_only`, see `ahn.checkpoint.files.HubSource`.

    Raises:
        CheckpointError: There is no such checkpoint, it is damaged, or it does not fit the model.
        ModelError: The model cannot be given a memory.
        ConfigError: The saved settings do not fit this model.

    Warns:
        UserWarning: The checkpoint was made for a base model of the same sizes but another name.
    """
    _put(model, read(path_or_hub_id, HubSource(revision, **options)))


def from_pretrained(
    name_or_path: str | os.PathLike[str],
    adapter: str | os.PathLike[str] | None = None,
    config: AHNConfig | None = None,
    dtype: str | torch.dtype | None = None,
    *,
    anchors: int | None = None,
    revision: str | None = None,
    adapter_revision: str | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Loads a model with its memory: a base model by name and an adapter, an adapter alone, or a merged model.

    Args:
        name_or_path: As for `ahn.models.load_model`; or a folder that `save_pretrained` of a model with a memory wrote;
            or a folder or hub id of the published merged format; or an adapter, as for `load`, which names the base
            model that it was made for.
        adapter: A checkpoint of a memory, as for `load`, for a base model.
        config: Settings of the memory. With an adapter or a merged folder its window, sinks and sink positions are
            taken instead of the saved ones; the rest must agree. Alone it attaches an untrained memory.
        dtype: As for `ahn.models.load_model`.
        anchors: Tokens that stay exact beyond the window; 0 for none. Left out, those of the config; or without one
            those that the adapter was saved with, or 128 where there are weights to choose them by.
        revision: Branch, tag or commit of `name_or_path` on the hub.
        adapter_revision: Branch, tag or commit of `adapter`.
        **options: Those of `load`, for the base model too; the subfolder is that of `name_or_path`. All others are for
            `AutoModelForCausalLM.from_pretrained`, as `device_map`, `quantization_config`, `attn_implementation` or
            `trust_remote_code`.

    Returns:
        The model, in evaluation mode. It has the weights of anchor scores that lie beside the adapter, or those that
        ship for the base model.

    Raises:
        ModelError: The base model cannot be found, loaded or given a memory.
        CheckpointError: The adapter or the merged folder is damaged or does not fit, or an adapter alone does not say
            which base model it was made for.
        ConfigError: The settings are no `AHNConfig`, or do not fit this model; or an option is one of them.
    """
    _check_settings(config, anchors, options)
    hub: Any = {name: options.pop(name) for name in HubOptions.__annotations__ if name in options}
    source = HubSource(revision, **hub)
    folder = _our_folder(name_or_path, source)
    if folder is not None and adapter is not None:
        _check_is_base(name_or_path, folder)
        folder = None  # its own memory is not wanted
    if folder is not None and not (folder / own.CONFIG).is_file():
        return _keep_anchors(_from_merged(os.fspath(name_or_path), folder, config, dtype, options), anchors)
    base, content = (name_or_path, source), None  # the memory is read before the base model, which takes long
    memory = adapter, dataclasses.replace(source, revision=adapter_revision, subfolder="")
    if folder is not None:
        memory, content = base, read(*base)
        base = _base_of(content, source, folder)
    elif adapter is not None:
        content = read(adapter, memory[1])
    model = load_model(base[0], dtype, **{**base[1].load_options(), **options})
    if config is not None:
        attach(model, config)
    located = None
    if content is not None and memory[0] is not None:
        _put(model, content if folder is None or not _is_base(folder) else _without_name(content))
        located = locate(memory[0], memory[1])
    _load_score_weights(model, located, base[0])
    if config is None and content is not None and not content.config.anchors:
        anchors = usual_anchors(model) if anchors is None else anchors
    return _keep_anchors(model, anchors)


def _check_settings(config: object, anchors: int | None, options: dict[str, Any]) -> None:
    """Checks the settings of a memory, and that no option for loading the base model is one of them."""
    if anchors is not None:
        check_whole("anchors", anchors, 0)
    if config is not None:
        check_config(config)
    if misplaced := [field.name for field in dataclasses.fields(AHNConfig) if field.name in options]:
        name = misplaced[0]
        raise ConfigError(f"{name} is a setting of the memory: give it in config=ahn.AHNConfig({name}=...)")


def _load_score_weights(model: nn.Module, adapter: Path | None, base: str | os.PathLike[str]) -> None:
    """Loads the weights of anchor scores beside an adapter, or those that ship for a base if all its layers serve."""
    attachment, weights = find_attachment(model), score_weights_for(adapter, base)
    if attachment is not None and weights is not None and (weights == adapter or not attachment.keeps_base_layers):
        load_anchors(model, weights)


def _keep_anchors(model: PreTrainedModel, anchors: int | None) -> PreTrainedModel:
    """The model, whose runs keep so many anchors if they do not say so themselves; `None` leaves it as it is.

    Raises:
        ConfigError: The model cannot be read with so many.
    """
    attachment = find_attachment(model)
    if anchors is not None and attachment is not None:
        config = dataclasses.replace(attachment.config, anchors=anchors)
        attachment.check(RunSettings.like(config))
        attachment.config = config
    return model


def _check_is_base(name: str | os.PathLike[str], folder: Path) -> None:
    """Checks that a folder with a memory holds its base model too, which another memory can be put on."""
    if _is_base(folder):
        return
    kind, remedy = "an adapter", "Name its base model first"
    if not (folder / own.CONFIG).is_file():
        kind, remedy = "merged with a memory already", "Leave the adapter out, or name the base model instead"
    raise failure(name, f"it is {kind}, so it takes no adapter", remedy)


def read(path_or_hub_id: str | os.PathLike[str], source: HubSource | None = None) -> Content:
    """What a checkpoint holds, with its names and sizes checked against each other.

    Args:
        path_or_hub_id: As for `load`.
        source: Where in it to look, and how to reach the hub.

    Raises:
        CheckpointError: There is no such checkpoint, or it is damaged.
    """
    where = os.fspath(path_or_hub_id)
    folder = locate(where, source)
    if (folder / own.CONFIG).is_file():
        content = own.read_adapter(where, folder)
    elif (folder / published.CONFIG).is_file():
        content = published.read_published(where, folder)
    else:
        raise failure(
            where,
            f"it holds neither {own.CONFIG} nor {published.CONFIG}",
            "Give the folder of an adapter (ahn.save) or of a published checkpoint",
        )
    content.check_names()
    return content


def _is_base(folder: Path) -> bool:
    """Whether a folder with an adapter holds its base model too, as `save_pretrained` writes them."""
    return (folder / own.CONFIG).is_file() and (folder / published.CONFIG).is_file()


def _without_name(content: Content) -> Content:
    """The same for weights that lie beside their base model, whatever its name was."""
    return dataclasses.replace(content, base=dataclasses.replace(content.base, name=None))


def _base_of(content: Content, source: HubSource, folder: Path) -> tuple[str, HubSource]:
    """Name of the base model that an adapter was made for, or its own folder, and where on the hub it is."""
    if _is_base(folder):
        return os.fspath(folder), HubSource()
    if not content.base.name:
        raise failure(
            content.where,
            "it does not say which base model it was made for",
            "Name the base model: ahn.from_pretrained(base, adapter=...)",
        )
    return content.base.name, dataclasses.replace(source, revision=content.base.revision, subfolder="")


def _put(model: nn.Module, content: Content, config: AHNConfig | None = None) -> None:
    """Puts a memory's weights onto a model, attaching it with these settings if none is attached."""
    content.check_base(BaseInfo.of_model(model), stacklevel=4)
    tensors = content.tensors()
    attachment = find_attachment(model)
    if attachment is None:
        attach(model, config or content.config)
    else:
        _check_same(content, attachment)
    try:
        ready = _fitting(content, tensors, model)
    except BaseException:
        if attachment is None:
            detach(model)
        raise
    with torch.no_grad():
        for parameter, tensor in ready:
            parameter.copy_(tensor)


def _check_same(content: Content, attachment: Attachment) -> None:
    """Checks that a checkpoint is of the kind of the memory that is attached already."""
    live = attachment.config
    for name in ("memory", "memory_positions"):
        ours, theirs = getattr(live, name), getattr(content.config, name)
        if ours != theirs:
            raise failure(content.where, f"its {name} is {theirs!r}, but that on the model is {ours!r}", _DETACH)
    layers = tuple(layer.index for layer in attachment.layers if layer.memory is not None)
    if layers != content.layers:
        raise failure(
            content.where,
            f"it has a memory in layers {list(content.layers)}, but the model has one in {list(layers)}",
            _DETACH,
        )


def _fitting(
    content: Content, tensors: dict[str, torch.Tensor], model: nn.Module
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The model's parameters, each with its new value in its own dtype."""
    parameters = memory_tensors(model)
    check_keys(content.where, tensors, set(parameters))
    check_shapes(content.where, tensors, {key: tuple(parameter.shape) for key, parameter in parameters.items()})
    ready = [(parameter, tensors[key].to(parameter.dtype)) for key, parameter in parameters.items()]
    if not all(bool(tensor.isfinite().all()) for _, tensor in ready):
        raise failure(content.where, "its values are too large for the model's dtype", "Load the model in bfloat16")
    return ready


def _our_folder(name: str | os.PathLike[str], source: HubSource) -> Path | None:
    """The folder of an adapter, perhaps beside its base, or of a merged model; `None` for a base model alone."""
    name = os.fspath(name)
    folder = Path(name).expanduser()
    if name in KNOWN or not name.strip():
        return None
    if name in shipped() and not os.path.isdir(folder):
        return SHIPPED / name
    remote = not os.path.isdir(folder)
    if remote:
        if not is_hub_id(name) or os.path.exists(folder):
            return None
        try:
            folder = download(name, source, [published.CONFIG, own.CONFIG])
        except CheckpointError:
            return None  # loading the base model says what is wrong
    else:
        folder = folder / source.subfolder
    file = folder / published.CONFIG
    merged = file.is_file() and published.is_published(read_json(file))
    if not merged and not (folder / own.CONFIG).is_file():
        return None
    return locate(name, source) if remote else folder


def _from_merged(
    where: str, folder: Path, config: AHNConfig | None, dtype: str | torch.dtype | None, options: dict[str, Any]
) -> PreTrainedModel:
    content = published.read_published(where, folder)
    content.check_names()
    content.check_sizes()
    if content.kind != "merged":
        raise failure(
            where,
            "it holds a memory without its base model",
            "Name the base model, and this as its adapter: ahn.from_pretrained(base, adapter=...)",
        )
    settings = _run_settings(content, config)
    clean = _base_config(where, published.clean_config(read_json(folder / published.CONFIG)))
    _check_base_weights(where, folder, clean)
    with _quiet():  # transformers would list every tensor of the memory as unexpected
        model = load_model(folder, dtype, config=clean, **options)
    _put(model, _without_name(content), settings)
    return model


def _run_settings(content: Content, config: AHNConfig | None) -> AHNConfig:
    """The saved settings with those of a run that are asked for."""
    saved = content.config
    if config is None:
        return saved
    for name in ("memory", "memory_positions"):
        ours, theirs = getattr(config, name), getattr(saved, name)
        if ours != theirs:
            raise failure(content.where, f"its {name} is {theirs!r}, not {ours!r}", f"Set {name}={theirs!r}")
    if config.layers not in (None, saved.layers, content.layers):
        raise failure(content.where, f"it has a memory in layers {list(content.layers)}", "Leave layers out")
    names = ("window", "sinks", "sink_positions", "anchors", "anchor_score", "anchor_layers", "cache_dtype")
    return dataclasses.replace(saved, **{name: getattr(config, name) for name in names})


def _base_config(where: str, values: dict[str, Any]) -> PreTrainedConfig:
    """A config of transformers from that of a merged folder, also one that an older transformers wrote."""
    from transformers import CONFIG_MAPPING

    try:
        config: PreTrainedConfig = CONFIG_MAPPING[str(values.get("model_type"))].from_dict(values)
        return config
    except Exception as error:  # configs check themselves with errors of several libraries
        raise failure(
            where,
            f"its config.json is not one that transformers can use ({type(error).__name__}: {brief(error)})",
            "Copy or download the folder again",
        ) from None


def _check_base_weights(where: str, folder: Path, config: PreTrainedConfig) -> None:
    """Checks a merged folder's base weights against its config, before any of them is read.

    Raises:
        CheckpointError: Keys are missing or surplus, or a shape differs.
    """
    if config.model_type not in published.LAYERS:
        return  # Other families may name weights in their files otherwise than in the model; load_model checks those.
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        expected = AutoModelForCausalLM.from_config(config).state_dict()
    base_tensors: dict[str, Any] = {
        key: stored
        for key, stored in stored_tensors(weight_files(folder)).items()
        if ".ahn." not in key and not key.endswith("rotary_emb.inv_freq")  # old checkpoints hold it
    }
    if config.tie_word_embeddings:
        base_tensors.setdefault("lm_head.weight", expected["lm_head.weight"])
    check_keys(where, base_tensors, set(expected))
    check_shapes(where, base_tensors, {key: tuple(tensor.shape) for key, tensor in expected.items()})


@contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
