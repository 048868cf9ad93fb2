"""The cache of a whole model."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, NoReturn, cast

import torch
from torch import nn
from transformers.cache_utils import Cache

from ahn.anchors.base import Score
from ahn.anchors.policy import settle
from ahn.anchors.selection import Scoreboard
from ahn.attachment import Attachment, attachment_of, find_attachment
from ahn.cache.groups import LayerGroup
from ahn.cache.layer import HippocampalLayer
from ahn.cache.layer_kinds import AnyLayer, layer_tensors, new_layer, set_layer_tensors
from ahn.cache.layout import check_saved
from ahn.cache.storage import SavedCache, read_cache, write_cache
from ahn.config import RunSettings
from ahn.errors import CacheError, ConfigError
from ahn.tokens import Padding

if TYPE_CHECKING:
    from typing_extensions import Self


class CacheSnapshot(NamedTuple):
    """What a cache was before a call, by reference.

    Attributes:
        layers: Snapshots of the layers.
        padding: Padding at the left of the rows.
        scores: What the scoreboard held.
    """

    layers: list[dict[str, Any]]
    padding: Padding | None
    scores: dict[str, torch.Tensor] | None


class HippocampalCache(Cache):
    """What a model keeps of the text it has read, in a number of bytes that stops growing once the window is full.

    It is a `transformers.Cache`: to keep it over several calls, pass it as `model(..., cache=cache)` and
    `model.generate(..., cache=cache)`; before transformers 5.24, `generate` calls it `past_key_values`. Without one,
    each call makes its own. Layers that kept the base model's full attention (`AHNConfig(layers=...)`) hold an ordinary
    cache that grows.

    Args:
        model: A model with a memory attached.
        window: Tokens of the window; those of the current mode if left out.
        sinks: Number of sinks; those of the current mode if left out.
        anchor_score: What anchors are chosen by in place of the score that the current mode names: an object of a
            subclass of `ahn.anchors.base.Score`, which need not be registered.

    Raises:
        ModelError: No memory is attached to the model.
        ConfigError: A value is out of range, or the current mode is "full".

    Attributes:
        settings: Mode, window, sinks and what anchors are chosen by, fixed for the life of the cache.
        padding: Padding at the left of the rows, or `None`.
        scoreboard: The choice of the anchors, where there are any.
        groups: Layers that decode together; found when decoding begins.
        layers: The layers: ours where a layer has a memory, those of transformers elsewhere.
        layer_type: What ours are.
    """

    layer_type: ClassVar[type[HippocampalLayer]] = HippocampalLayer
    layers: list[AnyLayer]  # type: ignore[assignment]

    def __init__(
        self,
        model: nn.Module,
        *,
        window: int | None = None,
        sinks: int | None = None,
        anchor_score: Score | None = None,
    ) -> None:
        attachment = attachment_of(model)
        now = attachment.settings
        if now.mode == "full":
            raise ConfigError('mode "full" reads with the base model\'s own cache: use transformers.DynamicCache there')
        settings = dataclasses.replace(
            now, window=now.window if window is None else window, sinks=now.sinks if sinks is None else sinks
        )
        attachment.check(settings, anchor_score)
        self.begin(attachment, settings, anchor_score)

    def begin(self, attachment: Attachment, settings: RunSettings, score: Score | None = None) -> None:
        """Sets up an empty cache with settings that were checked before.

        Args:
            attachment: What is attached to the model.
            settings: The settings.
            score: What anchors are chosen by, where it is not what the settings say.

        Raises:
            ConfigError: The anchors are chosen by a score that needs weights, and the model has none for it.
        """
        policy = settle(settings, attachment.weighted_layers, score) if settings.has_anchors else None
        self.attachment = attachment
        self.settings = settings if policy is None else dataclasses.replace(settings, anchor_score=policy.score.name)
        self.padding: Padding | None = None
        self.groups: list[LayerGroup] = []
        self._snapshot: CacheSnapshot | None = None
        self._is_read = False
        self._holds_inference_tensors = False
        kind = self.layer_type
        super().__init__(layers=[new_layer(layer, settings, policy, kind) for layer in attachment.layers])
        windows = {layer.exact.window for layer in self.layers if isinstance(layer, HippocampalLayer)}
        self.scoreboard: Scoreboard | None = None
        if policy is not None:
            self.scoreboard = Scoreboard(settings.anchors, settings.sinks, windows, policy.layers, policy.score)

    @property
    def anchor_tokens(self) -> list[list[int]]:
        """For each row the anchors of the layers with the longest window, as places in the row, the best first."""
        name = "" if self.scoreboard is None else str(max(self.scoreboard.windows))
        if self.scoreboard is None or f"tokens.{name}" not in self.scoreboard.stored:
            return [[] for _ in range(self.rows or 0)]
        order = self.scoreboard.stored[f"scores.{name}"].argsort(dim=1, descending=True, stable=True)
        ranked = self.scoreboard.stored[f"tokens.{name}"].gather(1, order)
        return [[token for token in row if token >= 0] for row in ranked.tolist()]

    @property
    def seen_tokens(self) -> int:
        """Number of tokens read so far, padding included."""
        return self.get_seq_length()

    @property
    def rows(self) -> int | None:
        """Rows of the batch that it holds, or `None` before the first token."""
        for layer in self.layers:
            for tensor in layer_tensors(layer).values():
                return tensor.size(0)
        return None

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor held: keys, values, gates, states, anchors and their scores, padding counts."""
        self.settle()
        padding = self.padding.counts.nbytes if self.padding else 0
        padding += sum(tensor.nbytes for tensor in self.scoreboard.stored.values()) if self.scoreboard else 0
        return padding + sum(t.nbytes for layer in self.layers for t in layer_tensors(layer).values())

    def begin_call(self) -> None:
        """Notes what a call may change; until `settle`, `rollback` takes it back."""
        self.settle()
        if self._holds_inference_tensors and not torch.is_inference_mode_enabled():
            self._map_all(torch.clone)  # those that were made in inference mode cannot be written to outside of it
        self._holds_inference_tensors = torch.is_inference_mode_enabled()
        scores = None if self.scoreboard is None else dict(self.scoreboard.stored)
        self._snapshot = CacheSnapshot(self.snapshots(), self.padding, scores)

    def end_call(self) -> None:
        """Says that a call has read its tokens, so that `settle` keeps them."""
        self._is_read = True

    def settle(self) -> None:
        """Keeps what the last call read, or takes it back if that call was broken off."""
        if self._snapshot is None:
            return
        if not self._is_read:
            self.rollback()
            return
        ours = [layer for layer in self.layers if isinstance(layer, HippocampalLayer)]
        try:
            for layer in ours:
                layer.reserve()
        except BaseException:
            self.rollback()
            raise
        for layer in ours:
            layer.commit()
        self._snapshot, self._is_read = None, False

    def rollback(self) -> None:
        """Takes back what came since `begin_call`, if `settle` has not kept it yet."""
        snapshot, self._snapshot, self._is_read = self._snapshot, None, False
        if snapshot is None:
            return
        self.padding = snapshot.padding
        if self.scoreboard is not None and snapshot.scores is not None:
            self.scoreboard.stored = snapshot.scores
        for layer, layer_snapshot in zip(self.layers, snapshot.layers, strict=True):
            if isinstance(layer, HippocampalLayer):
                layer.restore(layer_snapshot)
            else:
                vars(layer).clear()
                vars(layer).update(layer_snapshot)

    def take_back(self, index: int) -> None:
        """Takes back what the layer of an index has stored since `begin_call`; its state holds earlier tokens only."""
        layer = self.layers[index]
        if self._snapshot is not None and isinstance(layer, HippocampalLayer):
            layer.restore({**self._snapshot.layers[index], "state": layer.state})

    def snapshots(self) -> list[dict[str, Any]]:
        """For each layer all that a call changes, by reference: calls replace tensors and do not write to them."""
        return [layer.snapshot() if isinstance(layer, HippocampalLayer) else dict(vars(layer)) for layer in self.layers]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the cache to a file, from which `load` continues bit for bit.

        Args:
            path: The file to write (safetensors). Written whole or not at all.

        Raises:
            CacheError: The file cannot be written.
        """
        self.settle()
        tensors = {
            f"{index}.{name}": tensor
            for index, layer in enumerate(self.layers)
            for name, tensor in layer_tensors(layer).items()
        }
        if self.padding:
            tensors["padding"] = self.padding.counts
        if self.scoreboard:
            tensors |= {f"ballot.{name}": tensor for name, tensor in self.scoreboard.stored.items()}
        seen = [layer.get_seq_length() for layer in self.layers]
        write_cache(SavedCache(self.settings, seen, tensors), self.attachment, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module) -> Self:
        """A cache that `save` wrote, for a model with the same kind of memory attached.

        Args:
            path: The file.
            model: The model that will go on reading.

        Raises:
            CacheError: The file is missing, damaged, or of a model with another shape or memory.
        """
        attachment = attachment_of(model)
        saved = read_cache(path, attachment)
        cache = cls.__new__(cls)
        cache.begin(attachment, saved.settings)
        check_saved(os.fspath(path), saved, attachment, cache.layers, cache.scoreboard)
        devices = [attention_layer.device for attention_layer in attachment.layers]
        for index, (layer, seen) in enumerate(zip(cache.layers, saved.seen, strict=True)):
            set_layer_tensors(layer, saved.tensors_of(str(index), devices[index]), seen)
        if cache.scoreboard:
            cache.scoreboard.stored = saved.tensors_of("ballot", devices[0])
        if "padding" in saved.tensors:
            counts = saved.tensors["padding"].to(devices[0])
            cache.padding = Padding(counts, int(counts.max()))
        return cache

    def fork(self) -> Self:
        """An independent copy: both continue from here, bit for bit alike."""
        self.settle()
        twin = type(self).__new__(type(self))
        twin.begin(self.attachment, self.settings, self.scoreboard.score if self.scoreboard else None)
        for mine, other in zip(self.layers, twin.layers, strict=True):
            set_layer_tensors(
                other, {name: t.clone() for name, t in layer_tensors(mine).items()}, mine.get_seq_length()
            )
        if self.scoreboard and twin.scoreboard:
            twin.scoreboard.stored = {name: tensor.clone() for name, tensor in self.scoreboard.stored.items()}
        if self.padding:
            twin.padding = Padding(self.padding.counts.clone(), self.padding.most)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """The same as `fork`: a copy of what was read, for the same model."""
        return self.fork()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """A cache belongs to its model, so that pickling it alone would pickle that too.

        Raises:
            CacheError: Always.
        """
        raise CacheError("a cache is not pickled or copied in part: write it with cache.save(path), copy it by fork()")

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Sizes of a mask over all tokens seen, which a model asks for before its layers read.

        Raises:
            CacheError: The model that reads has no memory.
        """
        attachment = self.attachment
        is_detached = find_attachment(attachment.layers[0].module) is not attachment
        if is_detached or (self._snapshot is None and not attachment.is_wrapped):  # wrappers ask before the call begins
            raise CacheError(
                "this cache is of a model with a memory, and the model that reads with it has none: attach "
                "one and read the text into a new ahn.HippocampalCache(model), or read with transformers.DynamicCache()"
            )
        return super().get_mask_sizes(*args, **kwargs)

    def reset(self) -> None:
        """Forgets everything; the settings stay."""
        self.settle()
        super().reset()
        self.padding = None
        if self.scoreboard:
            self.scoreboard.stored = {}

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Follows the rows that a beam search keeps."""
        self.settle()
        super().reorder_cache(cast(torch.LongTensor, beam_idx))
        self._select_shared(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps these rows of the batch."""
        self.settle()
        super().batch_select_indices(indices)
        self._select_shared(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row of the batch."""
        self.settle()
        super().batch_repeat_interleave(repeats)
        self._map_scores(lambda tensor: tensor.repeat_interleave(repeats, dim=0))
        if self.padding:
            self.padding = Padding(self.padding.counts.repeat_interleave(repeats), self.padding.most)

    def activate_past_recording(self) -> None:
        """Asked for by assisted decoding, which takes tokens back.

        Raises:
            CacheError: Always: what a memory has taken in cannot be taken out again.
        """
        refuse_assisted_decoding()

    def _map_all(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replaces every tensor by the function's result on it."""
        for layer in self.layers:
            tensors = {name: function(tensor) for name, tensor in layer_tensors(layer).items()}
            set_layer_tensors(layer, tensors, layer.get_seq_length())
        self._map_scores(function)
        if self.padding:
            self.padding = Padding(function(self.padding.counts), self.padding.most)

    def _map_scores(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.scoreboard:
            self.scoreboard.stored = {name: function(tensor) for name, tensor in self.scoreboard.stored.items()}

    def _select_shared(self, rows: torch.Tensor) -> None:
        """Keeps these rows of what all layers share."""
        self._map_scores(lambda tensor: tensor.index_select(0, rows.to(tensor.device)))
        if self.padding:
            counts = self.padding.counts
            self.padding = Padding(counts[rows.to(counts.device)], self.padding.most)


def refuse_assisted_decoding() -> NoReturn:
    """Says why assisted decoding does not work.

    Raises:
        CacheError: Always.
    """
    raise CacheError(
        "assisted decoding takes tokens back, which a memory cannot do; generate without an assistant model "
        'or prompt lookup, or inside ahn.mode(model, "full")'
    )


def check_cache(cache: object) -> HippocampalCache:
    """The cache, if it is one of ours.

    Raises:
        CacheError: It is not.
    """
    if isinstance(cache, HippocampalCache):
        return cache
    raise CacheError(
        f"{type(cache).__name__} has no place for a memory: pass ahn.HippocampalCache(model), or nothing, or read "
        'inside ahn.mode(model, "full")'
    )
