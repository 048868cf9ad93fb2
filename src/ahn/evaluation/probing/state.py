"""How full the state is while a text is read, and what the gates let in and out of it.

Legend of shapes: T tokens, E evicted tokens, L layers with a memory, P snapshots of the state, H query heads, K key
size, V value size.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

import ahn
from ahn.attachment import AttentionLayer, attachment_of
from ahn.attention.recording import record_layers
from ahn.evaluation.probing.gradients import check_text
from ahn.generation import Reader
from ahn.memories import Gating

_SNAPSHOTS = 6


@dataclasses.dataclass(frozen=True, eq=False)
class StateTrace:
    """The states of all memories while a text is read. All tensors are float32 on the CPU.

    Attributes:
        layers: Indices of the layers with a memory.
        tokens: Tokens read at each snapshot.
        rank: Effective rank of every head's state at each snapshot, `[P, L, H]`, from 0 (empty) to `full_rank`; see
            `ahn.memories.Memory.linear_maps`.
        full_rank: The most that the rank can be, min(K, V), of each layer.
        write: Write strength of each evicted token, mean over heads, `[L, E]`; see `ahn.memories.Gating`.
        decay: Share of the state that each evicted token lets live, mean over heads; `None` where nothing decays.
    """

    layers: tuple[int, ...]
    tokens: tuple[int, ...]
    rank: torch.Tensor
    full_rank: tuple[int, ...]
    write: torch.Tensor
    decay: torch.Tensor | None

    @property
    def fullness(self) -> torch.Tensor:
        """Effective rank as a share of the most it can be, `[P, L, H]`."""
        return self.rank / torch.tensor(self.full_rank)[:, None]


def effective_rank(matrices: torch.Tensor) -> torch.Tensor:
    """Effective rank of matrices: exp of the entropy of their singular values, divided by their sum.

    It is 1 if one direction holds everything, `min(K, V)` if all directions hold as much, and 0 for a matrix of zeros.

    Args:
        matrices: `[..., K, V]` float32 or float64.

    Returns:
        `[...]` in the dtype of the matrices.

    Source: Roy and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007, section 3.
    """
    values = torch.linalg.svdvals(matrices)
    total = values.sum(-1, keepdim=True)
    shares = values / total.clamp(min=torch.finfo(values.dtype).tiny)
    return torch.where(total.squeeze(-1) > 0, (-torch.special.xlogy(shares, shares).sum(-1)).exp(), 0.0)


def trace_state(
    model: nn.Module,
    input_ids: torch.Tensor,
    *,
    window: int | None = None,
    sinks: int | None = None,
    snapshots: int = _SNAPSHOTS,
) -> StateTrace:
    """Reads a text and looks at the states from time to time, and at the gates of every evicted token.

    Args:
        model: A model with a memory attached, in evaluation mode.
        input_ids: As for `token_gradients`.
        window: As for `token_gradients`.
        sinks: As for `token_gradients`.
        snapshots: How often to look at the states, at even distances, the last time at the end; at least 1.

    Raises:
        ModelError: No memory is attached.
        ShapeError: As for `token_gradients`.
        EvaluationError: As for `token_gradients`.
    """
    attachment = attachment_of(model)
    window = attachment.settings.window if window is None else window
    sinks = attachment.settings.sinks if sinks is None else sinks
    ids = check_text(model, input_ids, window, sinks)
    layers = [layer for layer in attachment.layers if layer.memory is not None]
    evicted = ids.numel() - window - sinks
    stops = sorted({sinks + window + -(-evicted * number // snapshots) for number in range(1, snapshots + 1)})
    ranks = []
    with ahn.mode(model, "ahn", window=window, sinks=sinks), _listening(model, layers) as heard:
        reader = Reader(model, score=False)
        for start, stop in zip([0, *stops], stops):
            reader.prefill(ids[start:stop])
            ranks.append([_rank(reader.cache, layer) for layer in layers])
    write, decay = (
        [_joined(heard[layer.index], field, sinks, evicted) for layer in layers] for field in Gating._fields
    )
    return StateTrace(
        layers=tuple(layer.index for layer in layers),
        tokens=tuple(stops),
        rank=torch.stack([torch.stack(row) for row in ranks]),
        full_rank=tuple(min(layer.shape.key_size, layer.shape.value_size) for layer in layers),
        write=torch.stack([each for each in write if each is not None]),
        decay=None if decay[0] is None else torch.stack([each for each in decay if each is not None]),
    )


@contextlib.contextmanager
def _listening(model: nn.Module, layers: list[AttentionLayer]) -> Iterator[dict[int, list[Gating]]]:
    """Notes what the tokens do to the state of every layer, call after call."""
    heard: dict[int, list[Gating]] = {attention_layer.index: [] for attention_layer in layers}
    with record_layers(model, lambda layer: heard[layer.layer.index].append(layer.writing)):
        yield heard


def _joined(calls: list[Gating], field: str, sinks: int, evicted: int) -> torch.Tensor | None:
    """One of the numbers for the evicted tokens, mean over heads, `[E]`."""
    parts = [getattr(call, field) for call in calls]
    if any(part is None for part in parts):
        return None
    return torch.cat([part[0].mean(-1) for part in parts])[sinks : sinks + evicted].float().cpu()


def _rank(cache: Any, layer: AttentionLayer) -> torch.Tensor:
    """Effective rank of every head of a layer, `[H]`."""
    memory: Any = layer.memory
    return effective_rank(memory.linear_maps(cache.layers[layer.index].state)[0]).float().cpu()
