"""Attaching a memory to a model and taking it off again, with no line of modelling code changed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NoReturn

import torch
from torch import nn
from transformers.generation.configuration_utils import GenerationMode
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from ahn.attachment import (
    COMPUTED,
    MODULE,
    SCORE_WEIGHTS,
    Attachment,
    AttentionLayer,
    attachment_of,
    find_attachment,
    mode,
    save_with_memory,
    set_attachment,
)
from ahn.attention import decoder_layers
from ahn.attention.function import IMPLEMENTATION, attention_function
from ahn.attention.hooks import after_call, after_model, before_call, before_layer, before_model
from ahn.attention.host import check_tokens
from ahn.attention.masks import mask_function
from ahn.attention.recording import record_layers
from ahn.backbone import compat, linear
from ahn.backbone.rotary import Rotation, find_rotary
from ahn.backbone.survey import (
    CapturedLayer,
    check_numbers,
    check_rotations,
    find_backbone,
    is_unloaded,
    position_limit,
    probe,
    sample,
    trained_context,
)
from ahn.cache.cache import HippocampalCache, refuse_assisted_decoding
from ahn.config import AHNConfig, check_config, check_whole
from ahn.errors import AHNError, CacheError, ConfigError, ModelError
from ahn.memories import MemoryShape, build_memory, memory_kinds
from ahn.quantization import is_quantized, refuse_saving

AttentionInterface.register(IMPLEMENTATION, attention_function)
AttentionMaskInterface.register(IMPLEMENTATION, mask_function)


def attach(model: nn.Module, config: AHNConfig | None = None) -> None:
    """Gives a model a memory: from now on `model(...)` and `model.generate(...)` read with it.

    The memory starts with an output of zero and changes nothing but the cost until it is trained or loaded. The base
    weights are not touched. A short text is read twice to make sure that every layer takes part.

    Args:
        model: Any decoder of transformers that routes its attention through transformers' attention interface.
        config: What to attach; `AHNConfig()` if left out.

    Raises:
        ModelError: The model has a memory already, or cannot be given one; the message says why.
        ConfigError: The settings are no `AHNConfig`, or do not fit this model.
    """
    config, model = AHNConfig() if config is None else check_config(config), compat.unwrap(model)
    if find_attachment(model) is not None:
        raise ModelError("this model has a memory already; call ahn.detach(model) first")
    backbone = find_backbone(model)
    if any(is_unloaded(module) for module in backbone.modules()):
        name = type(model).__name__
        raise ModelError(f"the weights of this {name} are not loaded (meta device); load them before attaching")
    if (stored := next(filter(None, map(_storage_dtype, backbone.modules())), None)) is not None:
        raise ModelError(
            f"the weights of this {type(model).__name__} are in {stored}, in which torch only stores: load the model "
            "with dtype=torch.bfloat16, or an FP8 checkpoint with the quantization_config that it came with"
        )
    attachment = survey(model, config)
    expected = _read_sample(backbone, attachment)
    check_numbers(expected)
    whole = _write_sample(model, attachment) if attachment.is_wrapped else None
    _install(model, backbone, attachment)
    try:
        _verify(backbone, attachment, expected)
        if whole is not None:
            _verify_wrapper(model, attachment, whole)
    except BaseException:
        detach(model)
        raise


def survey(model: nn.Module, config: AHNConfig, *, rotations: bool = True) -> Attachment:
    """What attaching would set up: the model's attention layers, with new memories. The model stays as it is.

    Args:
        model: As for `attach`; also one without weights, on torch's meta device.
        config: What would be attached.
        rotations: Whether to find out how rotary positions are undone, which nothing needs but bounded sinks and a
            memory without positions.

    Raises:
        ModelError: The model cannot be given a memory; the message says why.
        ConfigError: The settings do not fit this model.
    """
    model = compat.unwrap(model)
    backbone = find_backbone(model)
    layers = _attention_layers(backbone, probe(model, backbone), config)
    attachment = Attachment(
        config, layers, str(backbone.config._attn_implementation or "eager"), trained_context(backbone)
    )
    if rotations:
        attachment.rotation_problem = _find_rotations(backbone, layers)
    attachment.position_limit = position_limit(backbone)
    attachment.is_wrapped = model is not backbone and getattr(model, str(model.base_model_prefix), None) is not backbone
    attachment.check(attachment.settings)
    return attachment


def detach(model: nn.Module) -> None:
    """Takes the memory off a model, which is then bit for bit what it was before.

    Args:
        model: A model with a memory attached. The memory's weights are gone unless they were saved.

    Raises:
        ModelError: No memory is attached.
    """
    attachment, model = attachment_of(model), compat.unwrap(model)
    for handle in attachment.handles:
        handle.remove()
    linear.restore(model)
    decoder_layers.restore(model)
    for layer in attachment.layers:
        if layer.memory is not None:
            delattr(layer.module, MODULE)
        set_score_weights(layer, {})
        set_attachment(layer.module, None)
    for config, before in attachment.implementations:
        compat.set_implementation(config, before)
    for name in ("_prepare_cache_for_generation", "init_continuous_batching", "save_pretrained"):
        model.__dict__.pop(name, None)
    if is_quantized(model):
        model.__dict__["save_pretrained"] = refuse_saving
    for module in (model, find_backbone(model)):
        set_attachment(module, None)


def set_score_weights(layer: AttentionLayer, weights: Mapping[str, nn.Module]) -> None:
    """Gives a layer weights of anchor scores, in place of all that it has.

    Args:
        layer: A layer with a memory.
        weights: The weights by score, on any device; none takes away what it has.
    """
    if layer.anchor_weights is not None:
        delattr(layer.module, SCORE_WEIGHTS)
        layer.anchor_weights = None
    if weights:
        layer.anchor_weights = nn.ModuleDict(weights).to(layer.device).eval().requires_grad_(False)
        layer.module.add_module(SCORE_WEIGHTS, layer.anchor_weights)


@contextlib.contextmanager
def attached(model: nn.Module, config: AHNConfig | None = None) -> Iterator[nn.Module]:
    """`attach` inside a `with` block, `detach` at its end.

    Args:
        model: As for `attach`.
        config: As for `attach`.

    Yields:
        The model.
    """
    attach(model, config)
    try:
        yield model
    finally:
        detach(model)


def _attention_layers(backbone: Any, layers: list[CapturedLayer], config: AHNConfig) -> tuple[AttentionLayer, ...]:
    """The model's attention layers, with a new memory where one is wanted."""
    attention_layers = tuple(
        AttentionLayer(
            layer.module, index, _shape(backbone, layer), layer.key.dtype, layer.key.device, layer.sliding_window
        )
        for index, layer in enumerate(layers)
    )
    chosen = _chosen(attention_layers, config)
    for index, kind in zip(chosen, memory_kinds(config.memory, len(chosen))):
        attention_layer = attention_layers[index]
        attention_layer.built = build_memory(kind, attention_layer.shape).to(
            attention_layer.device, attention_layer.dtype
        )
        attention_layer.built.train(backbone.training)
    return attention_layers


def _storage_dtype(module: nn.Module) -> str | None:
    """The dtype of a plain layer of torch whose weights torch cannot compute with, such as float8; else `None`."""
    if type(module) not in (nn.Linear, nn.Embedding):
        return None
    dtype: Any = module.weight.dtype
    return None if not dtype.is_floating_point or dtype in COMPUTED else str(dtype).removeprefix("torch.")


def _shape(backbone: Any, layer: CapturedLayer) -> MemoryShape:
    return MemoryShape(
        backbone.config.hidden_size, layer.query.size(1), layer.key.size(1), layer.key.size(3), layer.value_size
    )


def _chosen(layers: tuple[AttentionLayer, ...], config: AHNConfig) -> list[int]:
    """Indices of the layers that get a memory: those asked for; or all with full attention; or all."""
    if config.layers is not None:
        if max(config.layers) >= len(layers):
            raise ConfigError(
                f"layers names layer {max(config.layers)}, but the model's last layer is {len(layers) - 1}"
            )
        return list(config.layers)
    full = [layer.index for layer in layers if layer.sliding_window is None]
    return full or [layer.index for layer in layers]


def _find_rotations(backbone: Any, layers: tuple[AttentionLayer, ...]) -> str | None:
    """Finds out how to undo the rotary positions of each layer with a memory; what stands in the way, if anything."""
    rotary, kinds = find_rotary(backbone), getattr(backbone.config, "layer_types", None)
    served = [layer for layer in layers if layer.memory is not None]
    if rotary is None:
        return None
    try:
        rotations = {
            layer.module: Rotation(
                layer.module, rotary, kinds[layer.index] if kinds else None, trained_context(backbone)
            )
            for layer in served
        }
        rotates = check_rotations(backbone, rotations)
    except (LookupError, ModelError) as error:
        return str(error)
    for layer in served:
        layer.rotation = rotations[layer.module] if rotates[layer.module] else None
    return None


def _install(model: Any, backbone: Any, attachment: Attachment) -> None:
    """Hooks, memories and names: everything that `detach` takes back."""
    for module in {
        id(each): each for each in (model, backbone, *(layer.module for layer in attachment.layers))
    }.values():
        set_attachment(module, attachment)
    linear.speed_up(model)
    decoder_layers.speed_up(backbone, attachment)
    handles = attachment.handles
    if model is not backbone:
        handles.append(model.register_forward_pre_hook(before_model, with_kwargs=True))
        handles.append(model.register_forward_hook(after_model, with_kwargs=True, always_call=True))
    handles.append(backbone.register_forward_pre_hook(before_call, with_kwargs=True))
    handles.append(backbone.register_forward_hook(after_call, always_call=True))
    for layer in attachment.layers:
        if layer.memory is not None:
            layer.module.add_module(MODULE, layer.memory)
            handles.append(layer.module.register_forward_pre_hook(before_layer, with_kwargs=True))
    for config in compat.attention_configs(backbone):
        attachment.implementations.append((config, config._attn_implementation))
        compat.set_implementation(config, IMPLEMENTATION)
    # 5.23: `_prepare_cache_for_generation` makes the cache, `init_continuous_batching` begins every kind of that.
    model.__dict__["_prepare_cache_for_generation"] = partial(_prepare_cache, model)
    model.__dict__["init_continuous_batching"] = _refuse_continuous_batching
    model.__dict__["save_pretrained"] = partial(save_with_memory, model)


def _read_sample(backbone: Any, attachment: Attachment, use_cache: bool = False) -> torch.Tensor:
    """Last hidden state on a text that fits into sinks and window, `[1, T, D]` float32."""
    tokens = min(4, attachment.exact_tokens)
    training = backbone.training
    backbone.eval()
    try:
        with torch.no_grad():
            output = backbone(input_ids=sample(backbone, tokens), use_cache=use_cache)
    finally:
        backbone.train(training)
    hidden: torch.Tensor = output.last_hidden_state
    return hidden.float()


def _verify(backbone: Any, attachment: Attachment, expected: torch.Tensor) -> None:
    """Reads a short text with the memory: every layer must take part, and nothing may change up to sinks + window."""
    name = type(backbone).__name__
    served: set[int] = set()
    try:
        # There are no anchors within the window, and their score may have no weights.
        with mode(backbone, "ahn", anchors=0), record_layers(backbone, lambda layer: served.add(layer.layer.index)):
            actual = _read_sample(backbone, attachment, use_cache=True)  # a model may want more of it than keys
    except AHNError:
        raise
    except Exception as error:
        raise ModelError(f"no memory can be attached to {name}: reading with it failed ({error})") from error
    if missing := {layer.index for layer in attachment.layers if layer.memory is not None} - served:
        raise ModelError(f"no memory can be attached to {name}: layers {sorted(missing)} do not pass its inputs on")
    scale = expected.abs().mean().clamp(min=1e-6)
    if bool((actual - expected).abs().mean() > attachment.tolerance * scale):
        raise ModelError(
            f"no memory can be attached to {name}: its attention does more than a causal softmax over keys "
            f"(outputs differ by {float((actual - expected).abs().mean() / scale):.1%} on a text inside the window)"
        )


def _write_sample(model: Any, attachment: Attachment) -> torch.Tensor:
    """Logits of a whole model on a short text, `[1, T, V]` float32; it must also write a token."""
    backbone = find_backbone(model)
    ids = sample(backbone, min(3, attachment.exact_tokens))
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits: torch.Tensor = model(input_ids=ids).logits
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)
    finally:
        model.train(training)
    return logits.float()


def _verify_wrapper(model: Any, attachment: Attachment, expected: torch.Tensor) -> None:
    """Reads and writes a short text by way of the model that the user holds, which must read as without a memory."""
    name = type(model).__name__
    try:
        with mode(model, "ahn", anchors=0):
            actual = _write_sample(model, attachment)
    except Exception as error:
        raise ModelError(
            f"no memory can be attached to {name}: its decoder reads with one, but {name} itself fails ({error}); "
            "attach it to the text model alone"
        ) from error
    difference = float((actual - expected).abs().mean() / expected.abs().mean().clamp(min=1e-6))
    if difference > attachment.tolerance:
        raise ModelError(
            f"no memory can be attached to {name}: it reads otherwise with one (outputs differ by {difference:.1%} on "
            "a text inside the window); attach it to the text model alone"
        )


def _refuse_continuous_batching(*args: Any, **kwargs: Any) -> NoReturn:
    """Says why `generate_batch` and its kind do not work."""
    raise CacheError(
        "continuous batching (generate_batch) keeps keys and values in pages of its own, which have no place for a "
        "memory: call model.generate on a padded batch, or ahn.detach(model) first"
    )


def _prepare_cache(model: Any, generation_config: Any, model_kwargs: dict[str, Any], mode: Any, *rest: Any) -> None:
    """Puts a new cache of ours where the base model would put its own, and refuses what a memory cannot do."""
    cache = model_kwargs.get(compat.CACHE)
    if generation_config.prefill_chunk_size is not None:
        check_whole("prefill_chunk_size", generation_config.prefill_chunk_size, 1)
    if isinstance(cache, HippocampalCache):
        cache.settle()  # its last call may have been broken off
        length = compat.generated_from(generation_config, model_kwargs)
        if length is not None and cache.seen_tokens:  # transformers would read some tokens twice
            check_tokens(length - cache.seen_tokens, cache.seen_tokens)
    full = cache is None and attachment_of(model).settings.mode == "full"
    if not full and (cache is None or isinstance(cache, HippocampalCache)):
        if mode == GenerationMode.ASSISTED_GENERATION:
            refuse_assisted_decoding()
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise CacheError(
                f"cache_implementation={generation_config.cache_implementation!r} would replace the memory's cache; "
                'leave it out, or generate inside ahn.mode(model, "full")'
            )
        if cache is None and generation_config.use_cache is not False:
            model_kwargs[compat.CACHE] = HippocampalCache(model)
            return
    type(model)._prepare_cache_for_generation(model, generation_config, model_kwargs, mode, *rest)
