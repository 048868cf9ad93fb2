"""The arms that are compared with each other: each takes a text part by part, scores it, and answers.

All but `full` have the same lossless budget, sinks and window.

- `full`: the base model itself.
- `window`: sinks and sliding window; `window+64`: a window that is 64 tokens larger.
- `ahn`: the memory beside them; `ahn+64`: 64 anchors too; `ahn+64:recent`: chosen by another score or a control, see
  `ahn.evaluation.controls`.
- `ct_max`, `ct_mean`: the slots of a Compressive Transformer beside them.
- `tail`: the base model given nothing but the tokens of sinks and window as its whole input: all that can be known
  without what was evicted. A layer of a sliding window reads what the layer below read further back, so that `window`
  may know more. It may also score worse than `tail`, for the model was trained on whole texts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

import ahn
from ahn.anchors.base import Score
from ahn.anchors.selection import Selected
from ahn.attachment import attachment_of
from ahn.cache import HippocampalCache
from ahn.cache.layer import HippocampalLayer
from ahn.config import Mode
from ahn.errors import ConfigError
from ahn.evaluation.arm_names import ARMS, find_arm
from ahn.evaluation.controls import CONTROLS
from ahn.generation import Progress, Reader, cache_bytes, decode, new_cache
from ahn.models.text import GrowingText
from ahn.tokens import Padding, Tokens, VisibleKV

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from typing_extensions import Self

__all__ = ["ARMS", "ArmReader", "OtherTextReader", "TailReader", "arm_reader"]

_STEPS = 8  # parts of a window that `tail` moves on by


class ArmReader(Reader):
    """A text read in one arm.

    Args:
        model: A model with a memory attached; window and sinks are those of its current settings.
        mode: Mode to read in.
        score: Whether every token is scored.
        control: What anchors are chosen by, in place of a score that the settings name.
        **settings: Further settings of the mode, as for `ahn.mode`.
    """

    def __init__(
        self, model: nn.Module, mode: Mode, score: bool = True, control: Score | None = None, **settings: Any
    ) -> None:
        self.mode = mode
        with ahn.mode(model, mode, **settings):
            super().__init__(model, self._make_cache(model, control), score=score)

    def _make_cache(self, model: nn.Module, control: Score | None) -> HippocampalCache | None:
        """The cache that it begins with; `None` for the usual one of the mode."""
        return None if control is None else HippocampalCache(model, anchor_score=control)

    def prefill(self, input_ids: torch.Tensor, *more: Any) -> None:
        """Reads a piece of text, `[T]`; a long one in several forward passes. See `Reader.prefill`."""
        with ahn.mode(self.model, self.mode):
            super().prefill(input_ids, *more)

    @property
    def cache_bytes(self) -> int:
        """Bytes that its cache holds."""
        return cache_bytes(self.cache)

    def generate(self, limit: int, stop: Collection[int] = ()) -> Iterator[int]:
        """Writes on, the likeliest token each time.

        Args:
            limit: Most tokens to write.
            stop: Tokens that end the answer; they are not part of it.

        Yields:
            Token ids.
        """
        yield from decode(self, limit, stop)

    def answer(
        self, tokenizer: PreTrainedTokenizerBase, limit: int, stop: Collection[int], until: Sequence[str] = ()
    ) -> str:
        """Writes on as text.

        Args:
            tokenizer: The model's tokenizer.
            limit: Most tokens to write.
            stop: Tokens that end the answer.
            until: Texts that end the answer; neither they nor what follows is part of it.
        """
        growing, text = GrowingText(tokenizer, [end for end in until if end]), ""
        for token in self.generate(limit, stop):
            text += growing.add(token)
            if growing.has_stopped:
                break
        return text + growing.end()


class TailReader(ArmReader):
    """A text of which the base model is given the tokens of sinks and window alone.

    The input grows until it fills sinks and window; then it begins anew with an eighth of a window less. So a token
    sees between seven eighths of a window and a whole one. Forks and answers see the whole one.

    Args:
        model: As for `ArmReader`.
        score: As for `ArmReader`.
    """

    def __init__(self, model: nn.Module, score: bool = True) -> None:
        super().__init__(model, "full", score)
        settings = attachment_of(model).settings
        self._sinks, self._window = settings.sinks, settings.window
        self._ids = torch.zeros(0, dtype=torch.long)  # of sinks and window
        self._answers = False

    def prefill(self, input_ids: torch.Tensor, *more: Any) -> None:
        """Reads a piece of text, `[T]`."""
        step = max(1, self._window // _STEPS)
        for piece in input_ids.cpu().split(step):
            if not self._answers and self.cache.get_seq_length() + piece.numel() > self._sinks + self._window:
                self._restart(self._window - step)
            super().prefill(piece, *more)
            self._ids = self._sinks_and_last(torch.cat((self._ids, piece)), self._window)

    def fork(self) -> Self:
        """See `Reader.fork`."""
        self._settle()
        return super().fork()

    def generate(self, limit: int, stop: Collection[int] = ()) -> Iterator[int]:
        """See `ArmReader.generate`."""
        self._settle()
        yield from super().generate(limit, stop)

    def _settle(self) -> None:
        """Gives the model the whole of sinks and window, once; what follows is an answer."""
        if not self._answers and self.cache.get_seq_length() < self._ids.numel():
            self._restart(self._window)
        self._answers = True

    def _restart(self, window: int) -> None:
        """Begins a new input with the sinks and the last tokens, which are not scored again."""
        score, tokens = self.score, self.tokens
        with ahn.mode(self.model, "full"):
            self.cache, self.score = new_cache(self.model), False
            super().prefill(self._sinks_and_last(self._ids, window))
        self.score, self.tokens = score, tokens

    def _sinks_and_last(self, ids: torch.Tensor, window: int) -> torch.Tensor:
        """Ids of the sinks and of the last tokens of a window."""
        sinks, rest = ids[: self._sinks], ids[self._sinks :]
        return torch.cat((sinks, rest[max(0, rest.numel() - window) :]))


class OtherTextReader(ArmReader):
    """A text read with the memory of another text: a control for what a memory holds of its own.

    Weights of a memory also learn how texts of a kind are written, whatever the state holds. Only what an arm gains
    over this control is owed to the state. Sinks, window and anchors are those of the text itself.

    Args:
        model: As for `ArmReader`.
        other_T: Token ids of the other text, `[T]`. It is read beside the text, as usual, from its start again where it
            ends.
        score: As for `ArmReader`.
        control: As for `ArmReader`.
        **settings: As for `ArmReader`.
    """

    def __init__(
        self,
        model: nn.Module,
        other_T: torch.Tensor,
        score: bool = True,
        control: Score | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(model, "ahn", score, control, **settings)
        self._other_T = other_T

    def _make_cache(self, model: nn.Module, control: Score | None) -> HippocampalCache:
        """See `ArmReader`."""
        return OtherTextCache(model, anchor_score=control)

    @property
    def cache_bytes(self) -> int:
        """Bytes that its cache holds for each of the two texts."""
        return super().cache_bytes // 2

    @property
    def progress(self) -> Progress:
        """See `Reader.progress`."""
        return dataclasses.replace(super().progress, cache_bytes=self.cache_bytes)

    def _rows(self, ids_T: torch.Tensor) -> torch.Tensor:
        """The text and the other one."""
        positions_T = torch.arange(ids_T.numel()) + self.cache.get_seq_length()
        other_T = self._other_T[positions_T % self._other_T.numel()]
        return torch.stack((ids_T, other_T.to(ids_T.device)))


class OtherTextLayer(HippocampalLayer):
    """A layer of a cache of two rows, whose memory takes in the second one alone, for both."""

    joins_steps = False

    def append(self, new: Tokens, padding: Padding | None, selected: Selected | None = None) -> VisibleKV:
        """See `HippocampalLayer.append`."""
        view = super().append(new, padding, selected)
        return view._replace(evicted=view.evicted.map(lambda tensor: tensor[1:].expand_as(tensor)))


class OtherTextCache(HippocampalCache):
    """A cache of two rows, whose memory takes in the second one alone, for both; see `OtherTextReader`."""

    layer_type = OtherTextLayer


def arm_reader(
    model: nn.Module,
    arm: str,
    *,
    score: bool = True,
    controls: Mapping[str, Score] = CONTROLS,
    other_T: torch.Tensor | None = None,
) -> ArmReader:
    """A reader for a text in one arm, with the window and sinks that are current.

    Args:
        model: A model with a memory attached.
        arm: A name as for `ahn.evaluation.arm_names.find_arm`.
        score: Whether every token is scored; without it the last logits of each piece are computed only.
        controls: Scores that are not registered, by the name that the arm has for them.
        other_T: For an arm with a memory: token ids of another text whose memory is read, see `OtherTextReader`.

    Raises:
        ConfigError: There is no such arm, or it has no memory that could hold another text.
        ModelError: No memory is attached.
    """
    kind = find_arm(arm)
    if other_T is not None and kind.method != "ahn":
        raise ConfigError(f"the arm {arm} has no memory that could hold another text; use ahn or ahn+64")
    if kind.method == "tail":
        return TailReader(model, score)
    settings, control = kind.settings(attachment_of(model).settings.window), controls.get(kind.anchor_score or "")
    if control is not None:
        del settings["anchor_score"]
    if other_T is not None:
        return OtherTextReader(model, other_T, score, control, **settings)
    return ArmReader(model, cast(Mode, kind.method), score, control, **settings)
