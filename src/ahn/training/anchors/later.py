"""What the model itself looks back at: how much questions attend to each token beyond the window, in full attention.

Legend of shapes: T tokens, Q of them in questions, D hidden size, H query heads, K key size, V value size.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

import ahn
from ahn.attachment import Site, attachment_of
from ahn.attention import attention_function
from ahn.plan import mask_function
from ahn.probe import find_backbone, implementation

LATER = "ahn_later"
_LEAST = 1e-6  # of a token that nothing looks at
_OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj")


@dataclasses.dataclass(eq=False)
class Observation:
    """What one reading showed.

    Attributes:
        needed_T: Log of how much questions need each token, the mean over layers, `[T]`.
        hidden: What the wanted layers read, `[T, D]`, by layer.
    """

    needed_T: torch.Tensor
    hidden: dict[int, torch.Tensor]


@dataclasses.dataclass(eq=False)
class _Watch:
    window: int
    asked: int
    layers: frozenset[int]
    lengths: dict[nn.Module, torch.Tensor] = dataclasses.field(default_factory=dict)
    hidden: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)
    needed: list[torch.Tensor] = dataclasses.field(default_factory=list)

    def look(self, site: Site, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> None:
        """Adds what the questions look at in a layer; `[1, H, T, K]`, `[1, G, T, K]`, `[1, G, T, V]`."""
        groups = query.size(1) // key.size(1)
        moved_HT = _moved(site.module, value[0].repeat_interleave(groups, 0).float())
        tokens = torch.arange(query.size(2), device=query.device)
        apart = tokens[self.asked :, None] - tokens
        seen = (apart >= 0) if site.sliding_window is None else (apart >= 0) & (apart < site.sliding_window)
        most_T = torch.zeros(len(tokens), device=query.device)
        for head in range(query.size(1)):
            scores = (query[0, head, self.asked :] @ key[0, head // groups].T).float() * scaling
            weights_QT = scores.masked_fill(~seen, float("-inf")).softmax(-1).masked_fill(apart < self.window, 0.0)
            share_T = (weights_QT / self.lengths[site.module][self.asked :, None]).amax(0) * moved_HT[head]
            most_T = torch.maximum(most_T, share_T)
        self.needed.append(most_T)


@torch.no_grad()
def observe(model: nn.Module, ids: torch.Tensor, asked: int, window: int, layers: Sequence[int]) -> Observation:
    """Reads a text with full attention and looks at what the questions at its end need of it beyond the window.

    A token i is needed as much as the largest share that it has in the residual stream of a token of a question or its
    answer: `max over heads and j >= i + window of a_ji |W_O v_i| / |h_j|`; layers are averaged before the logarithm.
    What the text itself looks at does not count: it looks at its first tokens, whatever these say.

    Args:
        model: A model with a memory attached.
        ids: Token ids, `[T]`.
        asked: Place of the first token of the questions; what comes behind it are questions and answers.
        window: Tokens behind each query that do not count, for the window holds them.
        layers: Layers whose inputs are wanted.
    """
    attachment, backbone = attachment_of(model), find_backbone(model)
    watch = _Watch(window, asked, frozenset(layers))
    device = next(backbone.parameters()).device
    with ahn.mode(model, "full"), _watched(backbone, attachment.sites, watch), implementation(backbone, LATER):
        backbone(input_ids=ids[None].to(device), use_cache=False)
    mean_T = torch.stack(watch.needed).mean(0)
    return Observation(mean_T.clamp(min=_LEAST).log().cpu(), watch.hidden)


@contextlib.contextmanager
def _watched(backbone: nn.Module, sites: Sequence[Site], watch: _Watch) -> Iterator[None]:
    names = {module: name for name, module in backbone.named_modules()}
    handles = []
    for site in sites:
        around = backbone.get_submodule(names[site.module].rpartition(".")[0])
        handles.append(around.register_forward_pre_hook(_note_length(site, watch), with_kwargs=True))
        handles.append(site.module.register_forward_pre_hook(_bring(site, watch), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _note_length(site: Site, watch: _Watch) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        watch.lengths[site.module] = hidden[0].float().norm(dim=-1).clamp(min=_LEAST)

    return hook


def _bring(site: Site, watch: _Watch) -> Callable[..., Any]:
    """A hook that keeps what a layer reads, and sends the watch along to the attention function."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if site.index in watch.layers:
            hidden = args[0] if args else kwargs["hidden_states"]
            watch.hidden[site.index] = hidden[0].cpu()
        return args, {**kwargs, LATER: (watch, site)}

    return hook


def _moved(module: nn.Module, value_HTV: torch.Tensor) -> torch.Tensor:
    """How far a value moves the residual stream, `[H, T]`; its own length where the output projection is not found."""
    heads, _, size = value_HTV.shape
    for name in _OUTPUTS:
        output = getattr(module, name, None)
        if isinstance(output, nn.Linear) and output.in_features == heads * size:
            parts: torch.Tensor = output.weight.float().view(-1, heads, size)
            return torch.stack([(value_HTV[head] @ parts[:, head].T).norm(dim=-1) for head in range(heads)])
    lengths: torch.Tensor = value_HTV.norm(dim=-1)
    return lengths


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    ahn_later: tuple[_Watch, Site],
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    watch, site = ahn_later
    watch.look(site, query, key, value, query.size(-1) ** -0.5 if scaling is None else scaling)
    return attention_function(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


AttentionInterface.register(LATER, _attend)
AttentionMaskInterface.register(LATER, mask_function)
