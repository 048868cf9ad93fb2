"""Looks at a model from the outside before anything is attached: which modules attend, and through which door.

A short text is read with an attention implementation that only notes who calls it. What it sees, not what a config
claims, decides whether a memory can be attached.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import AttentionInterface

from ahn.backbone import compat
from ahn.backbone.rotary import Rotation, find_rotary
from ahn.errors import ModelError

PROBE = "ahn_probe"


@dataclasses.dataclass
class CapturedLayer:
    """One attention layer as it called the attention function.

    Attributes:
        module: The layer.
        query: Its queries, `[1, H, T, K]`.
        key: Its keys, `[1, G, T, K]`.
        value_size: Size of one value head, V.
        sliding_window: Tokens that the layer itself sees, or `None`.
    """

    module: nn.Module
    query: torch.Tensor
    key: torch.Tensor
    value_size: int
    sliding_window: int | None


_SEEN: ContextVar[list[CapturedLayer] | None] = ContextVar("ahn_probe", default=None)


def probe(model: nn.Module, backbone: nn.Module) -> list[CapturedLayer]:
    """The attention layers of a model, in the order in which they are run.

    Args:
        model: The model, for its name in messages.
        backbone: Its stack of layers.

    Raises:
        ModelError: The model does not route all its attention through transformers' attention interface.
    """
    name = type(model).__name__
    if shared := getattr(backbone.config, "num_kv_shared_layers", 0):
        raise ModelError(
            f"no memory can be attached to {name}: its last {shared} layers read the keys and values of earlier layers "
            "(num_kv_shared_layers), which would have to keep all of them; take a model without such layers"
        )
    try:
        seen = _run(backbone)
    except Exception as error:  # a family with its own attention may fail in any way on a name it does not know
        if (own := _failure(backbone)) is not None:
            raise ModelError(
                f"no memory can be attached to {name}, which does not read four tokens of text itself "
                f"({' '.join(str(own).split())}); a memory needs a model that reads text alone"
            ) from error
        raise ModelError(_refusal(name, f"it failed on a custom attention function: {error}")) from error
    layers = getattr(backbone.config, "num_hidden_layers", None)
    if not seen:
        raise ModelError(_refusal(name, "its layers never call the attention function that its config names"))
    if len(seen) != layers or len({id(each.module) for each in seen}) != len(seen):
        raise ModelError(_refusal(name, f"{len(seen)} calls of the attention function for {layers} layers"))
    if [getattr(each.module, "layer_idx", None) for each in seen] != list(range(len(seen))):
        raise ModelError(_refusal(name, "its attention layers are not numbered from 0 in the order they run"))
    if not all(getattr(each.module, "is_causal", True) for each in seen):
        raise ModelError(f"{name} attends in both directions; a memory needs a decoder, which reads from left to right")
    return seen


def sample(backbone: Any, tokens: int) -> torch.Tensor:
    """A few token ids that any model can read, `[1, tokens]`."""
    vocabulary: int = backbone.config.vocab_size
    return (torch.arange(1, tokens + 1, device=compat.input_device(backbone)) % vocabulary)[None]


def _run(backbone: nn.Module) -> list[CapturedLayer]:
    seen: list[CapturedLayer] = []
    ids = sample(backbone, 4)
    # To make a mask, a model looks at values, which there are none of on the meta device; a finished one passes.
    mask = {"attention_mask": torch.zeros(1, 1, 4, 4, device=ids.device)} if ids.is_meta else {}
    token = _SEEN.set(seen)
    try:
        with implementation(backbone, PROBE), torch.no_grad():
            backbone(input_ids=ids, use_cache=False, **mask)
    finally:
        _SEEN.reset(token)
    return seen


def _failure(backbone: nn.Module) -> Exception | None:
    """What a model raises that reads a short text with its own attention, or `None`."""
    try:
        with torch.no_grad():
            backbone(input_ids=sample(backbone, 4), use_cache=False)
    except Exception as error:
        return error
    return None


def check_rotations(backbone: Any, rotations: dict[nn.Module, Rotation]) -> dict[nn.Module, bool]:
    """Reads a short text with and without rotation and compares; without weights, it only sees which layers rotate.

    Args:
        backbone: The stack of decoder layers.
        rotations: What is supposed to undo the rotary positions of each attention layer.

    Returns:
        For each layer whether it rotates at all.

    Raises:
        ModelError: A layer rotates and its rotation is not undone.
    """
    inputs: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    handles = [
        module.register_forward_pre_hook(lambda m, args, kwargs: inputs.update({m: (args, kwargs)}), with_kwargs=True)
        for module in rotations
    ]
    try:
        _run(backbone)
    finally:
        for handle in handles:
            handle.remove()
    return {module: _rotates(backbone, module, *inputs[module], rotations[module]) for module in rotations}


def check_numbers(computed: torch.Tensor) -> None:
    """Checks that what a model computes are numbers.

    Raises:
        ModelError: Some of it is NaN.
    """
    if not computed.is_meta and bool(computed.isnan().any()):
        raise ModelError(
            "the model computes NaN, which is no number: its weights hold some (download them again), or its dtype is "
            "too small for it (use bfloat16 or float32)"
        )


def _rotates(backbone: Any, module: nn.Module, args: Any, kwargs: dict[str, Any], rotation: Rotation) -> bool:
    tables, positions = kwargs.get("position_embeddings"), kwargs.get("position_ids")
    if tables is None or positions is None:
        raise ModelError(f"{type(module).__name__} is not given rotary tables and positions")
    if tables[0].is_meta:
        return _depends_on(tables, backbone, module, args, kwargs)
    still = (torch.ones_like(tables[0]), torch.zeros_like(tables[1]))
    with torch.no_grad():
        rotated, plain = (_query(backbone, module, args, {**kwargs, "position_embeddings": t}) for t in (tables, still))
    if torch.equal(rotated, plain):
        return False
    check_numbers(plain)
    if not _undoes(rotation, rotated, plain, tables, positions):
        raise ModelError(
            f"{type(module).__name__} rotates in a way that its apply_rotary_pos_emb and tables do not undo"
        )
    return True


def _undoes(rotation: Rotation, rotated: torch.Tensor, plain: torch.Tensor, tables: Any, positions: Any) -> bool:
    tolerance = 1e-4 if plain.dtype == torch.float32 else 5e-2
    try:
        captured = rotation.unrotate(rotated, tables)
        computed = rotation.unrotate_recorded(rotated, rotation.position_record(tables, positions, 1))
    except RuntimeError:  # tables of another size than a head: deepseek_v3 rotates its last part only
        return False
    atol = tolerance * float(plain.abs().max())
    return all(torch.allclose(undone, plain, rtol=tolerance, atol=atol) for undone in (captured, computed))


def _depends_on(tables: Any, backbone: Any, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a layer uses the rotary tables at all, which gradients tell where there are no values to compare."""
    with torch.enable_grad():
        cos, sin = (table.detach().requires_grad_() for table in tables)
        query = _query(backbone, module, args, {**kwargs, "position_embeddings": (cos, sin)})
        if not query.requires_grad:
            return False
        return torch.autograd.grad(query.sum(), cos, allow_unused=True)[0] is not None


def _query(backbone: Any, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    """The queries that a layer computes from these inputs, its hooks left out, `[1, H, T, K]`."""
    seen: list[CapturedLayer] = []
    token = _SEEN.set(seen)
    try:
        with implementation(backbone, PROBE):
            module.forward(*args, **kwargs)
    finally:
        _SEEN.reset(token)
    return seen[0].query


@contextlib.contextmanager
def implementation(backbone: nn.Module, name: str) -> Iterator[None]:
    """Runs a model with another attention implementation inside a `with` block."""
    before = [(config, config._attn_implementation) for config in compat.attention_configs(backbone)]
    for config, _ in before:
        compat.set_implementation(config, name)
    try:
        yield
    finally:
        for config, old in before:
            compat.set_implementation(config, old)


def find_backbone(model: nn.Module) -> Any:
    """The stack of decoder layers of a model.

    Raises:
        ModelError: The model is no decoder of transformers.
    """
    model = compat.unwrap(model)
    if not isinstance(model, PreTrainedModel):
        raise ModelError(f"a memory is attached to a transformers model, not to a {type(model).__name__}")
    if model.config.is_encoder_decoder:
        raise ModelError(f"{type(model).__name__} has an encoder; a memory needs a model that is a decoder only")
    return model.get_decoder() or model.base_model


def _refusal(name: str, reason: str) -> str:
    return (
        f"no memory can be attached to {name}: it does not route its attention through transformers' attention "
        f"interface ({reason}). Families that do include llama, qwen2, qwen3, mistral, gemma, phi3, gpt2"
    )


def _note(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """Notes the call and answers with plain attention, which is all that a probe needs."""
    seen = _SEEN.get()
    if seen is not None:
        seen.append(CapturedLayer(module, query, key, value.size(-1), kwargs.get("sliding_window")))
    value = repeat_kv(value, query.size(1) // value.size(1))
    return value.transpose(1, 2).contiguous(), None


def is_unloaded(module: nn.Module) -> bool:
    """Whether a module has weights of its own that are nowhere: those that accelerate offloads come when they run."""
    return compat.execution_device(module) is None and any(each.is_meta for each in module.parameters(recurse=False))


def recomputes_layers(model: nn.Module) -> bool:
    """Whether whole layers are computed again in the backward pass, so that nothing is left to save."""
    return any(getattr(module, "gradient_checkpointing", False) is True for module in model.modules())


def norm_epsilon(norm: Any) -> Any:
    """What a root mean square norm adds to the mean of squares, by either of the usual names; `None` without one."""
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


def trained_context(backbone: Any) -> int:
    """Positions that the model was trained on, or a number beyond all texts where its config names none."""
    known = getattr(backbone.config, "max_position_embeddings", None) or getattr(backbone.config, "n_positions", None)
    return int(known) if known else sys.maxsize


def position_limit(backbone: Any) -> int | None:
    """How many positions a model with a table of positions has, or `None` for any other model."""
    rotary, known = find_rotary(backbone), trained_context(backbone)
    if rotary is not None:  # gptj and codegen look their rotation up in a table
        return known if hasattr(rotary, "embed_positions") else None
    tables = (m for m in backbone.modules() if isinstance(m, nn.Embedding) and m is not backbone.get_input_embeddings())
    return known if any(known <= table.num_embeddings <= known + 8 for table in tables) else None


AttentionInterface.register(PROBE, _note)
AttentionMaskInterface.register(PROBE, eager_mask)
